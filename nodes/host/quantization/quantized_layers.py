"""The host's Linear and Conv2d layers with a quantized weight.

The parameter `weight` is the packed one: a plain tensor of bytes, which the host moves, offloads, pins, backs up and counts as
it does any other. `convert_weight` and `set_weight` are the host's own contract for weights that are not what they are computed
with: through them LoRAs and merges reach it when it is loaded. Those of an offloaded layer, and those of hooks, are laid on it
while it computes; what they come to is found out once.
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


TIMES = KernelTimes(lambda: PROFILES.beside("kernel_times.json"))
FASTEST, EIGHT_BIT, DEQUANTIZED = COMPUTE = "fastest", "8-bit", "dequantized"
FULL = "unquantized layer"  # timed beside what can stand for it
REMEMBERED = 16  # kinds of input of a layer: areas and chunks of other sizes come in turn


@dataclass(frozen=True)
class ActivationFormat:
    """bits: 16 (as they are) or 8. per_tensor: one scale for a whole tensor, instead of one for each row or batch item.
    compute: what multiplies activations of 8 bits, one of COMPUTE: 8-bit products; products with the dequantized weight, where
    activations stay as they are; or whichever is the faster, where a GPU can be timed, else the former.
    """

    bits: int = 16
    per_tensor: bool = False
    compute: str = FASTEST


class _Views(NamedTuple):
    """Of a packed weight: what `Packing.stored` returns, the scales of the output channels, float32 [O], and the factors."""

    parts: tuple[torch.Tensor, ...]
    of_rows: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None


class Change(NamedTuple):
    """What patches make of a packed weight: another one in its place (None: itself), and factors beside its branch, or None."""

    packed: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device):
        """Return the same on a device."""
        packed = None if self.packed is None else self.packed.to(device)
        return Change(packed, self.factors and tuple(factor.to(device) for factor in self.factors))


@dataclass(frozen=True)
class Choice:
    """What computes a layer, and in words why: "" where there is nothing else."""

    backend: str
    why: str = ""

    def __str__(self):
        return f"{self.backend} ({self.why})" if self.why else self.backend


class _QuantizedLayer:
    """What both kinds of layer share. packing: a Packing. activation: an ActivationFormat. input_scale: of calibrated
    activations, float32 of one number, set before an evaluation; None: taken from what comes in. passes_gradients: see
    `straight_through`. hooked: the Change that the hooks of what is evaluated make, if any. patches: those that `set_weight`
    is called with the result of, where these are known.
    """

    input_scale = None
    passes_gradients = False
    hooked = None
    patches = None
    _laid_on = None  # on an offloaded layer: its functions, on what they lie, and the Change that they make
    _chosen = MappingProxyType({})  # {what has come in, as `_seen` tells it: the Choice for it}
    _views = None  # of the weight where it lies: itself, its address, and its _Views

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
        """Take up a weight in floating point, as a change of what is there. Where it is to be in place, it has no room for a
        larger branch, and is rounded.
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
        """Return the Change that a MODEL's patches make to a packed weight. patched: returns the weight in floating point with
        them, which is not asked for where all are LoRAs whose factors can be taken as they are.
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
        """Evaluate the layer on x. Raises ValueError where the network has cast x to the type of the packed weight."""
        if not x.is_floating_point():
            raise ValueError(
                f"model: its network takes the type of what enters {self.name} from that layer's weight, so that it cannot be "
                "quantized; name it in exclude of the node that quantizes."
            )
        compute = self._compute_straight if self.passes_gradients else self._compute
        weight, bias = self._parameters["weight"], self._parameters["bias"]  # a module's attributes take longer
        if self._is_in_place(weight, bias, x):
            return compute(x, weight, bias)
        packed, bias, stream = self._at(x)
        try:
            return self._compute_changed(compute, x, packed, bias)
        finally:
            comfy.ops.uncast_bias_weight(self, packed, bias, stream)

    def _is_in_place(self, weight, bias, x):
        """Tell whether there is nothing to do for the host's `cast_bias_weight`, which takes half of a small layer's time:
        weight and bias are where x is, and nothing is to be laid on them.
        """
        if self.weight_function or self.bias_function or self.hooked is not None:
            return False
        if weight.device != x.device or weight.dtype != torch.int8:
            return False
        return bias is None or (bias.dtype == x.dtype and bias.device == x.device)

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

    def _compute_changed(self, compute, x, packed, bias):
        """Compute the layer for x with what hooks, and the patches of an offloaded layer, make of its packed weight."""
        hooked = Change() if self.hooked is None else self.hooked.to(x.device)
        packed = packed if hooked.packed is None else hooked.packed
        if not all(hasattr(function, "patches") for function in self.weight_function):  # of another pack
            return self._product(x, self._patched(packed, hooked).to(x.dtype), bias)
        laid = self._laid(packed).to(x.device) if self.weight_function else Change()
        packed = packed if laid.packed is None else laid.packed
        return compute(x, packed, bias, joined(laid.factors, hooked.factors))

    def _laid(self, packed):
        """Return the Change that an offloaded layer's patches make to a packed weight. It is found out once for those that the
        host has laid on it, and kept where its weight is.
        """
        on = self.hooked and self.hooked.packed, *self.weight_function
        if self._laid_on is None or len(self._laid_on[0]) != len(on) or any(map(operator.is_not, self._laid_on[0], on)):
            key = self.weight_function[0].key
            patches = [patch for function in self.weight_function for patch in function.patches[key]]
            change = self.changed_by(patches, lambda: with_patches(patches, key, self.convert_weight(packed)), packed)
            self._laid_on = on, change.to(self._parameters["weight"].device)
        return self._laid_on[1]

    def _patched(self, packed, hooked):
        """Return the weight, in floating point, that the functions on it make of a packed weight with the hooks' Change."""
        weight = self.convert_weight(self.with_change(packed, hooked))
        for function in self.weight_function:  # the host's own would round what it returns
            patches = getattr(function, "patches", None)
            weight = function(weight) if patches is None else with_patches(patches[function.key], function.key, weight)
        return weight

    def _stored(self, packed):
        """Return the _Views of a packed weight. Those of a weight that stays where it is are made once; those of one that is
        moved in every evaluation would hold on to its memory.
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
        self._views = self._laid_on = None  # the weight may go to another device, and leaves its memory then
        return super()._apply(*args, **kwargs)

    def __getstate__(self):  # of copies, which have a weight of their own
        apart = "_views", "_chosen", "_laid_on", "hooked", "patches"
        return {name: value for name, value in self.__dict__.items() if name not in apart}

    def rotated(self, x):
        """Return what comes in as it is quantized."""
        return rotate(x, self.packing.format.rotation) if self.packing.format.rotation else x

    def choice(self, device, x=None):
        """Return the Choice of what has computed this layer on a device for x, or for what came in last; where nothing has come
        in, what is to be tried.
        """
        if x is not None:
            return self._chosen.get(self._seen(x)) or self._by_rule(device)
        found = [choice for seen, choice in self._chosen.items() if seen[2] == torch.device(device)]
        return found[-1] if found else self._by_rule(device)

    def _by_rule(self, device):
        """Return the Choice on a device before anything is timed."""
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
        """Return the name of what computes the layer for x."""
        seen = self._seen(x)
        choice = self._chosen.get(seen)
        if choice is None:
            choice, is_final = self._found_out(x, packed, bias)
            if is_final:
                before = self._chosen if len(self._chosen) < REMEMBERED else {}
                self._chosen = {**before, seen: choice}
        return choice.backend

    def _found_out(self, x, packed, bias):
        """Return (Choice for x, whether it holds for the next time too). Each way is timed, where no layer of the kind was."""
        rule, rows = self._by_rule(x.device), x.numel() // self.packing.shape[1]
        if rule.backend == WEIGHT_ONLY or self.activation.compute == EIGHT_BIT or not TIMES.covers(x.device):
            return rule, True
        times = TIMES.of(x.device, self._kind(x), rows, self._ways(rule.backend, x, packed, bias))
        return _fastest(times, rule), bool(times)

    def _ways(self, backend, x, packed, bias):
        """Return {name: function} of the ways to compute the layer: unquantized, by its dequantized weight, by a backend. What
        patches have added to its branch is left out: it takes as long in any way.
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
        """Return what `_backend` does while torch.compile takes a graph, in which nothing can be timed: what was the faster way
        for the most rows that such a layer was timed for before.
        """
        backend = self._by_rule(x.device).backend
        if backend == WEIGHT_ONLY or self.activation.compute == EIGHT_BIT:
            return backend
        return _timed_before(x.device, self._kind(x), backend)

    def _kind(self, x):
        """Return in words what a layer's times depend on, but for the rows."""
        fmt, given = self.packing.format, self.input_scale is not None
        scales = "given" if given else "of the tensor" if self.activation.per_tensor or fmt.kind == "fp8" else "of each row"
        layout = ", channels last" if x.ndim == 4 and x.stride(1) == 1 else ""
        turned = f", rotated by {fmt.rotation}" if fmt.rotation else ""
        turned += f", groups of {fmt.group_size}" if fmt.two_scales else ""
        turned += f", rank {fmt.rank}" if fmt.rank else ""
        return f"{self._geometry()}, {fmt.kind}{turned}, x {str(x.dtype)[6:]}{layout}, scale {scales}"

    def _compute(self, x, packed, bias, added=None):
        """Compute the layer for x. added: factors beside those of the weight's own branch, or None."""
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
        """Return what comes out with what the low-rank branch, where there is one, makes of x, neither rounded nor rotated."""
        if factors is None:
            return out
        out_of, into = (factor.to(x.dtype) for factor in factors)
        return out + self._expanded(self._product(x, self.packing.shaped(into), None), out_of)

    def _multiplies_fp8(self, device):
        return False

    def _straight(self, rows):
        """Return rows [..., C] as they are rounded for the product, with the derivative of what is not rounded: 1 within the
        clipping range, 0 outside. The scale counts as a constant.
        """
        if self.packing.format.kind == "fp8":
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
        rows = x.permute(0, 2, 3, 1)  # a scale for each pixel
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
    """Return the Choice between what the rule says and the dequantized weight, by their times in microseconds, if there are
    some.
    """
    if not times:
        return rule
    names = rule.backend, WEIGHT_ONLY
    taken = ", ".join(f"{name} {times[name]:.3g}" for name in (*names, FULL))
    return Choice(min(names, key=times.get), f"microseconds: {taken}")


@torch.compiler.assume_constant_result
def _timed_before(device, kind, backend):
    """Return the faster one of a backend and the dequantized weight."""
    return _fastest(TIMES.known_of_most(device, kind, (FULL, WEIGHT_ONLY, backend)), Choice(backend)).backend


def quantized_class(layer):
    """Return the class of quantized layer for one of the host's, None where there is none."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or weight is None or is_quantized(layer):
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


def is_quantized(layer):
    """Tell whether something is a quantized layer."""
    return isinstance(layer, _QuantizedLayer)


def quantized_layers(network):
    """Return {name: layer} of the quantized layers of a network."""
    return {name: layer for name, layer in network.named_modules() if is_quantized(layer)}


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
