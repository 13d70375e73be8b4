"""Triton kernels that multiply int8: a Conv2d layer as an implicit matrix product. A Linear layer is a special case of it.

The im2col matrix is never written. Each program computes a tile of out [rows, O], where rows = B * H' * W' are the pixels of
the output. It loops over the taps of the window and over blocks of channels. Sums are exact, in int32. Scales and bias are
applied in float32 when the tile is stored. If a layer has too few tiles to keep a GPU busy, several programs share the loop of
a tile, and a second kernel adds their sums up.
"""

# The functions of this file are compiled by Triton, which gives their parameters types of its own.
# mypy: allow-untyped-defs

from __future__ import annotations  # tl.constexpr is not evaluated if Triton is missing

import contextlib

with contextlib.suppress(ImportError):
    import triton.language as tl


def conv2d_kernel(
    x_ptr, activation_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    rows, pixels, height, width, out_width, out_channels,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, scale_step,
    CHANNELS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    PADDED: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BLOCK_M, BLOCK_N] of the output.

    x: int8 [B, H, W, C]. weight: int8 [O, kh, kw, C]. activation_scale: float [B], or [1] with scale_step 0. weight_scale and
    bias: float [O]. Without a weight scale, out gets the int32 sums. With SPLITS above 1, out is [SPLITS, rows, O]: the
    programs of the second axis divide the loop into SPLITS equal parts. pixels: number of pixels per item of the output.
    PADDED: whether a window may reach beyond the image.
    """
    # Tiles are ordered in groups of GROUP rows of tiles, so that programs that run at once read the same parts of x and weight.
    blocks_m, blocks_n = (rows + BLOCK_M - 1) // BLOCK_M, (out_channels + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    within, height_of_group = tl.program_id(0) % (GROUP * blocks_n), tl.minimum(blocks_m - first, GROUP)
    row = (first + within % height_of_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = within // height_of_group * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and channels beyond the last are computed like the last and not stored, so that the loop needs no mask for them.
    source, source_channel = tl.minimum(row, rows - 1), tl.minimum(channel, out_channels - 1)
    item = source // pixels
    top = source % pixels // out_width * stride_h - padding_h
    left = source % out_width * stride_w - padding_w
    depth = tl.arange(0, BLOCK_K)
    pixel = ((item * height + top) * width + left).to(tl.int64)  # its product with the channels may exceed 32 bits
    a_ptrs = x_ptr + (pixel * CHANNELS)[:, None] + depth[None, :]
    b_ptrs = weight_ptr + (source_channel * (KERNEL_H * KERNEL_W * CHANNELS))[None, :] + depth[:, None]

    chunks: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    steps: tl.constexpr = KERNEL_H * KERNEL_W * chunks
    sums = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for place in range(steps // SPLITS):
        step = tl.program_id(1) * (steps // SPLITS) + place
        tap, c = step // chunks, step % chunks * BLOCK_K
        down, right = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
        a_step, b_step = a_ptrs + ((down * width + right) * CHANNELS + c), b_ptrs + (tap * CHANNELS + c)
        inside = tl.full((BLOCK_M,), True, tl.int1)
        if PADDED:  # as unsigned numbers, negative ones are above the limit too
            inside = (top + down).to(tl.uint32, bitcast=True) < height.to(tl.uint32)
            inside &= (left + right).to(tl.uint32, bitcast=True) < width.to(tl.uint32)
        if CHANNELS % BLOCK_K == 0:
            a, b = tl.load(a_step, mask=inside[:, None], other=0), tl.load(b_step)
        else:
            known = depth < CHANNELS - c
            a = tl.load(a_step, mask=inside[:, None] & known[None, :], other=0)
            b = tl.load(b_step, mask=known[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)

    out = sums
    if weight_scale_ptr is not None:
        activation_scale = tl.load(activation_scale_ptr + item * scale_step)
        weight_scale = tl.load(weight_scale_ptr + source_channel)
        out = sums.to(tl.float32) * activation_scale[:, None] * weight_scale[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + source_channel).to(tl.float32)[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    place = tl.program_id(1) * rows + row
    if WIDE:
        place, channel = place.to(tl.int64), channel.to(tl.int64)
    if CHANNELS_LAST:
        place = place[:, None] * out_channels + channel[None, :]
    else:
        place = (place // pixels * (pixels * out_channels) + place % pixels)[:, None] + channel[None, :] * pixels
    tl.store(out_ptr + place, out, mask=(row < rows)[:, None] & (channel < out_channels)[None, :])


def add_up_kernel(
    sums_ptr, activation_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    rows, pixels, out_channels, blocks_n, scale_step,
    CHANNELS_LAST: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up sums, int32 [SPLITS, rows, O], and store a tile of the output like `conv2d_kernel`. pixels: number per item."""
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel = channel < out_channels
    inside = (row < rows)[:, None] & is_channel[None, :]
    place = row.to(tl.int64)[:, None] * out_channels + channel[None, :]
    sums = tl.load(sums_ptr + place, mask=inside, other=0)
    for split in range(1, SPLITS):
        sums += tl.load(sums_ptr + tl.cast(rows, tl.int64) * split * out_channels + place, mask=inside, other=0)

    out = sums
    if weight_scale_ptr is not None:
        activation_scale = tl.load(activation_scale_ptr + row // pixels * scale_step, mask=row < rows, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + channel, mask=is_channel, other=0.0)
        out = sums.to(tl.float32) * activation_scale[:, None] * weight_scale[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    if not CHANNELS_LAST:
        place = (row // pixels).to(tl.int64)[:, None] * (pixels * out_channels) + (row % pixels)[:, None]
        place += channel.to(tl.int64)[None, :] * pixels
    tl.store(out_ptr + place, out, mask=inside)
