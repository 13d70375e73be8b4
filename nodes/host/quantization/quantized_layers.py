"""The host's Linear and Conv2d layers with a quantized weight.

The parameter `weight` is the packed weight: a plain tensor of bytes, which the host moves, offloads, pins, backs up and counts
like any other. `convert_weight` and `set_weight` are the host's interface for weights that are stored in one form and computed
with in another. Through them the host applies LoRAs and merges when it loads the layer. Patches of an offloaded layer, and
those of hooks, are applied while the layer computes; the resulting Change is computed once.
"""

import contextlib
import copy
import functools
import operator
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import comfy.ops
import torch

from ....iec_core.quantization import fp8
from ....iec_core.quantization.int8 import (
    LIMIT,
    WEIGHT_ONLY,
    conv2d_int8,
    conv_backend,
    dynamic_scale,
    is_pointwise,
    linear_backend,
    linear_int8,
)
from ....iec_core.quantization.kernel_times import KernelTimes
from ....iec_core.quantization.packing import joined, rotate
from ..profiles import PROFILES
from .weights import lora_factors, with_patches

# Attributes that the host sets on a model and its layers while they are loaded. A copy that is not loaded must not have them.
HOST_STATE = (
    "forward", "comfy_cast_weights", "weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function",
    "prev_comfy_cast_weights", "comfy_patched_weights", "seed_key", "current_patcher", "device", "model_loaded_weight_memory",
    "lowvram_patch_counter", "model_lowvram", "current_weight_patches_uuid", "model_offload_buffer_memory", "dynamic_vbars",
    "dynamic_pins", "dynamic_patchers",
)  # fmt: skip


def is_host_state(name):
    """Return whether an attribute of a model or a layer exists only because the host has loaded it."""
    return name in HOST_STATE or name == "_v" or name.startswith(("_v_", "_pin", "_prefetch"))


TIMES = KernelTimes(lambda: PROFILES.beside("kernel_times.json"))
FASTEST, EIGHT_BIT, DEQUANTIZED = COMPUTE = "fastest", "8-bit", "dequantized"
FULL = "unquantized layer"  # timed for comparison with the quantized ways
REMEMBERED = 16  # the most kinds of input per layer: areas and chunks of different sizes can alternate


@dataclass(frozen=True)
class ActivationFormat:
    """The format of a layer's activations.

    bits: 16 (not quantized) or 8. per_tensor: one scale for a whole tensor, instead of one per row or batch item. compute: how
    products with 8-bit activations are computed, one of COMPUTE. EIGHT_BIT: 8-bit products. DEQUANTIZED: products with the
    dequantized weight and unquantized activations. FASTEST: the faster of the two if there is a GPU that can be timed, else
    8-bit products.
    """

    bits: int = 16
    per_tensor: bool = False
    compute: str = FASTEST


class _Views(NamedTuple):
    """Views of a packed weight.

    parts: as `Packing.stored` returns them. of_rows: the scales of the output channels, float32 [O]. factors: those of the
    low-rank branch, or None.
    """

    parts: tuple[torch.Tensor, ...]
    of_rows: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None


class Change(NamedTuple):
    """The change that patches make to a packed weight.

    packed: a new packed weight, None if the weight itself is not changed. factors: factors added to its branch, or None.
    """

    packed: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device):
        """Return this Change on a device."""
        packed = None if self.packed is None else self.packed.to(device)
        return Change(packed, self.factors and tuple(factor.to(device) for factor in self.factors))


@dataclass(frozen=True)
class Choice:
    """The backend that computes a layer, and the reason in words; "" if there is no other choice."""

    backend: str
    why: str = ""

    def __str__(self):
        return f"{self.backend} ({self.why})" if self.why else self.backend


