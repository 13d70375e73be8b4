"""Linear layers in float8 e4m3 (W8A8), where the GPU multiplies it."""

import torch

from ..devices import once_a_device
from .packing import LIMITS

LARGEST = LIMITS["fp8"]
SCALED_MM = "torch._scaled_mm"


@once_a_device
def has_scaled_mm(device):
    """Tell whether torch._scaled_mm multiplies float8 e4m3 on a device (on NVIDIA: Ada and newer)."""
    if device.type != "cuda":
        return False
    a, one = torch.zeros(16, 16, device=device, dtype=torch.float8_e4m3fn), torch.ones((), device=device)
    torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return True


def fits(inputs, outputs):
    """Tell whether a layer of these sizes can be multiplied in float8."""
    return inputs % 16 == 0 and outputs % 16 == 0


def activation_scale(rows, scale=None):
    """Return the scale of rows where it is given, a tensor of one number; else that of their largest magnitude. It is not
    finite where they are not, which clipping would hide.
    """
    largest = rows.abs().amax().float()
    return (largest / LARGEST).clamp(min=1e-12) if scale is None else scale + 0 * largest


def linear_fp8(x, values, weight_scale, bias, scale=None):
    """Linear layer with float8 activations: x float [..., C], values float8 e4m3 [O, C], weight_scale float32 [1], one for the
    weight; returns [..., O] in x's dtype. scale: the activations', one number; None: that of their largest magnitude.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale = activation_scale(rows, scale)
    quantized = (rows.float() / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).contiguous()
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    bias = None if bias is None else bias.to(dtype)
    out = torch._scaled_mm(
        quantized, values.t(), scale_a=scale.reshape(()), scale_b=weight_scale.reshape(()), bias=bias, out_dtype=dtype
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], len(values))
