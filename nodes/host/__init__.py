"""Everything that touches ComfyUI's internals: when the host changes, this is what has to be mended."""
