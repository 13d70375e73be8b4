"""The host's Linear and Conv2d layers with a quantized weight.

The parameter `weight` is the packed one: a plain tensor of bytes, which the host moves, offloads, pins, backs up and counts as
it does any other. `convert_weight` and `set_weight` are the host's own contract for weights that are not what they are computed
with: through them LoRAs, weight hooks and merges reach it.
"""

import contextlib
import copy
from dataclasses import dataclass

import comfy.ops
import torch

from ...iec_core import fp8
from ...iec_core.int8 import (
    LIMIT,
    WEIGHT_ONLY,
    conv2d_int8,
    conv_backend,
    dynamic_scale,
    is_pointwise,
    linear_backend,
    linear_int8,
)
from ...iec_core.quantization import rotate

# What the host keeps on a model and its layers while they are loaded; a copy that is not loaded goes without.
HOST_STATE = (
    "forward", "comfy_cast_weights", "weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function",
    "prev_comfy_cast_weights", "comfy_patched_weights", "seed_key", "current_patcher", "device", "model_loaded_weight_memory",
    "lowvram_patch_counter", "model_lowvram", "current_weight_patches_uuid", "model_offload_buffer_memory", "dynamic_vbars",
    "dynamic_pins", "dynamic_patchers",
)  # fmt: skip


def is_host_state(name):
    """Tell whether an attribute of a model or a layer is there only because the host has loaded it."""
    return name in HOST_STATE or name == "_v" or name.startswith(("_v_", "_pin", "_prefetch"))


@dataclass(frozen=True)
class ActivationFormat:
    """bits: 16 (as they are) or 8. per_tensor: one scale for a whole tensor, instead of one for each row or batch item."""

    bits: int = 16
    per_tensor: bool = False