class _QuantizedLayer:
    """The part that quantized Linear and Conv2d layers share.

    packing: a Packing. activation: an ActivationFormat. input_scale: the scale of calibrated activations, a float32 tensor with
    one number, set before an evaluation; None: computed from the input. passes_gradients: see `straight_through`. hooked: the
    Change that the current hooks make, or None. patches: the patches that are in the weight passed to `set_weight`, None if
    they are not known.
    """

    input_scale = None
    passes_gradients = False
    hooked = None
    patches = None
    _laid_on = None  # of an offloaded layer: ((the hooks' packed weight, its patch functions), their Change)
    _chosen = MappingProxyType({})  # {kind of input, as `_seen` returns it: its Choice}
    _views = None  # (the weight, its address, its _Views)

    @classmethod
    def of(cls, name, layer, packing, packed, bias, activation):
        """Return the quantized layer that replaces a layer of the host.

        name: its name in the network. packed: its weight in the format of `packing`.
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
        """Return the weight in floating point. weight: the packed weight, in any dtype to which the host has cast its bytes."""
        return weight if weight.ndim > 1 else self.packing.dequantize(weight.to(torch.int8))

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Set the weight from floating point, stored as a change of the existing weight.

        An in-place update has no room for a larger branch: then the weight is rounded instead.
        """
        packed = self.weight.to(weight.device)
        if inplace_update and not return_weight:
            self.weight.data.copy_(self.packing.rounded_anew(self.packing.matrix(weight.float()), packed))
            return None
        packed = self.with_change(packed, self.changed_by(self.patches, lambda: weight, packed))
        if return_weight:
            return packed
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def changed_by(self, patches, patched, packed):
        """Return the Change that a MODEL's patches make to a packed weight.

        patched(): returns the patched weight in floating point. It is not called if all patches are LoRAs whose factors can be
        used directly.
        """
        factors = patches and lora_factors(patches, self.packing.shape, packed.device)
        if not factors or factors[0].shape[1] > self.packing.most_rank:
            return Change(packed=self.packing.changed(patched(), packed))
        out, into = factors
        return Change(factors=self.packing.thin(out, self.packing.matrix(into))) if len(into) else Change()

    def with_change(self, packed, change):
        """Return a packed weight with a Change made to it."""
        packed = packed if change.packed is None else change.packed
        return packed if change.factors is None else self.packing.with_branch(packed, change.factors)

    def forward_comfy_cast_weights(self, x):
        """Evaluate the layer on x. Raises ValueError if the network has cast x to the dtype of the packed weight."""
        if not x.is_floating_point():
            raise ValueError(
                f"model: its network takes the dtype of the input of {self.name} from that layer's weight, so the layer "
                "cannot be quantized; name it in exclude of the node that quantizes."
            )
        compute = self._compute_straight if self.passes_gradients else self._compute
        weight, bias = self._parameters["weight"], self._parameters["bias"]  # faster than the module's attributes
        if self._is_in_place(weight, bias, x):
            return compute(x, weight, bias)
        packed, bias, stream = self._at(x)
        try:
            return self._compute_changed(compute, x, packed, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, packed, bias, stream)

    def _is_in_place(self, weight, bias, x):
        """Return whether the host's `cast_bias_weight` can be skipped, which takes half of a small layer's time.

        It can if weight and bias are on the device of x, and no patch must be applied to them.
        """
        if self.weight_function or self.bias_function or self.hooked is not None:
            return False
        if weight.device != x.device or weight.dtype != torch.int8:
            return False
        return bias is None or (bias.dtype == x.dtype and bias.device == x.device)

    def _at(self, x):
        """Return (packed weight, bias, stream) on x's device, like the host's `cast_bias_weight`.

        The patches of an offloaded layer's weight are not applied here, because the host would apply them to the bytes.
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

    def _compute_changed(self, compute, x, packed, bias):
        """Compute the layer for x with its packed weight changed by hooks and by the patches of an offloaded layer."""
        hooked = Change() if self.hooked is None else self.hooked.to(x.device)
        packed = packed if hooked.packed is None else hooked.packed
        if not all(hasattr(function, "patches") for function in self.weight_function):  # functions of another pack
            return self._product(x, self._patched(packed, hooked).to(x.dtype), bias)
        laid = self._laid(packed).to(x.device) if self.weight_function else Change()
        packed = packed if laid.packed is None else laid.packed
        return compute(x, packed, bias, joined(laid.factors, hooked.factors))

    def _laid(self, packed):
        """Return the Change that an offloaded layer's patches make to a packed weight.

        It is computed once for the patches that the host has set, and kept on the device of the layer's weight.
        """
        on = self.hooked and self.hooked.packed, *self.weight_function
        if self._laid_on is None or len(self._laid_on[0]) != len(on) or any(map(operator.is_not, self._laid_on[0], on)):
            key = self.weight_function[0].key
            patches = [patch for function in self.weight_function for patch in function.patches[key]]
            change = self.changed_by(patches, lambda: with_patches(patches, key, self.convert_weight(packed)), packed)
            self._laid_on = on, change.to(self._parameters["weight"].device)
        return self._laid_on[1]

    def _patched(self, packed, hooked):
        """Return the weight in floating point: a packed weight, with the hooks' Change, then the layer's weight functions."""
        weight = self.convert_weight(self.with_change(packed, hooked))
        for function in self.weight_function:  # the host's own function would round its result
            patches = getattr(function, "patches", None)
            weight = function(weight) if patches is None else with_patches(patches[function.key], function.key, weight)
        return weight

    def _stored(self, packed):
        """Return the _Views of a packed weight.

        Those of the layer's own weight are kept. Those of a weight that is moved for every evaluation are not, because they
        would keep its memory in use.
        """
        if packed is not self._parameters["weight"]:
            return self._viewed(packed)
        if self._views is None or self._views[0] is not packed or self._views[1] != packed.data_ptr():
            self._views = packed, packed.data_ptr(), self._viewed(packed)
        return self._views[2]

    def _viewed(self, packed):
        parts = self.packing.stored(packed)
        return _Views(parts, parts[1][:, 0], self.packing.factors(packed))

    def _apply(self, *args, **kwargs):
        self._views = self._laid_on = None  # the weight may move to another device; its old memory must be released
        return super()._apply(*args, **kwargs)

    def __getstate__(self):  # for copies, which have their own weight
        apart = "_views", "_chosen", "_laid_on", "hooked", "patches"
        return {name: value for name, value in self.__dict__.items() if name not in apart}

    def rotated(self, x):
        """Return the input x, rotated if the weight's format is rotated. This is the tensor that is quantized."""
        return rotate(x, self.packing.format.rotation) if self.packing.format.rotation else x

    def choice(self, device, x=None):
        """Return the Choice that computed this layer on a device for x, or for the last input if x is None.

        If there was no input yet, return the Choice that will be tried first.
        """
        if x is not None:
            return self._chosen.get(self._seen(x)) or self._by_rule(device)
        found = [choice for seen, choice in self._chosen.items() if seen[2] == torch.device(device)]
        return found[-1] if found else self._by_rule(device)

    def _by_rule(self, device):
        """Return the Choice for a device before any timing."""
        kind = self.packing.format.kind
        if self.activation.bits == 16 or (kind == "fp8" and not self._multiplies_fp8(device)):
            return Choice(WEIGHT_ONLY)
        backend = fp8.SCALED_MM if kind == "fp8" else self._integer_backend(device)
        if backend != WEIGHT_ONLY and self.activation.compute == DEQUANTIZED:
            return Choice(WEIGHT_ONLY, f"as asked for, instead of {backend}")
        return Choice(backend)

    def _seen(self, x):
        return x.shape, x.dtype, x.device, self.input_scale is None, x.ndim == 4 and x.stride(1) == 1

    def _backend(self, x, packed, bias):
        """Return the name of the backend that computes the layer for x."""
        seen = self._seen(x)
        choice = self._chosen.get(seen)
        if choice is None:
            choice, is_final = self._found_out(x, packed, bias)
            if is_final:
                before = self._chosen if len(self._chosen) < REMEMBERED else {}
                self._chosen = {**before, seen: choice}
        return choice.backend

    def _found_out(self, x, packed, bias):
        """Return (Choice for x, whether it can be kept). Time each way to compute if no layer of this kind was timed before."""
        rule, rows = self._by_rule(x.device), x.numel() // self.packing.shape[1]
        if rule.backend == WEIGHT_ONLY or self.activation.compute == EIGHT_BIT or not TIMES.covers(x.device):
            return rule, True
        times = TIMES.of(x.device, self._kind(x), rows, self._ways(rule.backend, x, packed, bias))
        return _fastest(times, rule), bool(times)

    def _ways(self, backend, x, packed, bias):
        """Return {name: function} of the ways to compute the layer: unquantized, with the dequantized weight, with a backend.

        Factors that patches have added to the branch are left out, because they take equally long in each way.
        """
        stored, rank = self._viewed(packed), self.packing.format.rank
        stored = stored._replace(factors=(stored.factors[0][:, :rank], stored.factors[1][:rank]) if rank else None)
        full = functools.cache(lambda: self._dequantized(stored, x.dtype))
        return {
            FULL: lambda: self._product(x, full(), bias),
            WEIGHT_ONLY: lambda: self._by(WEIGHT_ONLY, x, stored, bias),
            backend: lambda: self._by(backend, x, stored, bias),
        }

    def _backend_of_graph(self, x):
        """Return the backend for x while torch.compile traces a graph, in which nothing can be timed.

        It is the backend that was faster in the earlier timing with the most rows for this kind of layer, else the one by rule.
        """
        backend = self._by_rule(x.device).backend
        if backend == WEIGHT_ONLY or self.activation.compute == EIGHT_BIT:
            return backend
        return _timed_before(x.device, self._kind(x), backend)

    def _kind(self, x):
        """Return, in words, everything that a layer's times depend on except the number of rows."""
        fmt, given = self.packing.format, self.input_scale is not None
        scales = "given" if given else "of the tensor" if self.activation.per_tensor or fmt.kind == "fp8" else "of each row"
        layout = ", channels last" if x.ndim == 4 and x.stride(1) == 1 else ""
        turned = f", rotated by {fmt.rotation}" if fmt.rotation else ""
        turned += f", groups of {fmt.group_size}" if fmt.two_scales else ""
        turned += f", rank {fmt.rank}" if fmt.rank else ""
        return f"{self._geometry()}, {fmt.kind}{turned}, x {str(x.dtype)[6:]}{layout}, scale {scales}"

    def _compute(self, x, packed, bias, added=None):
        """Compute the layer for x. added: factors in addition to those of the weight's own branch, or None."""
        if torch.compiler.is_compiling():
            return self._by(self._backend_of_graph(x), x, self._viewed(packed), bias, added)
        return self._by(self._backend(x, packed, bias), x, self._stored(packed), bias, added)

    def _by(self, backend, x, stored, bias, added=None):
        """Compute the layer for x. stored: the weight's _Views."""
        return self._with_branch(self._without_branch(backend, x, stored, bias), x, joined(stored.factors, added))

    def _without_branch(self, backend, x, stored, bias):
        if backend == WEIGHT_ONLY:
            return self._product(self.rotated(x), self._dequantized(stored, x.dtype), bias)
        values, scale = self.packing.unpacked(stored.parts)
        if backend == fp8.SCALED_MM:
            return fp8.linear_fp8(self.rotated(x), values, scale[0], bias, self.input_scale)
        return self._integer_product(backend, x, values, stored.of_rows, bias)

    def _dequantized(self, stored, dtype):
        return self.packing.shaped(self.packing.times_scales(*self.packing.unpacked(stored.parts), dtype))

    def _with_branch(self, out, x, factors):
        """Return out plus the result of the low-rank branch, if there is one. The branch gets x neither rounded nor rotated."""
        if factors is None:
            return out
        out_of, into = (factor.to(x.dtype) for factor in factors)
        return out + self._expanded(self._product(x, self.packing.shaped(into), None), out_of)

    def _multiplies_fp8(self, device):
        return False

    def _straight(self, rows):
        """Return rows [..., C] rounded as for the product, with the derivative of the identity within the clipping range.

        The derivative is 1 within the clipping range and 0 outside. The scale counts as a constant.
        """
        if self.packing.format.kind == "fp8":
            scale = fp8.activation_scale(rows.detach(), self.input_scale)
            limit, dtype = fp8.LARGEST, torch.float8_e4m3fn
        else:
            kept = not self.activation.per_tensor
            scale = dynamic_scale(rows.detach(), kept) if self.input_scale is None else self.input_scale
            limit, dtype = LIMIT, None
        inside = rows.float() / scale
        if self.input_scale is not None:  # else the division moves values at most one ulp beyond the limit
            inside = inside.clamp(-limit, limit)
        rounded = inside.detach().round() if dtype is None else inside.detach().to(dtype).float()
        return ((inside + (rounded - inside.detach())) * scale).to(rows.dtype)

    def _compute_straight(self, x, packed, bias, added=None):
        is_rounded = self._backend(x, packed, bias) != WEIGHT_ONLY
        turned = self.rotated(x)
        weight = self.packing.shaped(self.packing.scaled(packed, x.dtype))
        out = self._product(self._straight_input(turned) if is_rounded else turned, weight, bias)
        return self._with_branch(out, x, joined(self.packing.factors(packed), added))

    def _per_row(self):
        return self.input_scale is None and not self.activation.per_tensor


