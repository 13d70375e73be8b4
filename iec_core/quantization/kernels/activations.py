"""Triton kernels that turn activations into int8: x over its scale, rounded half to even, within +-127.

Both are bound by memory. A given scale takes one read and one write of x, one that is taken from x another read. The output has
its channels last, whichever layout x has, for that is what a product reads. LARGEST is `largest`,
compiled or interpreted as the kernels are.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where Triton is missing

import contextlib

with contextlib.suppress(ImportError):  # an optional dependency, which not every platform has
    import triton.language as tl


def largest(x, axis: tl.constexpr):
    """Return the largest numbers along an axis."""
    return tl.max(x, axis)


def largest_interpreted(x, axis):
    """Return the same in the interpreter, which runs `tl.max` only where it was asked for before Triton's import."""
    return tl.reduce(x, axis, tl.standard._elementwise_max)


def largest_kernel(x_ptr, largest_ptr, size, blocks, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Raise largest, int32 [items], to the bits of the largest magnitude in each item of x, float [items, size].

    As integers, the bits of floats without a sign are ordered as the floats are, with infinity and then NaN above all.
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
    """Write out, int8 [all_pixels, channels], and its scales, float32 [items]; an item has `pixels` of all the pixels.

    x: float, by its strides. Either given, float32 of one number, is the scale; then the scales hold it already, and those of
    items that are not finite become NaN. Or largest is, as `largest_kernel` leaves it; then the scales are written. scale_step:
    0 where all items share a scale.
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
        # Stores of one number in any order: what else the item has does not matter then.
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
    # Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to the nearest integer, ties to even, and its lowest
    # byte is that integer. This needs no conversion and no library function, which the interpreter lacks.
    values = (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(out_ptr + pixel.to(tl.int64)[:, None] * channels + channel[None, :], values, mask=inside)
