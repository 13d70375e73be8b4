"""Layers with 8-bit activations, in exact integer arithmetic.

Activations are quantized symmetrically. Their scales are given, from a calibration, or computed at run time. At run time there
is one scale per row (token, or pixel of a 1 x 1 convolution). Where a convolution's window mixes pixels, there is one scale per
batch item, so that no item depends on the other items in the batch. With `per_tensor`, there is one scale for the whole tensor
instead. Products are summed exactly, in int32. Then the scales of activations and weights and the bias are applied, in float32.

No integer represents NaN or infinity. A row or item with a non-finite value gets the scale NaN, so that its output is NaN.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..devices import once_a_device
from .kernels import launch, operators
from .packing import LIMITS, rotate

try:
    import comfy_kitchen
    from comfy_kitchen.registry import registry as kitchen
except ImportError:  # without it, Triton or PyTorch computes the products
    kitchen = None

LIMIT = LIMITS["int8"]
EXACT = 1024  # number of int8 products whose sum is always below 2^24; float32 represents every integer below
KITCHEN_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # comfy-kitchen's codes


def _largest(x: torch.Tensor, kept: bool) -> torch.Tensor:
    """Return the largest magnitudes of x [R, ...] as float32: with `kept` one per item of dimension 0, [R, 1, ...]; else one of
    the whole tensor, [1, 1, ...]. A NaN in x gives NaN.
    """
    items = x.flatten(1) if kept else x.flatten()[None]
    largest = torch.maximum(items.amax(1), -items.amin(1)) if x.numel() else items.new_zeros(len(items))
    return largest.float().reshape(-1, *[1] * (x.ndim - 1))


def dynamic_scale(x: torch.Tensor, kept: bool) -> torch.Tensor:
    """Return the scales of x [R, ...] as float32, the largest magnitudes divided by 127: with `kept` one per item of dimension
    0, [R, 1, ...]; else one for the whole tensor, [1, 1, ...]. Zeros get the scale 1, non-finite values NaN.
    """
    largest = _largest(x, kept)
    largest = largest + (largest - largest)  # infinity becomes NaN, other values stay unchanged
    return torch.where(largest == 0, torch.ones_like(largest), largest / LIMIT)


def given_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a given scale, a tensor of one number, for x [R, ...] as float32 [R, 1, ...]: NaN for items of dimension 0 that
    have a non-finite value.
    """
    return torch.where(_largest(x, kept=True).isfinite(), scale.float().reshape(()), torch.nan)


