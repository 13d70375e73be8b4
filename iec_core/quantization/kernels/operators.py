"""The 8-bit convolution that layers call. torch.compile sees it as one opaque operator."""

from collections.abc import Sequence

import torch

from . import launch

SCHEMA = (
    "(Tensor x, Tensor? scale, bool per_tensor, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int[2] stride, int[2] padding, int[2] dilation, ScalarType out_dtype) -> Tensor"
)


def _stays_last(x: torch.Tensor) -> bool:
    """Return whether the output has its channels last in memory: if x does, and its layout is not also contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _fake(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    per_tensor: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    size = launch.output_size(x.shape[2], x.shape[3], weight, stride, padding, dilation)
    return launch.empty_output(x.shape[0], weight.shape[0], *size, _stays_last(x), x, out_dtype)


def _conv2d_int8(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    per_tensor: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if not x.numel():
        return _fake(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        values, scales = launch.quantized(x, scale, per_tensor)
        geometry = stride, padding, dilation
        return launch.conv2d(values, scales, weight, weight_scale, bias, *geometry, out_dtype, _stays_last(x))


def _register() -> torch.library.Library | None:
    """Register the operator and return its library. Return None if this module was already imported under another name: ComfyUI
    gives a pack's modules names of its own.

    A second registration would replace the operator, and calls through the first import would then crash.
    """
    if hasattr(torch.ops.iec, "conv2d_int8"):
        return None
    # torch.library.custom_op is not used: in each call, its checks take longer than a small layer on a GPU.
    library = torch.library.Library("iec", "DEF")
    library.define(f"conv2d_int8{SCHEMA}")
    library.impl("conv2d_int8", _conv2d_int8, "CompositeExplicitAutograd")
    torch.library.register_fake("iec::conv2d_int8", _fake, lib=library)
    return library


_library = _register()  # kept, because the registration ends with the library's lifetime


def conv2d_int8(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    per_tensor: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute a Conv2d layer (groups 1, zero padding) in 8 bits. torch.compile sees one opaque operator, iec::conv2d_int8.

    x: float [B, C, H, W]. scale: given scale of the activations, float32 of one number; None to compute it from x, per item or,
    with per_tensor, for the whole tensor. weight: int8 [O, kh, kw, C]. weight_scale: float32 [O]. bias: float [O] or None.
    stride, padding, dilation: pairs. x / scale is rounded half to even and clamped to +-127.

    Returns [B, O, H', W'] of `out_dtype`, with its channels last in memory if x has them last. The output of an item with a
    non-finite value is NaN. Raises ModelError for shapes that do not fit together.
    """
    # A call of the operator takes longer than all Python code that launches the kernels.
    compute = torch.ops.iec.conv2d_int8.default if torch.compiler.is_compiling() else _conv2d_int8
    return compute(x, scale, per_tensor, weight, weight_scale, bias, stride, padding, dilation, out_dtype)
