"""Linear layers with weights and activations in float8 e4m3 (W8A8), on GPUs that support it."""

import torch

from ..devices import once_a_device
from .packing import LIMITS

LARGEST = LIMITS["fp8"]
SCALED_MM = "torch._scaled_mm"


@once_a_device
def has_scaled_mm(device: torch.device) -> bool:
    """Return whether torch._scaled_mm multiplies float8 e4m3 on a device (on NVIDIA: Ada and newer)."""
    if device.type != "cuda":
        return False
    a, one = torch.zeros(16, 16, device=device, dtype=torch.float8_e4m3fn), torch.ones((), device=device)
    torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return True


def fits(inputs: int, outputs: int) -> bool:
    """Return whether a layer of these sizes can be computed in float8."""
    return inputs % 16 == 0 and outputs % 16 == 0


def activation_scale(rows: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the scale of rows, a tensor of one number: the given one, or the largest magnitude divided by 448. If a row has a
    non-finite value, the scale is not finite, because clipping would hide that value.
    """
    largest = rows.abs().amax().float()
    return (largest / LARGEST).clamp(min=1e-12) if scale is None else scale + 0 * largest


def linear_fp8(
    x: torch.Tensor,
    values: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a Linear layer with float8 activations and return [..., O] in the dtype of x.

    x: float [..., C]. values: float8 e4m3 [O, C]. weight_scale: float32 [1], for the whole weight. bias: float [O] or None.
    scale: given scale of the activations, a tensor of one number; None to compute it from the largest magnitude of x.
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
