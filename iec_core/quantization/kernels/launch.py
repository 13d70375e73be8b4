"""Launch the Triton kernels: check where they can run, and choose their grids and arguments."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...devices import is_out_of_memory, once_a_device
from ...errors import ModelError
from ...log import logger
from . import activations, products, tiles

try:
    import triton
except ImportError:  # an optional dependency, not available on every platform
    triton = None

# Arguments that vary with the resolution and the batch. A kernel that is compiled once for a tile works for all their values.
# Numbers of pixels are not listed: kernels are specialized for multiples of 16, so that memory is accessed contiguously.
NOT_SPECIALIZED: dict[Callable[..., None], tuple[str, ...]] = {
    activations.largest_kernel: ("blocks",),
    activations.quantize_kernel: ("blocks_c", "scale_step"),
    products.conv2d_kernel: (
        "height", "width", "out_width",
        "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "scale_step",
    ),
    products.add_up_kernel: ("blocks_n", "scale_step"),
}  # fmt: skip
LARGEST_BLOCK, QUANTIZE_BLOCK = 8192, 4096  # elements per program
ADD_UP_BLOCK = 32, 64  # rows, outputs


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def jitted(kernel: Callable[..., Any], interpreted: bool) -> Any:
    """Return Triton's JITFunction of a kernel, which can be launched. Triton reads TRITON_INTERPRET here, at the first launch,
    not at import.
    """
    # A given scale may be any element of a table, so its alignment varies.
    return triton.jit(
        kernel, do_not_specialize=list(NOT_SPECIALIZED.get(kernel, ())), do_not_specialize_on_alignment=["given_ptr"]
    )


def _kernel(kernel: Callable[..., None]) -> Any:
    return jitted(kernel, _interpreted())


def _maximum() -> Callable[..., Any]:
    return activations.largest_interpreted if _interpreted() else jitted(activations.largest, False)


def is_available(device: torch.device | str) -> bool:
    """Return whether Triton is installed and compiles or interprets the kernels for a device, such as "cuda"."""
    if _interpreted():
        return triton is not None
    return torch.device(device).type != "cpu" and compiles(device)


@once_a_device
def compiles(device: torch.device) -> bool:
    """Return whether Triton compiles the kernels for a device, and they compute correctly. If not, log the reason."""
    reason = _why_not(device)
    if not reason:
        try:
            reason = "" if _computes(device) else "its compiled kernels compute wrong results"
        except Exception as error:  # any class: a C compiler or Python's headers may be missing
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    if reason:
        logger.warning(
            f"On {device}, convolutions with 8-bit activations are computed in the model's own type, from dequantized "
            "weights. The stored weights stay small, but these convolutions are not faster than unquantized ones. Triton's "
            f"int8 kernels cannot be used: {reason}."
        )
    return not reason


def _why_not(device: torch.device) -> str:
    """Return the reason why a device is not tried; "" if it is."""
    if device.type != "cuda" or torch.version.hip:
        return "they are only for NVIDIA's GPUs"
    if triton is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"they need compute capability 8.0, and this GPU has {major}.{minor}"


def _computes(device: torch.device) -> bool:
    """Return whether the kernels give the right result for a small convolution whose result is known."""
    x = torch.full((1, 32, 4, 4), 1.0, dtype=torch.float16, device=device)
    weight = torch.full((32, 3, 3, 32), 2, dtype=torch.int8, device=device)
    ones, same = torch.ones(32, device=device), ((1, 1), (1, 1), (1, 1))
    with torch.cuda.device_of(x):
        for given, expected in ((torch.full((1,), 0.25, device=device), 4), (None, 127)):
            values, scale = quantized(x, given, False)
            tile, _ = _plan(tiles.Product(16, 32, 32, 9), device)
            for splits in (1, 3):
                out = conv2d(values, scale, weight, ones, ones, *same, torch.float32, False, (tile, splits))[0]
                sums = (out - 1) / scale
                if not ((sums[:, 1, 1] - expected * 2 * 32 * 9).abs() < 0.5).all():
                    return False
                # Four taps of a corner are inside the image.
                if not ((sums[:, 0, 0] - expected * 2 * 32 * 4).abs() < 0.5).all():
                    return False
    return True


def quantized(x: torch.Tensor, scale: torch.Tensor | None, per_tensor: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values int8 [B, H, W, C], scales float32 [B]) of x, float [B, C, H, W]. If no scale is given, per_tensor makes
    the scales [1], one for the whole tensor. scale: given scale, float32 of one number, or None to compute it from x. The
    scale of an item with a non-finite value is NaN.
    """
    x = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    batch, channels, height, width = x.shape
    values = torch.empty((batch, height, width, channels), dtype=torch.int8, device=x.device)
    count = 1 if per_tensor and scale is None else batch
    if scale is None:
        scales, largest = torch.empty(count, dtype=torch.float32, device=x.device), _largest(x, count)
    else:
        scale = scale.reshape(1).float()
        scales, largest = scale.repeat(count), None
    is_last = x.stride(1) == 1 and channels > 1
    (block_p, block_c), pixels = quantize_blocks(channels, is_last), height * width
    blocks_c = triton.cdiv(channels, block_c)
    strides = (pixels * channels, channels, 1) if is_last else (pixels * channels, 1, pixels)
    _kernel(activations.quantize_kernel)[(triton.cdiv(batch * pixels, block_p) * blocks_c,)](
        x, scale, largest, scales, values, pixels, batch * pixels, channels, blocks_c, *strides, int(count > 1),
        LARGEST=_maximum(), BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return values, scales


def quantize_blocks(channels: int, channels_last: bool) -> tuple[int, int]:
    """Return (pixels, channels) per program that quantizes an input. channels: of the input. channels_last: whether they are
    last in its memory.
    """
    block_c = min(256 if channels_last else 64, triton.next_power_of_2(channels))
    return QUANTIZE_BLOCK // block_c, block_c


def _largest(x: torch.Tensor, items: int) -> torch.Tensor:
    largest = torch.zeros(items, dtype=torch.int32, device=x.device)
    size = x.numel() // items
    block = min(LARGEST_BLOCK, triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block)
    _kernel(activations.largest_kernel)[(items * blocks,)](x, largest, size, blocks, LARGEST=_maximum(), BLOCK=block)
    return largest


def _plan(product: tiles.Product, device: torch.device) -> tuple[tiles.Tile, int]:
    """Return (Tile, splits) for a Product on a device."""
    if _interpreted():
        return tiles.INTERPRETED, 1
    properties = torch.cuda.get_device_properties(device)
    return _chosen(product, 10 * properties.major + properties.minor, properties.multi_processor_count)


_chosen = functools.cache(tiles.choose)


def output_size(
    height: int, width: int, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return (H', W') of the convolution of an image [.., height, width] with weight [O, kh, kw, C]."""
    sizes = zip((height, width), weight.shape[1:3], stride, padding, dilation)
    rows, columns = ((size + 2 * p - d * (kernel - 1) - 1) // s + 1 for size, kernel, s, p, d in sizes)
    return rows, columns


def empty_output(
    batch: int, channels: int, height: int, width: int, channels_last: bool, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return an uninitialized tensor [B, C, H, W] on the device of `like`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((batch, channels, height, width), dtype=dtype, device=like.device, memory_format=layout)


def conv2d(
    values: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
    channels_last: bool,
    plan: tuple[tiles.Tile, int] | None = None,
) -> torch.Tensor:
    """Return the convolution [B, O, H', W'] of values int8 [B, H, W, C], scale float32 [B] or [1], with weight int8
    [O, kh, kw, C], weight_scale float32 [O] and bias float [O] or None. Without weight_scale, return the int32 sums.

    plan: (Tile, splits) to use instead of the automatic choice. Raises ModelError for shapes that do not fit together.
    """
    (batch, height, width, channels), (outputs, kernel_h, kernel_w, deep) = values.shape, weight.shape
    if deep != channels or scale.numel() not in (1, batch):  # the kernel would read out of bounds
        shapes = [tuple(tensor.shape) for tensor in (values, weight, scale)]
        raise ModelError(f"x {shapes[0]}, weight {shapes[1]} and activation scale {shapes[2]} do not fit together")
    size = output_size(height, width, weight, stride, padding, dilation)
    out = empty_output(batch, outputs, *size, channels_last, values, out_dtype)
    product = tiles.Product(batch * size[0] * size[1], outputs, channels, kernel_h * kernel_w)
    tile, splits = plan or _plan(product, values.device)
    vectors = [None if one is None else one.contiguous() for one in (scale, weight, weight_scale, bias)]
    target, scaling = out, vectors
    if splits > 1:
        target = torch.empty((splits, product.rows, outputs), dtype=torch.int32, device=out.device)
        scaling = [vectors[0], vectors[1], None, None]
    scale_step = int(scale.numel() > 1)
    _kernel(products.conv2d_kernel)[(product.programs(tile), splits)](
        values, *scaling, target, product.rows, size[0] * size[1], height, width, size[1], outputs, *stride, *padding,
        *dilation, scale_step, CHANNELS=channels, KERNEL_H=kernel_h, KERNEL_W=kernel_w, PADDED=any(padding),
        CHANNELS_LAST=channels_last or splits > 1, WIDE=target.numel() >= 2**31, SPLITS=splits,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tiles.GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _add_up(target, vectors, out, size[0] * size[1], scale_step, channels_last)
    return out


def _add_up(
    sums: torch.Tensor,
    vectors: list[torch.Tensor | None],
    out: torch.Tensor,
    pixels: int,
    scale_step: int,
    channels_last: bool,
) -> None:
    """Add up the sums of splits, int32 [splits, rows, O], into out. vectors: scale, weight, weight_scale and bias of
    `conv2d`.
    """
    (splits, rows, outputs), (block_m, block_n) = sums.shape, ADD_UP_BLOCK
    blocks_n = triton.cdiv(outputs, block_n)
    scale, _, weight_scale, bias = vectors
    _kernel(products.add_up_kernel)[(triton.cdiv(rows, block_m) * blocks_n,)](
        sums, scale, weight_scale, bias, out, rows, pixels, outputs, blocks_n, scale_step,
        CHANNELS_LAST=channels_last, SPLITS=splits, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