def quantize_activation(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x divided by the scale, which broadcasts, rounded to int8 within +-127."""
    return (x.float() / scale).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)


@once_a_device
def has_exact_int_mm(device: torch.device) -> bool:
    """Return whether torch._int_mm works on a device and is exact at the extremes of int8.

    Some processors without a dot-product instruction sum pairs of products in 16 bits, which saturates.
    """
    a = torch.full((32, 1024), -127, dtype=torch.int8, device=device)
    return bool((torch._int_mm(a, a.t()) == 127 * 127 * 1024).all())


@once_a_device
def uses_int_mm(device: torch.device) -> bool:
    """Return whether torch._int_mm computes the products on a device: it must be exact there and, on a CPU, faster than
    products in float32. On a CPU without int8 dot-product instructions it takes 25 times as long.
    """
    if not has_exact_int_mm(device):
        return False
    if device.type != "cpu":
        return True
    a, b = (torch.ones(128, 1024, dtype=torch.int8) for _ in range(2))
    return _seconds(lambda: torch._int_mm(a, b.t())) < _seconds(lambda: _float_matmul(a, b))


def _seconds(compute: Callable[[], object]) -> float:
    """Return the shortest duration of a few calls, in seconds."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        compute()
        times.append(time.perf_counter() - begin)
    return min(times)


def _float_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the same as `int_matmul`, from products in float32. Blocks of EXACT inputs keep the sums exact."""
    parts = zip(a.split(EXACT, dim=1), b.split(EXACT, dim=1))
    return sum((part_a.float() @ part_b.float().t()).to(torch.int32) for part_a, part_b in parts)


def int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b.T exactly, int32 [M, N], for a int8 [M, K] and b int8 [N, K]."""
    if not uses_int_mm(a.device):
        return _float_matmul(a, b)
    a = a.contiguous()  # cuBLASLt needs contiguous rows
    rows, columns = a.shape[0], b.shape[0]
    if a.device.type == "cuda":  # cuBLASLt needs more than 16 rows, and K and N divisible by 8
        pad = torch.nn.functional.pad
        depth = -a.shape[1] % 8
        a = pad(a, (0, depth, 0, max(0, 17 - rows)))
        b = pad(b, (0, depth, 0, -columns % 8))
    return torch._int_mm(a, b.t())[:rows, :columns]


def conv2d_sums(
    x: torch.Tensor,
    weight: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """Return the exact convolution (groups 1, zero padding) of int8 x [B, C, H, W] with int8 weight [O, kh * kw * C], as int32
    [B, O, H', W'].

    It is a matrix product with the gathered windows. Channels come last within a window, so that memory is read contiguously.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    x = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
    windows = x.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    height, width = windows.shape[1:3]
    windows = windows.permute(0, 1, 2, 4, 5, 3).reshape(x.shape[0] * height * width, weight.shape[1])
    sums = int_matmul(windows, weight)
    return sums.reshape(x.shape[0], height, width, len(weight)).permute(0, 3, 1, 2)


def _scaled(
    sums: torch.Tensor,
    activation_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return int32 sums times the scales plus the bias, computed in float32, as a contiguous tensor of `dtype`. Scales and bias
    broadcast over the sums.
    """
    out = sums * activation_scale * weight_scale
    if bias is not None:
        out += bias.float()
    return out.to(dtype).contiguous()


def linear_int8(
    x: torch.Tensor,
    values: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None = None,
    per_tensor: bool = False,
    rotation: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute a Linear layer with 8-bit activations and return [..., O] in the dtype of x.

    x: float [..., C]. values: int8 [O, C]. weight_scale: float32 [O]. bias: float [O] or None. scale: given scale of the
    activations, a tensor of one number; None to compute it from x, per row or, with per_tensor, for the whole tensor. rotation:
    block size by which x must be rotated first, as the weight is, 0 for none. backend: a result of `linear_backend`; None to
    call it.
    """
    backend = backend or linear_backend(x.device, scale is None and not per_tensor, *values.shape)
    if backend == KITCHEN and x.numel() and x.dtype in KITCHEN_DTYPES:
        return _linear_kitchen(x, values, weight_scale, bias, rotation)
    (outputs, inputs), turned = values.shape, x
    if rotation:
        turned = rotate(x.float(), rotation)  # sums in float16 could overflow
    if backend == TRITON:  # a convolution of images of one pixel
        pixels, kernel = turned.reshape(-1, inputs, 1, 1), values.view(outputs, 1, 1, inputs)
        geometry = (1, 1), (0, 0), (1, 1)
        out = operators.conv2d_int8(pixels, scale, per_tensor, kernel, weight_scale, bias, *geometry, x.dtype)
    else:
        rows = turned.reshape(-1, inputs)
        scale = dynamic_scale(rows, kept=not per_tensor) if scale is None else given_scale(rows, scale)
        out = _scaled(int_matmul(quantize_activation(rows, scale), values), scale, weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], outputs)


def _linear_kitchen(
    x: torch.Tensor, values: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, rotation: int
) -> torch.Tensor:
    """Compute `linear_int8` with comfy-kitchen. Any non-finite value in x makes the whole output NaN.

    The kernels turn NaN and infinity into finite numbers. So NaN is added to the weight scales here: the sum of x finds NaN and
    infinity in a single read. NaN only in the affected rows would cost more.
    """
    weight_scale = torch.add(weight_scale, x.sum(dtype=torch.float32), alpha=0)
    turned = bool(rotation), rotation or 256
    if torch.compiler.is_compiling():  # a call of the operator takes 16 microseconds longer
        code = KITCHEN_DTYPES[x.dtype]
        return torch.ops.comfy_kitchen.int8_linear(x.contiguous(), values, weight_scale, bias, code, *turned)
    return comfy_kitchen.int8_linear(x.contiguous(), values, weight_scale, bias, x.dtype, *turned)


def is_pointwise(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Return whether a convolution is the same as a Linear layer applied to each pixel."""
    return (*kernel_size, *stride, *padding) == (1, 1, 1, 1, 0, 0)


def conv2d_int8(
    x: torch.Tensor,
    values: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    scale: torch.Tensor | None = None,
    per_tensor: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute a Conv2d layer (groups 1, zero padding) with 8-bit activations and return [B, O, H', W'] in the dtype of x.

    x: float [B, C, H, W]. values: int8 [O, kh * kw * C]. weight_scale: float32 [O]. bias: float [O] or None. scale: given scale
    of the activations, a tensor of one number; None to compute it from x, per item (a pointwise layer: per pixel) or, with
    per_tensor, for the whole tensor. backend: a result of `conv_backend`, for a pointwise layer of `linear_backend`; None to
    call them.
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


def kitchen_backends() -> list[str]:
    """Return the names of comfy-kitchen's enabled backends with int8 kernels; [] if there are none."""
    known: dict[str, dict[str, Any]] = {} if kitchen is None else kitchen.list_backends()
    usable = [name for name, one in known.items() if name != "eager" and one["available"] and not one["disabled"]]
    return [name for name in usable if "int8_linear" in known[name]["capabilities"]]


@once_a_device
def has_kitchen(device: torch.device) -> bool:
    """Return whether comfy-kitchen has int8 kernels on a device. Its operator also exists without kernels, but is then slower
    than PyTorch's product.
    """
    return device.type == "cuda" and hasattr(torch.ops.comfy_kitchen, "int8_linear") and bool(kitchen_backends())


def _products(device: torch.device) -> str:
    return INT_MM if uses_int_mm(device) else FLOAT_PRODUCTS


def linear_backend(device: torch.device, per_row: bool, outputs: int, inputs: int) -> str:
    """Return the name of the backend that computes a Linear layer with 8-bit activations, or WEIGHT_ONLY if integer products
    would not be faster on this device. per_row: whether each row has its own scale, computed at run time.

    comfy-kitchen does not check sizes. Its kernels need inputs divisible by 16, and cuBLASLt needs outputs divisible by 8.
    """
    if per_row and inputs % 16 == 0 and outputs % 8 == 0 and has_kitchen(device):
        return KITCHEN
    if launch.is_available(device):
        return TRITON
    return _products(device) if torch.device(device).type == "cpu" or uses_int_mm(device) else WEIGHT_ONLY


def conv_backend(device: torch.device) -> str:
    """Return the name of the backend that computes a Conv2d layer whose window mixes pixels, or WEIGHT_ONLY. Gathered windows
    are used on a CPU only, where they are worth their memory: kh * kw times that of the image.
    """
    if launch.is_available(device):
        return TRITON
    return f"gathered windows, {_products(device)}" if torch.device(device).type == "cpu" else WEIGHT_ONLY