class QuantizedLinear(_QuantizedLayer, comfy.ops.manual_cast.Linear):
    """A Linear layer: weight [O, C]."""

    def _product(self, x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)

    def _expanded(self, x, weight):
        return torch.nn.functional.linear(x, weight)

    def _integer_product(self, backend, x, values, scale, bias):
        rotation = self.packing.format.rotation
        return linear_int8(x, values, scale, bias, self.input_scale, self.activation.per_tensor, rotation, backend)

    def _straight_input(self, x):
        return self._straight(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def _multiplies_fp8(self, device):
        fits = fp8.fits(self.packing.inputs, self.packing.rows)
        return self.packing.format.kind == "fp8" and fits and fp8.has_scaled_mm(device)

    def _integer_backend(self, device):
        return linear_backend(device, self._per_row(), self.packing.rows, self.packing.inputs)

    def _geometry(self):
        return f"Linear {self.packing.inputs} to {self.packing.rows}"


class QuantizedConv2d(_QuantizedLayer, comfy.ops.manual_cast.Conv2d):
    """A Conv2d layer (groups 1, zero padding): weight [O, C, kh, kw]."""

    def _product(self, x, weight, bias):
        return torch.nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def _expanded(self, x, weight):
        return torch.nn.functional.conv2d(x, weight[:, :, None, None])

    def _integer_product(self, backend, x, values, scale, bias):
        geometry = self.kernel_size, self.stride, self.padding, self.dilation
        return conv2d_int8(x, values, scale, bias, *geometry, self.input_scale, self.activation.per_tensor, backend)

    def _straight_input(self, x):
        if not is_pointwise(self.kernel_size, self.stride, self.padding):
            return self._straight(x)
        rows = x.permute(0, 2, 3, 1)  # one scale per pixel
        return self._straight(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape).permute(0, 3, 1, 2).contiguous()

    def _integer_backend(self, device):
        if is_pointwise(self.kernel_size, self.stride, self.padding):
            return linear_backend(device, self._per_row(), self.packing.rows, self.packing.inputs)
        return conv_backend(device)

    def _geometry(self):
        outputs, inputs, *window = self.packing.shape
        sizes = (window, self.stride, self.padding, self.dilation)
        named = zip(("window", "stride", "padding", "dilation"), ("x".join(map(str, pair)) for pair in sizes))
        return f"Conv2d {inputs} to {outputs}, " + ", ".join(" ".join(one) for one in named)


def _fastest(times, rule):
    """Return the faster Choice of the rule's backend and the dequantized weight; the rule's if there are no times.

    times: {name: microseconds}.
    """
    if not times:
        return rule
    names = rule.backend, WEIGHT_ONLY
    taken = ", ".join(f"{name} {times[name]:.3g}" for name in (*names, FULL))
    return Choice(min(names, key=times.get), f"microseconds: {taken}")


@torch.compiler.assume_constant_result
def _timed_before(device, kind, backend):
    """Return the faster of a backend and the dequantized weight by earlier times; the backend if there are none."""
    return _fastest(TIMES.known_of_most(device, kind, (FULL, WEIGHT_ONLY, backend)), Choice(backend)).backend


def quantized_class(layer):
    """Return the quantized class for a layer of the host, None if the layer cannot be quantized."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or weight is None or is_quantized(layer):
        return None
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or type(weight.data) is not torch.Tensor:
        return None  # the host has quantized it already
    return class_for(layer)


def class_for(layer):
    """Return the quantized class for the type and geometry of a layer, None if there is none."""
    if isinstance(layer, torch.nn.Linear):
        return QuantizedLinear
    plain = isinstance(layer, torch.nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return QuantizedConv2d if plain and not isinstance(layer.padding, str) else None


def is_quantized(layer):
    """Return whether an object is a quantized layer."""
    return isinstance(layer, _QuantizedLayer)


def quantized_layers(network):
    """Return {name: layer} of the quantized layers of a network."""
    return {name: layer for name, layer in network.named_modules() if is_quantized(layer)}


@contextlib.contextmanager
def straight_through(network):
    """Let derivatives pass the rounding of a network's quantized layers while this context is active.

    For derivatives, rounding counts as the identity within the clipping range (straight-through estimator, Bengio et al. 2013).
    Results are the same except for the order of sums, because products are computed in floating point.
    """
    layers = quantized_layers(network).values()
    try:
        for layer in layers:
            layer.passes_gradients = True
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("passes_gradients", None)
