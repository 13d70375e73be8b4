"""The pack's socket types, the conversion of an array to the host's IMAGE, and the `ui` of a node that shows images."""

import numpy as np
import torch
from comfy_api.latest import io, ui

# A list of iec_core.run_report.RunReport.
Report = io.Custom("IEC_REPORT")

# An iec_core.caching.cachequant.CacheProfile.
CacheProfileSocket = io.Custom("IEC_CACHE_PROFILE")

# An iec_core.quantization.activation_scales.ActivationScales.
QuantizationProfileSocket = io.Custom("IEC_QUANTIZATION_PROFILE")


class _AnyChoice(str):
    """The type of an output that any input with choices takes: hosts from before 2026 compare the lists of choices."""

    __hash__ = str.__hash__

    def __ne__(self, other):
        return not isinstance(other, list) and str.__ne__(self, other)


class ChoiceOutput(io.Combo.Output):
    """An output with one of the choices of another node's input."""

    @property
    def io_type(self):
        return _AnyChoice("COMBO")


def as_image(array):
    """Convert uint8 [H, W, 3] to the host's IMAGE, float [1, H, W, 3] in 0..1."""
    return torch.from_numpy(array.astype(np.float32) / 255)[None]


def shown_on(node, images, text=None):
    """Return the `ui` dict of a node class that shows images [H, W, 3] in 0..1, and a text if the frontend supports it."""
    shown = ui.PreviewImage(images, cls=node).as_dict()
    return shown if text is None else {**shown, **ui.PreviewText(text).as_dict()}