class _QuantizedLayer:
    """What both kinds of layer share. packing: a Packing. activation: an ActivationFormat. input_scale: of calibrated
    activations, float32 of one number, set before an evaluation; None: taken from what comes in. passes_gradients: see
    `straight_through`.
    """

    input_scale = None
    passes_gradients = False

    @classmethod
    def of(cls, name, layer, packing, packed, bias, activation):
        """Return a quantized layer in place of one of the host's: packed is its weight as `packing` has it. name: in the
        network.
        """
        quantized = cls.__new__(cls)
        own = {name: value for name, value in layer.__dict__.items() if not is_host_state(name)}
        quantized.__dict__.update({name: copy.copy(value) if isinstance(value, dict) else value for name, value in own.items()})
        bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        quantized._parameters = {"weight": torch.nn.Parameter(packed, requires_grad=False), "bias": bias}
        quantized.weight_function, quantized.bias_function = [], []
        quantized.name, quantized.packing, quantized.activation = name, packing, activation
        return quantized

    def convert_weight(self, weight, inplace=False, **kwargs):
        """Return the weight in floating point; weight: the packed one, in whatever type the host has cast its bytes to."""
        return weight if weight.ndim > 1 else self.packing.dequantize(weight.to(torch.int8))

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Take up a weight in floating point. It is rounded to the nearest, whatever the seed, so that what is offloaded and
        patched anew in every step is the same as what is patched once.
        """
        packed = self.packing.quantize(weight)
        if return_weight:
            return packed
        if inplace_update:
            self.weight.data.copy_(packed)
        else:
            self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward_comfy_cast_weights(self, x):
        """Evaluate the layer on x. Raises ValueError where the network has cast x to the type of the packed weight."""
        if not x.is_floating_point():
            raise ValueError(
                f"model: its network takes the type of what enters {self.name} from that layer's weight, so that it cannot be "
                "quantized; name it in exclude of Quantize Model (IEC)."
            )
        packed, bias, stream = self._at(x)
        try:
            patched = self._patched(packed) if self.weight_function else packed
            return (self._compute_straight if self.passes_gradients else self._compute)(x, patched, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, packed, bias, stream)

    def _at(self, x):
        """Return (packed weight, bias, stream) on x's device, as the host's `cast_bias_weight` does. What an offloaded layer's
        weight is to be patched with stays undone: the host would do it to the bytes.
        """
        functions = self.weight_function
        if functions:
            self.weight_function = []
        try:
            return comfy.ops.cast_bias_weight(
                self, dtype=torch.int8, device=x.device, bias_dtype=x.dtype, offloadable=True
            )  # fmt: skip
        finally:
            if functions:
                self.weight_function = functions

    def _patched(self, packed):
        """Return a packed weight with the patches of an offloaded layer."""
        for function in self.weight_function:  # ComfyUI 0.3.75's gives packed weights, later ones in floating point
            packed = function(self.convert_weight(packed))
        return packed.to(torch.int8) if packed.ndim == 1 else self.packing.quantize(packed)

    def rotated(self, x):
        """Return what comes in as it is quantized."""
        return rotate(x, self.packing.format.rotation) if self.packing.format.rotation else x

    def backend(self, device):
        """Return, in words, what computes this layer on a device."""
        kind, quantized = self.packing.format.kind, self.activation.bits == 8
        if not quantized or (kind == "fp8" and not self._multiplies_fp8(device)):
            return WEIGHT_ONLY
        if kind == "fp8":
            return "torch._scaled_mm"
        return self._integer_backend(device)

    def _multiplies_fp8(self, device):
        return False

    def _straight(self, rows):
        """Return rows [..., C] as they are rounded for the product, with the derivative of what is not rounded: 1 within the
        clipping range, 0 outside. The scale counts as a constant.
        """
        if self.activation.bits == 16:
            return rows
        if self.packing.format.kind == "fp8":
            if not self._multiplies_fp8(rows.device):
                return rows
            scale = fp8.activation_scale(rows.detach(), self.input_scale)
            limit, dtype = fp8.LARGEST, torch.float8_e4m3fn
        else:
            kept = not self.activation.per_tensor
            scale = dynamic_scale(rows.detach(), kept) if self.input_scale is None else self.input_scale
            limit, dtype = LIMIT, None
        inside = rows.float() / scale
        if self.input_scale is not None:  # else nothing is clipped, but what the division puts an ulp beyond the limit
            inside = inside.clamp(-limit, limit)
        rounded = inside.detach().round() if dtype is None else inside.detach().to(dtype).float()
        return ((inside + (rounded - inside.detach())) * scale).to(rows.dtype)

    def _per_row(self):
        return self.input_scale is None and not self.activation.per_tensor


class QuantizedLinear(_QuantizedLayer, comfy.ops.manual_cast.Linear):
    """A Linear layer: weight [O, C]."""

    def _compute(self, x, packed, bias):
        activation, fmt = self.activation, self.packing.format
        if activation.bits == 16 or (fmt.kind == "fp8" and not self._multiplies_fp8(x.device)):
            return torch.nn.functional.linear(self.rotated(x), self.packing.scaled(packed, x.dtype), bias)
        values, scale = self.packing.values(packed)
        if fmt.kind == "fp8":
            return fp8.linear_fp8(self.rotated(x), values, scale[0], bias, self.input_scale)
        return linear_int8(x, values, scale[:, 0], bias, self.input_scale, activation.per_tensor, fmt.rotation)

    def _compute_straight(self, x, packed, bias):
        rows = self.rotated(x)
        rows = self._straight(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return torch.nn.functional.linear(rows, self.packing.scaled(packed, x.dtype), bias)

    def _multiplies_fp8(self, device):
        fits = fp8.fits(self.packing.inputs, self.packing.rows)
        return self.packing.format.kind == "fp8" and fits and fp8.has_scaled_mm(device)

    def _integer_backend(self, device):
        return linear_backend(device, self._per_row(), self.packing.rows, self.packing.inputs)


class QuantizedConv2d(_QuantizedLayer, comfy.ops.manual_cast.Conv2d):
    """A Conv2d layer (groups 1, zero padding): weight [O, C, kh, kw]."""

    def _compute(self, x, packed, bias):
        geometry = self.stride, self.padding, self.dilation
        if self.activation.bits == 16 or self.packing.format.kind == "fp8":
            kernel = self.packing.shaped(self.packing.scaled(packed, x.dtype))
            return torch.nn.functional.conv2d(x, kernel, bias, *geometry)
        values, scale = self.packing.values(packed)
        per_tensor = self.activation.per_tensor
        return conv2d_int8(x, values, scale[:, 0], bias, self.kernel_size, *geometry, self.input_scale, per_tensor)

    def _compute_straight(self, x, packed, bias):
        if self.activation.bits == 8 and self.packing.format.kind != "fp8" and self.backend(x.device) != WEIGHT_ONLY:
            if is_pointwise(self.kernel_size, self.stride, self.padding):  # a scale for each pixel
                rows = x.permute(0, 2, 3, 1)
                x = self._straight(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape).permute(0, 3, 1, 2).contiguous()
            else:
                x = self._straight(x)
        kernel = self.packing.shaped(self.packing.scaled(packed, x.dtype))
        return torch.nn.functional.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation)

    def _integer_backend(self, device):
        if is_pointwise(self.kernel_size, self.stride, self.padding):
            return linear_backend(device, self._per_row(), self.packing.rows, self.packing.inputs)
        return conv_backend(device)


def quantized_class(layer):
    """Return the class of quantized layer for one of the host's, None where there is none."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or weight is None or isinstance(layer, _QuantizedLayer):
        return None
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or type(weight.data) is not torch.Tensor:
        return None  # quantized already, by the host
    return class_for(layer)


def class_for(layer):
    """Return the class of quantized layer for a layer of this geometry, None where there is none."""
    if isinstance(layer, torch.nn.Linear):
        return QuantizedLinear
    plain = isinstance(layer, torch.nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return QuantizedConv2d if plain and not isinstance(layer.padding, str) else None


def quantized_layers(network):
    """Return {name: layer} of the quantized layers of a network."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, _QuantizedLayer)}


@contextlib.contextmanager
def straight_through(network):
    """Let derivatives pass the rounding of a network's quantized layers, for as long as this lasts: rounding counts as the
    identity within the clipping range (Bengio et al. 2013, the straight-through estimator). Results are the same but for the
    order of sums, as products are in floating point.
    """
    layers = quantized_layers(network).values()
    try:
        for layer in layers:
            layer.passes_gradients = True
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("passes_gradients", None)
