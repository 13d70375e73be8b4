"""Post-training quantization with exact integer arithmetic.

Weights are symmetric with a scale per output channel. 8-bit activations are symmetric with dynamic scales: one per row
(token) for Linear, one per batch item for Conv2d, whose window mixes pixels; so no item depends on its neighbours in
the batch. Products are summed in int32, exactly; only then are the two scales and the bias applied, in float32.
"""

import functools
from dataclasses import dataclass

import torch

WEIGHT_BITS = (8, 4)
ACTIVATION_BITS = (8, 16)


@dataclass(frozen=True)
class IntegerWeight:
    """values: int8 [O, ...], within +-(2^(bits-1) - 1); scale: float32 [O]; weight = values * scale."""

    values: torch.Tensor
    scale: torch.Tensor

    def dequantize(self, dtype):
        """Return the weight in `dtype`, of the shape it had."""
        return (self.values * self.scale.reshape(-1, *[1] * (self.values.ndim - 1))).to(dtype)


def _symmetric(x, bits):
    """Quantize every row of x [R, C] to integers within +-(2^(bits-1) - 1): (int8 [R, C], scale float32 [R]).

    The scale is the row's largest magnitude over the largest integer; a row of zeros gets scale 1.
    """
    limit = 2 ** (bits - 1) - 1
    x = x.float()
    largest = x.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    return (x / scale[:, None]).round_().clamp_(-limit, limit).to(torch.int8), scale


def quantize_weight(weight, bits):
    """Quantize a Linear or Conv2d weight [O, ...] to `bits` (8 or 4), one scale per output channel."""
    values, scale = _symmetric(weight.detach().flatten(1), bits)
    return IntegerWeight(values.reshape(weight.shape), scale)


def quantize_activation(x):
    """Quantize x [R, ...] to 8 bits, one scale per row of dimension 0: (int8 like x, scale float32 [R])."""
    values, scale = _symmetric(x.flatten(1), 8)
    return values.reshape(x.shape), scale


@functools.cache
def _has_exact_int_mm(device_type):
    """Tell whether torch._int_mm on this kind of device exists and is exact at the extremes of int8.

    Some processors without a dot-product instruction sum pairs of products in 16 bits, which saturates.
    """
    a = torch.full((32, 1024), -127, dtype=torch.int8, device=device_type)
    try:
        return bool((torch._int_mm(a, a.t()) == 127 * 127 * 1024).all())
    except RuntimeError:  # no such kernel
        return False


def int_matmul(a, b):
    """Return a @ b.T in int32, exactly: a int8 [M, K], b int8 [N, K]."""
    if not _has_exact_int_mm(a.device.type):
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        parts = zip(a.split(1024, dim=1), b.split(1024, dim=1))  # 1024 * 127^2 < 2^24: exact in float32 too
        return sum((part_a.to(wide) @ part_b.to(wide).t()).to(torch.int32) for part_a, part_b in parts)
    rows, columns = a.shape[0], b.shape[0]
    if a.device.type == "cuda":  # cuBLASLt: more than 16 rows, K and N in eights
        pad = torch.nn.functional.pad
        depth = -a.shape[1] % 8
        a = pad(a, (0, depth, 0, max(0, 17 - rows)))
        b = pad(b, (0, depth, 0, -columns % 8))
    return torch._int_mm(a, b.t())[:rows, :columns]


def conv2d_sums(x, weight, stride, padding, dilation):
    """Return the convolution (groups 1, zero padding) of int8 x [B, C, H, W] and int8 weight [O, C, kh, kw], exactly, as
    int32 [B, O, H', W'].

    An implicit matrix product over gathered windows. Channels come last within a window, so that memory is read in runs.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = weight.shape[2:], stride, padding, dilation
    x = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
    windows = x.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    height, width = windows.shape[1:3]
    windows = windows.permute(0, 1, 2, 4, 5, 3).reshape(x.shape[0] * height * width, -1)
    sums = int_matmul(windows, weight.permute(0, 2, 3, 1).flatten(1))
    return sums.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)


def _scaled(sums, activation_scale, weight_scale, bias, dtype):
    """Apply scales and bias, which broadcast over the int32 sums, in float32; return a contiguous tensor of `dtype`."""
    out = sums * activation_scale * weight_scale
    if bias is not None:
        out += bias.float()
    return out.to(dtype).contiguous()


def linear_int8(x, weight, bias):
    """Linear layer with 8-bit activations: x float [..., C], weight [O, C]; returns [..., O] in x's dtype."""
    values, scale = quantize_activation(x.reshape(-1, x.shape[-1]))
    sums = int_matmul(values, weight.values)
    return _scaled(sums, scale[:, None], weight.scale, bias, x.dtype).reshape(*x.shape[:-1], -1)


def conv2d_int8(x, weight, bias, stride, padding, dilation):
    """Conv2d (groups 1, zero padding) with 8-bit activations: x float [B, C, H, W]; returns [B, O, H', W'] likewise."""
    values, scale = quantize_activation(x)
    sums = conv2d_sums(values, weight.values, stride, padding, dilation)
    bias = None if bias is None else bias[:, None, None]
    return _scaled(sums, scale[:, None, None, None], weight.scale[:, None, None], bias, x.dtype)
