"""Layers with 8-bit activations, in exact integer arithmetic.

Activations are symmetric. Their scales are taken at run time: one for each row (token, or pixel of a 1 x 1 convolution), and
one for each batch item where a convolution's window mixes pixels, so that no item depends on its neighbours in the batch; or
one for the whole tensor. Or they are given, from a calibration. Products are summed in int32, exactly; only then are the two
scales and the bias applied, in float32.

No integer stands for NaN or infinity. What has one gets NaN for its scale, and so for what comes out.
"""

import contextlib

import torch

from . import conv_triton
from .devices import has_float64, once_a_device
from .quantization import LIMITS, rotate

with contextlib.suppress(ImportError):  # without it the products are PyTorch's
    import comfy_kitchen  # noqa: F401 - registers its operators
HAS_KITCHEN = hasattr(torch.ops.comfy_kitchen, "int8_linear")  # early versions have none

LIMIT = LIMITS["int8"]
KITCHEN_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _largest(x, kept):
    """Return float32 [R, 1, ...] for x [R, ...]: the largest magnitude of each item of dimension 0, with kept; else that of all
    of x. NaN where there is a NaN.
    """
    items = x.flatten(1) if kept else x.flatten()[None]
    largest = torch.maximum(items.amax(1), -items.amin(1)) if x.numel() else items.new_zeros(len(items))
    return largest.float().reshape(-1, *[1] * (x.ndim - 1))


def dynamic_scale(x, kept):
    """Return float32 [R, 1, ...] for x [R, ...]: the largest magnitude of each item of dimension 0 over 127, with kept; else
    that of all of x. Zeros get scale 1.
    """
    largest = _largest(x, kept)
    return torch.where(largest == 0, torch.ones_like(largest), largest / LIMIT)


def given_scale(x, scale):
    """Return a scale that is given, a tensor of one number, for x [R, ...] as float32 [R, 1, ...]: NaN where an item of
    dimension 0 is not finite throughout.
    """
    return torch.where(_largest(x, kept=True).isfinite(), scale.float().reshape(()), torch.nan)


def quantize_activation(x, scale):
    """Return x over scale, which broadcasts, rounded to int8 within +-127."""
    return (x.float() / scale).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)


@once_a_device
def has_exact_int_mm(device):
    """Tell whether torch._int_mm on a device exists and is exact at the extremes of int8.

    Some processors without a dot-product instruction sum pairs of products in 16 bits, which saturates.
    """
    a = torch.full((32, 1024), -127, dtype=torch.int8, device=device)
    return (torch._int_mm(a, a.t()) == 127 * 127 * 1024).all()


def int_matmul(a, b):
    """Return a @ b.T in int32, exactly: a int8 [M, K], b int8 [N, K]."""
    if not has_exact_int_mm(a.device):
        wide = torch.float64 if has_float64(a.device) else torch.float32
        parts = zip(a.split(1024, dim=1), b.split(1024, dim=1))  # 1024 * 127^2 < 2^24: exact in float32 too
        return sum((part_a.to(wide) @ part_b.to(wide).t()).to(torch.int32) for part_a, part_b in parts)
    a = a.contiguous()  # cuBLASLt wants rows one after the other
    rows, columns = a.shape[0], b.shape[0]
    if a.device.type == "cuda":  # cuBLASLt: more than 16 rows, K and N in eights
        pad = torch.nn.functional.pad
        depth = -a.shape[1] % 8
        a = pad(a, (0, depth, 0, max(0, 17 - rows)))
        b = pad(b, (0, depth, 0, -columns % 8))
    return torch._int_mm(a, b.t())[:rows, :columns]


