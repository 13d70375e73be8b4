"""Layers with 8-bit activations, in exact integer arithmetic.

Activations are symmetric. Their scales are taken at run time: one for each row (token, or pixel of a 1 x 1 convolution), and
one for each batch item where a convolution's window mixes pixels, so that no item depends on its neighbours in the batch; or
one for the whole tensor. Or they are given, from a calibration. Products are summed in int32, exactly; only then are the two
scales and the bias applied, in float32.

No integer stands for NaN or infinity. What has one gets NaN for its scale, and so for what comes out.
"""

import time

import torch

from ..devices import once_a_device
from .kernels import launch, operators
from .packing import LIMITS, rotate

try:
    import comfy_kitchen
    from comfy_kitchen.registry import registry as kitchen
except ImportError:  # without it the products are Triton's or PyTorch's
    kitchen = None

LIMIT = LIMITS["int8"]
EXACT = 1024  # so many products of int8 sum up to less than 2^24, below which float32 has every integer
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
    that of all of x. Zeros get scale 1, and what is not finite NaN.
    """
    largest = _largest(x, kept)
    largest = largest + (largest - largest)  # of infinity NaN, else nothing
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


@once_a_device
def uses_int_mm(device):
    """Tell whether products are torch._int_mm's on a device: it is exact there and, on a processor, faster than products in
    float32. Without instructions for dot products of int8 it takes 25 times as long.
    """
    if not has_exact_int_mm(device):
        return False
    if device.type != "cpu":
        return True
    a, b = (torch.ones(128, 1024, dtype=torch.int8) for _ in range(2))
    return _seconds(lambda: torch._int_mm(a, b.t())) < _seconds(lambda: _float_matmul(a, b))


def _seconds(compute):
    """Return the shortest time that it takes, of a few."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        compute()
        times.append(time.perf_counter() - begin)
    return min(times)


def _float_matmul(a, b):
    """Return what `int_matmul` does, from products in float32, of so many at once that their sums are exact."""
    parts = zip(a.split(EXACT, dim=1), b.split(EXACT, dim=1))
    return sum((part_a.float() @ part_b.float().t()).to(torch.int32) for part_a, part_b in parts)


def int_matmul(a, b):
    """Return a @ b.T in int32, exactly: a int8 [M, K], b int8 [N, K]."""
    if not uses_int_mm(a.device):
        return _float_matmul(a, b)
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


def linear_int8(x, values, weight_scale, bias, scale=None, per_tensor=False, rotation=0, backend=None):
    """Linear layer with 8-bit activations: x float [..., C], values int8 [O, C], weight_scale float32 [O]; returns [..., O] in
    x's dtype. scale: the activations' where it is given, a tensor of one number. rotation: size of the blocks by which x is to
    be rotated first, as the weight is, 0 for none. backend: what `linear_backend` returns, or None to ask it.
    """
    backend = backend or linear_backend(x.device, scale is None and not per_tensor, *values.shape)
    if backend == KITCHEN and x.numel() and x.dtype in KITCHEN_DTYPES:
        return _linear_kitchen(x, values, weight_scale, bias, rotation)
    (outputs, inputs), turned = values.shape, x
    if rotation:
        turned = rotate(x.float(), rotation)  # sums of float16 could overflow
    if backend == TRITON:  # a convolution of as many images of one pixel
        pixels, kernel = turned.reshape(-1, inputs, 1, 1), values.view(outputs, 1, 1, inputs)
        geometry = (1, 1), (0, 0), (1, 1)
        out = operators.conv2d_int8(pixels, scale, per_tensor, kernel, weight_scale, bias, *geometry, x.dtype)
    else:
        rows = turned.reshape(-1, inputs)
        scale = dynamic_scale(rows, kept=not per_tensor) if scale is None else given_scale(rows, scale)
        out = _scaled(int_matmul(quantize_activation(rows, scale), values), scale, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], outputs)


