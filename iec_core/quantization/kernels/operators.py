"""What layers call: an 8-bit convolution, for torch.compile one opaque operator."""

import torch

from . import launch

SCHEMA = (
    "(Tensor x, Tensor? scale, bool per_tensor, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int[2] stride, int[2] padding, int[2] dilation, ScalarType out_dtype) -> Tensor"
)


def _stays_last(x):
    """Tell whether the output has its channels last in memory: where x has, and has them not first as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _fake(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype):
    size = launch.output_size(*x.shape[2:], weight, stride, padding, dilation)
    return launch.empty_output(x.shape[0], weight.shape[0], *size, _stays_last(x), x, out_dtype)


def _conv2d_int8(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype):
    if not x.numel():
        return _fake(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        values, scales = launch.quantized(x, scale, per_tensor)
        geometry = stride, padding, dilation
        return launch.conv2d(values, scales, weight, weight_scale, bias, *geometry, out_dtype, _stays_last(x))


def _register():
    """Register the operator, unless this module was imported before: under another name, as ComfyUI names a pack's modules.

    To register it again would replace it, and calls through the first import would then crash.
    """
    if hasattr(torch.ops.iec, "conv2d_int8"):
        return None
    # Not torch.library.custom_op, whose checks take longer in every call than a small layer does on a GPU.
    library = torch.library.Library("iec", "DEF")
    library.define(f"conv2d_int8{SCHEMA}")
    library.impl("conv2d_int8", _conv2d_int8, "CompositeExplicitAutograd")
    torch.library.register_fake("iec::conv2d_int8", _fake, lib=library)
    return library


_library = _register()  # kept: what it registers goes with it


def conv2d_int8(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype):
    """Conv2d (groups 1, zero padding) in 8 bits: for torch.compile, one opaque operator, iec::conv2d_int8.

    x: float [B, C, H, W]; scale: the activations', float32 of one number where it is given, None to take it from x: of each
    item, or of all with per_tensor. weight: int8 [O, kh, kw, C] and weight_scale: float32 [O]; bias: float [O] or None; stride,
    padding and dilation are pairs. x / scale is rounded, half to even, and clamped to +-127. Returns [B, O, H', W'], with its
    channels last in memory where x has them so. An item that is not finite comes out as NaN.
    """
    # A call of the operator takes longer than all that Python has to do for the kernels.
    compute = torch.ops.iec.conv2d_int8.default if torch.compiler.is_compiling() else _conv2d_int8
    return compute(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype)
