"""int8 Conv2d as an implicit matrix product in one Triton kernel, which quantizes what it loads and scales what it stores.

The im2col matrix is never written: every program computes a tile of out [B * H' * W', O] by walking over the taps of the
window and over blocks of channels. Memory is channels-last, so that each of those blocks is one run. The kernel does what
`int8.conv2d_int8` does: exact int32 sums of int8 products, and scales and bias in float32.

With TRITON_INTERPRET=1 in the environment, Triton's interpreter runs the kernel on the CPU.
"""

from __future__ import annotations  # so that tl.constexpr is not looked up where Triton is missing

import functools
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # an optional dependency, which not every platform has
    triton = None

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); the last is for few channels, the ones above it for small images
GPU_CONFIGS = (
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (32, 64, 128, 4, 4),
    (64, 32, 32, 4, 4),
)
INTERPRETER_CONFIG = (64, 32, 32, 4, 1)
TUNING_KEY = ("size_class", "out_channels", "CHANNELS", "KERNEL_H", "KERNEL_W")
# What varies with the resolution and the batch: one compiled kernel serves all of it.
NOT_SPECIALIZED = (
    "rows", "size_class", "height", "width", "out_height", "out_width",
    "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "scale_step",
)  # fmt: skip


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_available(device):
    """Tell whether the kernel runs on a device, such as "cuda": Triton is installed, and compiles it or interprets it."""
    if triton is None or _interpreted():
        return triton is not None
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return False
    # Triton has no int8 products for Turing, 7.5; torch.compile folds the properties, but not get_device_capability
    return torch.cuda.get_device_properties(device).major >= 8


