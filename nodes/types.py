"""The pack's own socket types, and the host's IMAGE from an array."""

import numpy as np
import torch
from comfy_api.latest import io

# A list of iec_core.report.RunReport.
Report = io.Custom("IEC_REPORT")

# An iec_core.cachequant.CacheProfile.
CacheProfileSocket = io.Custom("IEC_CACHE_PROFILE")

# An iec_core.activation_scales.ActivationScales.
QuantizationProfileSocket = io.Custom("IEC_QUANTIZATION_PROFILE")


def as_image(array):
    """uint8 [H, W, 3] to the host's IMAGE, float [1, H, W, 3] in 0..1."""
    return torch.from_numpy(array.astype(np.float32) / 255)[None]