def _linear_kitchen(x, values, weight_scale, bias, rotation):
    """Its kernels turn NaN and infinity into numbers. One makes all of the output NaN here, for rows of it alone would cost
    more. A sum sees either in a single read.
    """
    weight_scale = torch.add(weight_scale, x.sum(dtype=torch.float32), alpha=0)
    turned = bool(rotation), rotation or 256
    if torch.compiler.is_compiling():  # the operator takes 16 microseconds more
        code = KITCHEN_DTYPES[x.dtype]
        return torch.ops.comfy_kitchen.int8_linear(x.contiguous(), values, weight_scale, bias, code, *turned)
    return comfy_kitchen.int8_linear(x.contiguous(), values, weight_scale, bias, x.dtype, *turned)


def is_pointwise(kernel_size, stride, padding):
    """Tell whether a convolution is a Linear layer over pixels."""
    return (*kernel_size, *stride, *padding) == (1, 1, 1, 1, 0, 0)


def conv2d_int8(
    x, values, weight_scale, bias, kernel_size, stride, padding, dilation, scale=None, per_tensor=False, backend=None
):  # fmt: skip
    """Conv2d (groups 1, zero padding) with 8-bit activations: x float [B, C, H, W], values int8 [O, kh * kw * C], weight_scale
    float32 [O]; returns [B, O, H', W'] in x's dtype. scale: as in `linear_int8`. backend: what `conv_backend` returns, for a
    pointwise layer `linear_backend`, or None to ask them.
    """
    if is_pointwise(kernel_size, stride, padding):
        rows = x.permute(0, 2, 3, 1)
        return linear_int8(rows, values, weight_scale, bias, scale, per_tensor, 0, backend).permute(0, 3, 1, 2)
    backend, kernel = backend or conv_backend(x.device), values.view(values.shape[0], *kernel_size, -1)
    if backend == TRITON:
        return operators.conv2d_int8(
            x, scale, per_tensor, kernel, weight_scale, bias, stride, padding, dilation, x.dtype
        )  # fmt: skip
    scale = dynamic_scale(x, kept=not per_tensor) if scale is None else given_scale(x, scale)
    sums = conv2d_sums(quantize_activation(x, scale), values, kernel_size, stride, padding, dilation)
    bias = None if bias is None else bias[:, None, None]
    return _scaled(sums, scale, weight_scale[:, None, None], bias, x.dtype)


KITCHEN, TRITON, WEIGHT_ONLY = "comfy-kitchen int8_linear", "Triton implicit GEMM", "dequantized weight"
INT_MM, FLOAT_PRODUCTS = "torch._int_mm", "exact products in float32"


def kitchen_backends():
    """Return the names of comfy-kitchen's backends that have kernels for int8 and may be used, [] where there is none."""
    known = {} if kitchen is None else kitchen.list_backends()
    usable = [name for name, one in known.items() if name != "eager" and one["available"] and not one["disabled"]]
    return [name for name in usable if "int8_linear" in known[name]["capabilities"]]


@once_a_device
def has_kitchen(device):
    """Tell whether comfy-kitchen has kernels for int8 on a device: its operator is there without any too, and slower then than
    PyTorch's product.
    """
    return device.type == "cuda" and hasattr(torch.ops.comfy_kitchen, "int8_linear") and bool(kitchen_backends())


def _products(device):
    return INT_MM if uses_int_mm(device) else FLOAT_PRODUCTS


def linear_backend(device, per_row, outputs, inputs):
    """Return what computes a Linear layer of 8-bit activations and of these sizes in integers, or that nothing does at a speed
    that would make up for it; per_row: with a scale for each row, taken at run time. comfy-kitchen does not look at the sizes,
    and its kernels read 16 inputs at a time, and cuBLASLt 8 outputs.
    """
    if per_row and inputs % 16 == 0 and outputs % 8 == 0 and has_kitchen(device):
        return KITCHEN
    if launch.is_available(device):
        return TRITON
    return _products(device) if torch.device(device).type == "cpu" or uses_int_mm(device) else WEIGHT_ONLY


def conv_backend(device):
    """Return what computes a Conv2d layer whose window mixes pixels. Windows are gathered on a CPU alone, where that pays: they
    take as many times the memory of an image as they have pixels.
    """
    if launch.is_available(device):
        return TRITON
    return f"gathered windows, {_products(device)}" if torch.device(device).type == "cpu" else WEIGHT_ONLY
