"""All code that touches the internals of ComfyUI, called the host here. If ComfyUI changes, only this package must change."""