def conv2d_sums(x, weight, kernel_size, stride, padding, dilation):
    """Return the convolution (groups 1, zero padding) of int8 x [B, C, H, W] and int8 weight [O, kh * kw * C], exactly, as
    int32 [B, O, H', W'].

    An implicit matrix product over gathered windows. Channels come last within a window, so that memory is read in runs.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    x = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
    windows = x.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    height, width = windows.shape[1:3]
    windows = windows.permute(0, 1, 2, 4, 5, 3).reshape(x.shape[0] * height * width, weight.shape[1])
    sums = int_matmul(windows, weight)
    return sums.reshape(x.shape[0], height, width, len(weight)).permute(0, 3, 1, 2)


def _scaled(sums, activation_scale, weight_scale, bias, dtype):
    """Apply scales and bias, which broadcast over the int32 sums, in float32; return a contiguous tensor of `dtype`."""
    out = sums * activation_scale * weight_scale
    if bias is not None:
        out += bias.float()
    return out.to(dtype).contiguous()


def linear_int8(x, values, weight_scale, bias, scale=None, per_tensor=False, rotation=0):
    """Linear layer with 8-bit activations: x float [..., C], values int8 [O, C], weight_scale float32 [O]; returns [..., O] in
    x's dtype. scale: the activations' where it is given, a tensor of one number. rotation: size of the blocks by which x is to
    be rotated first, as the weight is, 0 for none.
    """
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    backend = linear_backend(x.device, scale is None and not per_tensor, *values.shape)
    if backend == KITCHEN and rows.numel() and x.dtype in KITCHEN_DTYPES:
        # Its kernels take no notice of NaN. One makes all of the output NaN here, for rows of it alone would cost more.
        weight_scale = weight_scale + 0 * _largest(rows, kept=False).reshape(())
        turned = bool(rotation), rotation or 256
        out = torch.ops.comfy_kitchen.int8_linear(rows, values, weight_scale, bias, KITCHEN_DTYPES[x.dtype], *turned)
    else:
        rows = rotate(rows.float(), rotation) if rotation else rows  # sums of float16 could overflow
        scale = dynamic_scale(rows, kept=not per_tensor) if scale is None else given_scale(rows, scale)
        out = _scaled(int_matmul(quantize_activation(rows, scale), values), scale, weight_scale, bias, x.dtype)
    return out.reshape(*x.shape[:-1], len(values))


def is_pointwise(kernel_size, stride, padding):
    """Tell whether a convolution is a Linear layer over pixels."""
    return (*kernel_size, *stride, *padding) == (1, 1, 1, 1, 0, 0)


def conv2d_int8(x, values, weight_scale, bias, kernel_size, stride, padding, dilation, scale=None, per_tensor=False):
    """Conv2d (groups 1, zero padding) with 8-bit activations: x float [B, C, H, W], values int8 [O, kh * kw * C], weight_scale
    float32 [O]; returns [B, O, H', W'] in x's dtype. scale: as in `linear_int8`.
    """
    if is_pointwise(kernel_size, stride, padding):
        return linear_int8(x.permute(0, 2, 3, 1), values, weight_scale, bias, scale, per_tensor).permute(0, 3, 1, 2)
    scale = dynamic_scale(x, kept=not per_tensor) if scale is None else given_scale(x, scale)
    if conv_backend(x.device) == TRITON:
        kernel = values.view(values.shape[0], *kernel_size, -1)
        return conv_triton.conv2d_int8(
            x, scale.reshape(-1), kernel, weight_scale, bias, stride, padding, dilation, x.dtype
        )  # fmt: skip
    sums = conv2d_sums(quantize_activation(x, scale), values, kernel_size, stride, padding, dilation)
    bias = None if bias is None else bias[:, None, None]
    return _scaled(sums, scale, weight_scale[:, None, None], bias, x.dtype)


KITCHEN, TRITON = "comfy-kitchen int8_linear", "Triton implicit GEMM"


def _products(device):
    return "torch._int_mm" if has_exact_int_mm(device) else "exact products in floating point"


def linear_backend(device, per_row, outputs, inputs):
    """Return what computes a Linear layer of 8-bit activations and of these sizes; per_row: with a scale for each row, taken at
    run time. comfy-kitchen does not look at the sizes, and its kernels read 16 inputs at a time, and cuBLASLt 8 outputs.
    """
    fits = inputs % 16 == 0 and outputs % 8 == 0
    usable = HAS_KITCHEN and per_row and fits and torch.device(device).type == "cuda"
    return KITCHEN if usable else _products(device)


def conv_backend(device):
    """Return what computes a Conv2d layer whose window mixes pixels."""
    return TRITON if conv_triton.is_available(device) else f"gathered windows, {_products(device)}"
