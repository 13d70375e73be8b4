"""ComfyUI-IEC: Iterative Error Correction, quantization and DeepCache for the models that ComfyUI samples."""

from .nodes import WEB_DIRECTORY, comfy_entrypoint

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
