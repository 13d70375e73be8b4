"""Linear layers in float8 e4m3 (W8A8), where the GPU multiplies it."""

import torch

from .quantization import LIMITS

LARGEST = LIMITS["fp8"]
_multiplies = {}  # by kind of device; a dict, for the compiler sees through functools.cache


@torch.compiler.assume_constant_result
def has_scaled_mm(device_type):
    """Tell whether torch._scaled_mm multiplies float8 e4m3 on this kind of device (on NVIDIA: Ada and newer)."""
    if device_type not in _multiplies:
        _multiplies[device_type] = device_type == "cuda" and _can_multiply(device_type)
    return _multiplies[device_type]


def _can_multiply(device_type):
    a = torch.zeros(16, 16, device=device_type, dtype=torch.float8_e4m3fn)
    one = torch.ones((), device=device_type)
    try:
        torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return False
    return True


def fits(inputs, outputs):
    """Tell whether a layer of these sizes can be multiplied in float8."""
    return inputs % 16 == 0 and outputs % 16 == 0


def activation_scale(rows, scale=None):
    """Return the scale of rows where it is given, a tensor of one number; else that of their largest magnitude."""
    return (rows.abs().amax().float() / LARGEST).clamp(min=1e-12) if scale is None else scale


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
