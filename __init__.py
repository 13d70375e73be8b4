"""ComfyUI-IEC: Iterative Error Correction, quantization and DeepCache for the models that ComfyUI samples."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