def _conv2d_kernel(
    x_ptr, activation_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    rows, size_class, height, width, out_height, out_width, out_channels,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, scale_step,
    CHANNELS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a tile [BLOCK_M, BLOCK_N] of out [rows, out_channels]; rows are the output's pixels, B * H' * W'.

    x: float [B, H, W, C]; weight: int8 [O, kh, kw, C]; without a weight scale, out is the int32 sums. scale_step: 1, or
    0 for one activation scale for all. size_class only tells the tuner about how many rows there are.
    """
    blocks_n = (out_channels + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_channels = row < rows, channel < out_channels

    item = row // (out_height * out_width)
    top = row // out_width % out_height * stride_h - padding_h
    left = row % out_width * stride_w - padding_w
    activation_scale = tl.load(activation_scale_ptr + item * scale_step, mask=in_rows, other=1.0)[:, None]

    sums = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    chunks: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    for step in range(KERNEL_H * KERNEL_W * chunks):
        tap = step // chunks
        c = step % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
        h = top + tap // KERNEL_W * dilation_h
        w = left + tap % KERNEL_W * dilation_w
        inside = in_rows & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixel = ((item * height + h) * width + w).to(tl.int64)  # times the channels, this may exceed 32 bits
        a_mask = inside[:, None] & (c < CHANNELS)[None, :]
        a = tl.load(x_ptr + pixel[:, None] * CHANNELS + c[None, :], mask=a_mask, other=0.0)
        a = tl.clamp(tl.div_rn(a.to(tl.float32), activation_scale), -127.0, 127.0)
        # Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to the nearest integer, ties to even, and its
        # lowest byte is that integer. This needs no conversion and no library function, which the interpreter lacks.
        a = (a + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        b_offset = channel[None, :] * (KERNEL_H * KERNEL_W * CHANNELS) + (tap * CHANNELS + c)[:, None]
        b = tl.load(weight_ptr + b_offset, mask=in_channels[None, :] & (c < CHANNELS)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)

    out = sums
    if weight_scale_ptr is not None:
        weight_scale = tl.load(weight_scale_ptr + channel, mask=in_channels, other=0.0)
        out = sums.to(tl.float32) * activation_scale * weight_scale[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    out_offset = row.to(tl.int64)[:, None] * out_channels + channel[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_channels[None, :])


def _config(block_m, block_n, block_k, warps, stages):
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def _fitting(configs, arguments, **constants):
    """Leave out the configs whose blocks of channels are wider than the channels there are."""
    width = max(32, triton.next_power_of_2(arguments["out_channels"]))
    depth = max(32, triton.next_power_of_2(constants["CHANNELS"]))
    return [c for c in configs if c.kwargs["BLOCK_N"] <= width and c.kwargs["BLOCK_K"] <= depth]


@functools.cache
def _compiled(interpreted):
    """Return the launchable kernel. Triton reads TRITON_INTERPRET here, at the first launch, and not at import."""
    kernel = triton.jit(_conv2d_kernel, do_not_specialize=list(NOT_SPECIALIZED))
    configs = [_config(*numbers) for numbers in ((INTERPRETER_CONFIG,) if interpreted else GPU_CONFIGS)]
    return triton.autotune(configs, key=list(TUNING_KEY), prune_configs_by={"early_config_prune": _fitting})(kernel)


def _empty_output(x, weight, stride, padding, dilation, dtype):
    """Allocate the channels-last [B, O, H', W'] for x [B, C, H, W] and weight [O, kh, kw, C]."""
    sizes = zip(x.shape[2:], weight.shape[1:3], stride, padding, dilation)
    image = [(size + 2 * p - d * (kernel - 1) - 1) // s + 1 for size, kernel, s, p, d in sizes]
    shape = (x.shape[0], weight.shape[0], *image)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _launch(x, activation_scale, weight, weight_scale, bias, stride, padding, dilation, out_dtype):
    """Run the kernel; without weight_scale, the result is the sums."""
    (batch, channels, height, width), (out_channels, kernel_h, kernel_w, depth) = x.shape, weight.shape
    if depth != channels or activation_scale.numel() not in (1, batch):  # the kernel would read past the end
        shapes = [tuple(tensor.shape) for tensor in (x, weight, activation_scale)]
        raise ValueError(f"x {shapes[0]}, weight {shapes[1]} and activation scale {shapes[2]} do not fit together")
    x = x.contiguous(memory_format=torch.channels_last)
    vectors = (None if tensor is None else tensor.contiguous() for tensor in (activation_scale, weight, weight_scale, bias))
    out = _empty_output(x, weight, stride, padding, dilation, out_dtype)
    rows = batch * out.shape[2] * out.shape[3]

    def grid(meta):
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(out_channels, meta["BLOCK_N"]),)

    with torch.cuda.device_of(x):  # Triton launches on the current device
        _compiled(_interpreted())[grid](
            x, *vectors, out,
            rows, rows.bit_length(), height, width, *out.shape[2:], out_channels,
            *stride, *padding, *dilation, int(activation_scale.numel() > 1),
            CHANNELS=channels, KERNEL_H=kernel_h, KERNEL_W=kernel_w,
        )  # fmt: skip
    return out


SCHEMA = (
    "(Tensor x, Tensor activation_scale, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int[2] stride, int[2] padding, int[2] dilation, ScalarType out_dtype) -> Tensor"
)


def _fake(x, activation_scale, weight, weight_scale, bias, stride, padding, dilation, out_dtype):
    return _empty_output(x, weight, stride, padding, dilation, out_dtype)


def _register():
    """Register the operator, unless this module was imported before: under another name, as ComfyUI names a pack's modules.

    To register it again would replace it, and calls through the first import would then crash.
    """
    if not hasattr(torch.ops.iec, "conv2d_int8"):
        torch.library.custom_op("iec::conv2d_int8", _launch, mutates_args=(), schema=SCHEMA).register_fake(_fake)


_register()


def conv2d_int8(x, activation_scale, weight, weight_scale, bias, stride, padding, dilation, out_dtype):
    """Conv2d (groups 1, zero padding) in 8 bits: for torch.compile, one opaque operator, iec::conv2d_int8.

    x: float [B, C, H, W], read as channels-last (else copied); activation_scale: float32 [B], or [1] for all items;
    weight: int8 [O, kh, kw, C] and weight_scale: float32 [O]; bias: float [O] or None; stride, padding and dilation are
    pairs. x / activation_scale is rounded, half to even, and clamped to +-127. Returns a channels-last [B, O, H', W'].
    """
    return torch.ops.iec.conv2d_int8.default(
        x, activation_scale, weight, weight_scale, bias, stride, padding, dilation, out_dtype
    )


def conv2d_int8_sums(x, activation_scale, weight, stride, padding, dilation):
    """Return the sums of conv2d_int8 before scales and bias: int32 [B, O, H', W']."""
    return _launch(x, activation_scale, weight, None, None, stride, padding, dilation, torch.int32)
