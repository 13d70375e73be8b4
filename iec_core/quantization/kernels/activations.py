"""Triton kernels that convert activations to int8: x divided by its scale, rounded half to even, within +-127.

Both kernels are limited by memory bandwidth. With a given scale, x is read once and written once. A scale computed from x needs
one more read. The output always has its channels last, because the product reads it so. The parameter LARGEST is the function
`largest`, or `largest_interpreted` in the interpreter.
"""

# The functions of this file are compiled by Triton, which gives their parameters types of its own.
# mypy: allow-untyped-defs

from __future__ import annotations  # tl.constexpr is not evaluated if Triton is missing

import contextlib

with contextlib.suppress(ImportError):  # an optional dependency, not available on every platform
    import triton.language as tl


def largest(x, axis: tl.constexpr):
    """Return the largest numbers of x along an axis."""
    return tl.max(x, axis)


def largest_interpreted(x, axis):
    """Return the same as `largest`, in the interpreter. `tl.max` only works there if it was enabled before Triton's import."""
    return tl.reduce(x, axis, tl.standard._elementwise_max)


def largest_kernel(x_ptr, largest_ptr, size, blocks, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Raise each number of `largest`, int32 [items], to the bits of the largest magnitude in its item of x, if they are higher.

    x: float [items, size].
    As integers, the bits of nonnegative floats have the same order as the floats, with infinity and then NaN above all others.
    """
    item = tl.program_id(0) // blocks
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + item.to(tl.int64) * size + place, mask=place < size, other=0.0)
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest_ptr + item, LARGEST(bits, 0))


def quantize_kernel(
    x_ptr, given_ptr, largest_ptr, scale_ptr, out_ptr,
    pixels, all_pixels, channels, blocks_c, item_stride, pixel_stride, channel_stride, scale_step,
    LARGEST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the tensor `out`, int8 [all_pixels, channels], and its scales, float32 [items]. Each item has `pixels` pixels.

    x: float, read by its strides. There are two cases. Either `given`, float32 of one number, is the scale: then the scales
    must already have this value, and the kernel sets those of items with non-finite values to NaN. Or `largest` has the output
    of `largest_kernel`: then the kernel computes and writes the scales. scale_step: 0 if all items share a scale, else 1.
    """
    pixel = tl.program_id(0) // blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    item, is_pixel = pixel // pixels, pixel < all_pixels
    inside = is_pixel[:, None] & (channel < channels)[None, :]
    source = item.to(tl.int64) * item_stride + (pixel % pixels).to(tl.int64) * pixel_stride
    x = tl.load(x_ptr + source[:, None] + channel.to(tl.int64)[None, :] * channel_stride, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if given_ptr is not None:
        scale = tl.load(given_ptr)
        bits = LARGEST(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        # Several programs may store NaN for an item, in any order: nothing else is stored there.
        nan = tl.full((BLOCK_P,), float("nan"), tl.float32)
        tl.store(scale_ptr + item * scale_step, nan, mask=is_pixel & (bits >= 0x7F800000))
        quotient = tl.div_rn(x, tl.broadcast_to(scale, (BLOCK_P, BLOCK_C)))
    else:
        bits = tl.load(largest_ptr + item * scale_step, mask=is_pixel, other=0)
        largest, limit = bits.to(tl.float32, bitcast=True), tl.full((BLOCK_P,), 127.0, tl.float32)
        scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, limit))
        scale = tl.where(bits >= 0x7F800000, float("nan"), scale)
        is_first = is_pixel & (pixel % pixels == 0) & (tl.program_id(0) % blocks_c == 0)
        tl.store(scale_ptr + item * scale_step, scale, mask=is_first)
        quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_P, BLOCK_C)))
    quotient = tl.clamp(quotient, -127.0, 127.0)
    # The sum with 1.5 * 2^23 has no bits for a fraction. So it is rounded to the nearest integer, ties to even, and its lowest
    # byte is that integer. This needs no conversion, and no library function, which the interpreter does not have.
    values = (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(out_ptr + pixel.to(tl.int64)[:, None] * channels + channel[None, :], values, mask=inside)
