"""The pack's own socket types, the host's IMAGE from an array, and what a node shows on itself."""

import numpy as np
import torch
from comfy_api.latest import io, ui

# A list of iec_core.run_report.RunReport.
Report = io.Custom("IEC_REPORT")

# An iec_core.cachequant.CacheProfile.
CacheProfileSocket = io.Custom("IEC_CACHE_PROFILE")

# An iec_core.activation_scales.ActivationScales.
QuantizationProfileSocket = io.Custom("IEC_QUANTIZATION_PROFILE")


def as_image(array):
    """uint8 [H, W, 3] to the host's IMAGE, float [1, H, W, 3] in 0..1."""
    return torch.from_numpy(array.astype(np.float32) / 255)[None]


def shown_on(node, images, text=None):
    """Return the `ui` of a node's class that shows images [H, W, 3] in 0..1 on the node, and a text where the frontend does."""
    shown = ui.PreviewImage(images, cls=node).as_dict()
    return shown if text is None else {**shown, **ui.PreviewText(text).as_dict()}
