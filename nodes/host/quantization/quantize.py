"""Make a MODEL with quantized weights from another MODEL.

The network is copied without its weights. Weights that stay in floating point are shared with the source; the others are
quantized one at a time. Everything else on the source MODEL (patches, hooks, wrappers, options) is kept. A LoRA on a weight
that is quantized is merged into the weight first.
"""

import copy
import hashlib
import uuid
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ....iec_core.devices import has_float8
from ....iec_core.log import logger
from ....iec_core.quantization.packing import BITS, Packing, WeightFormat, rotation_size
from .quantized_layers import ActivationFormat, is_host_state, quantized_class
from .quantized_network import KEY, PREFIX, mark_quantized, quantization_of
from .weights import fingerprint, is_same, original_weight, patched_shape, patched_weight

# Names, in the host's networks, of modules that embed the timestep and the label.
EMBEDDINGS = (
    "time_embed",
    "label_emb",
    "time_in",
    "vector_in",
    "guidance_in",
    "t_embedder",
    "y_embedder",
    "time_embedding",
    "time_projection",
    "time_proj",
    "timestep_embedder",
    "time_text_embed",
)

# Names, in the host's networks, of the last layers of attention and of feed-forward networks.
OUTPUT_PROJECTIONS = (
    "*.to_out.0", "*.to_add_out", "*.attn.proj", "*_attn.proj", "*.self_attn.o", "*.cross_attn.o", "*.ff.net.2",
    "*.ff_context.net.2", "*_mlp.2", "*.ffn.2", "*.mlp.fc2", "*.linear2",
)  # fmt: skip


@dataclass(frozen=True)
class LayerRules:
    """The rules that select the layers to quantize.

    include: patterns of layers to quantize; none: all layers. exclude: patterns of layers not to quantize. keep_sensitive: do
    not quantize the embeddings of timestep and label, the first and the last of the other layers (in a U-Net the first and the
    last convolution), and a transformer's final layer. keep_outputs: do not quantize the last layers of attention and of
    feed-forward networks. A pattern is a layer name in which * matches anything.
    """

    keep_sensitive: bool = True
    keep_outputs: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def select(self, names):
        """Return the names, in the network's order, that are quantized. Raises ValueError if a pattern matches no name."""
        for option in ("include", "exclude"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"{option}: '{pattern}' matches none of this MODEL's {len(names)} Linear and Conv2d layers, which "
                        f"have names such as {names[len(names) // 2]}; write such names, with * for any part of a name."
                    )
        kept = self._kept(names)
        return [
            name
            for name in names
            if name not in kept
            and (not self.include or any(fnmatchcase(name, pattern) for pattern in self.include))
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        ]

    def _kept(self, names):
        kept = set()
        if self.keep_sensitive:
            kept = {name for name in names if set(EMBEDDINGS) & set(name.split("."))}
            others = [name for name in names if name not in kept]
            kept |= {*others[:1], *others[-1:], *(name for name in others if name.startswith("final_layer."))}
        if self.keep_outputs:
            kept |= {name for name in names if any(fnmatchcase(name, pattern) for pattern in OUTPUT_PROJECTIONS)}
        return kept


def parse_patterns(text):
    """Return the patterns of an `include` or `exclude` text, separated by commas, spaces or line breaks."""
    return tuple(text.replace(",", " ").split())


def _short(patterns):
    """Return patterns as text. A text over 60 characters becomes their number and a digest that identifies them."""
    text = " ".join(patterns)
    return text if len(text) <= 60 else f"{len(patterns)} names ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


@dataclass(frozen=True)
class Quantization:
    """The requested quantization of a MODEL.

    rotate: whether the inputs of Linear layers are rotated if their number allows it. mixed: the average bits per weight if
    some layers have other bits than `weight` says; None if all layers have the same.
    """

    weight: WeightFormat
    activation: ActivationFormat
    rules: LayerRules = LayerRules()
    rotate: bool = False
    mixed: float | None = None

    @property
    def name(self):
        """The usual short name, such as W8A8, with words for every setting that is not the default."""
        bits = f"{self.mixed:.2f}" if self.mixed else BITS[self.weight.kind]
        return f"{'FP8 ' if self.weight.kind == 'fp8' else ''}W{bits}A{self.activation.bits}{self._details()}"

    def _details(self):
        details = [
            "mixed" if self.mixed else "",
            f"groups of {self.weight.group_size}" if self.weight.group_size else "",
            "scales by search" if self.weight.search else "",
            "GPTQ" if self.weight.calibrated else "",
            f"rank {self.weight.rank}" if self.weight.rank else "",
            "rotated" if self.rotate else "",
            "one scale a tensor" if self.activation.per_tensor else "",
            "output projections kept" if self.rules.keep_outputs else "",
            f"only {_short(self.rules.include)}" if self.rules.include else "",
            f"not {_short(self.rules.exclude)}" if self.rules.exclude else "",
        ]
        whole = "" if self.rules.keep_sensitive else " of all layers"
        return whole + "".join(f", {detail}" for detail in details if detail)

    def packing(self, shape):
        """Return the Packing of a weight of this shape."""
        rotation = rotation_size(shape[1]) if self.rotate and len(shape) == 2 else 0
        return Packing(shape, replace(self.weight, rotation=rotation))

    def with_bits(self, kind):
        """Return this Quantization with another kind of weights, without the options that only its own kind has."""
        group_size = 0 if self.weight.two_scales else self.weight.group_size
        return replace(self, weight=replace(self.weight, kind=kind, rank=0, two_scales=False, group_size=group_size))


def quantizable_layers(network):
    """Return {name: layer} of the Linear and Conv2d layers that can be quantized."""
    return {name: layer for name, layer in network.named_modules() if quantized_class(layer)}


def quantize_model(model, quantization):
    """Return a MODEL like this one with quantized weights. The source is not changed.

    Raises ValueError if the MODEL has no layer to quantize, is quantized already or compiled, or if a pattern matches no layer.
    """
    layers = layers_to_quantize(model, quantization)
    bar, replaced = comfy.utils.ProgressBar(len(layers)), {}
    for name, layer in layers.items():
        packing = quantization.packing(weight_shape(model, name, layer))
        packed = packing.quantize(weight_to_quantize(model, name, layer))
        replaced[layer] = quantized_layer(model, name, layer, packing, packed, quantization)
        bar.update(1)
    return with_quantized_layers(model, quantization, replaced)


def layers_to_quantize(model, quantization):
    """Return {name: layer} of a MODEL's layers to quantize. Raises ValueError like `quantize_model`."""
    if quantization_of(model):
        raise ValueError("model: this MODEL is quantized already; connect the MODEL from before the node that quantized it.")
    if quantization.weight.kind == "fp8" and not has_float8(model.load_device):
        raise ValueError(
            f"weight_bits: fp8 does not work on this device ({model.load_device}), which has no float8; choose 8 or 4."
        )
    bound = [key for key in model.object_patches if key.split(".")[0] == "diffusion_model"]
    if bound or model.injections:
        raise ValueError(
            f"model: this MODEL has a patch on {bound[0] if bound else 'the calls of its layers'} that belongs to the "
            "unquantized network, such as a compiled block or a bypass LoRA; put the node that makes the patch after this "
            "one."
        )
    if "torch.compile" in model.wrappers.get(WrappersMP.APPLY_MODEL, {}):
        raise ValueError(
            "model: this MODEL is compiled, and a compiled MODEL cannot be quantized; put the node that compiles after this "
            "one."
        )
    # Object patches of other clones do not belong to this MODEL. Each run applies its own.
    model.unpatch_model(unpatch_weights=False)
    layers = quantizable_layers(model.model.diffusion_model)
    if not layers:
        raise ValueError("model: this MODEL has no Linear or Conv2d layer in floating point to quantize.")
    chosen = _without_enlarged(model, layers, quantization.rules.select(list(layers)))
    if not chosen:
        raise ValueError(
            "include, exclude, keep_sensitive_layers: together they leave no layer to quantize; change them so that some "
            "layers can be quantized."
        )
    return {name: layers[name] for name in chosen}


def weight_to_quantize(model, name, layer):
    """Return the weight of a layer in floating point, with the MODEL's patches for it, on the MODEL's load device."""
    key = f"{PREFIX}{name}.weight"
    return patched_weight(model, key, original_weight(model, key, layer.weight).to(model.load_device))


def quantized_layer(model, name, layer, packing, packed, quantization):
    """Return the quantized layer that replaces a layer of the MODEL. packed: its weight in the format of `packing`."""
    bias = None if layer.bias is None else _own(model, f"{PREFIX}{name}.bias", layer.bias)
    packed = packed.to(model.offload_device)
    return quantized_class(layer).of(name, layer, packing, packed, bias, quantization.activation)


def with_quantized_layers(model, quantization, replaced):
    """Return a MODEL like this one with replaced layers, without the patches on their weights.

    replaced: {layer: its quantized layer}.
    """
    model.unpatch_model(unpatch_weights=False)  # removes object patches that a run has applied since
    base = _copy_of_model(model, replaced)
    base.iec_quantization, base.iec_fingerprint = quantization.name, fingerprint(model)
    return _patcher(model, base, [f"{PREFIX}{layer.name}.weight" for layer in replaced.values()])


def weight_shape(model, name, layer):
    """Return the shape of a layer's original weight, a tuple. The weight that the host has patched may have another shape."""
    return tuple(original_weight(model, f"{PREFIX}{name}.weight", layer.weight).shape)


def _without_enlarged(model, layers, names):
    """Return the names without layers whose weight a patch enlarges.

    The host reads the shapes of such weights to find out which inputs the network takes, so these layers and their patch are
    not changed.
    """

    def is_enlarged(name):
        shape = weight_shape(model, name, layers[name])
        return patched_shape(model.patches.get(f"{PREFIX}{name}.weight"), shape) != shape

    enlarged = [name for name in names if is_enlarged(name)]
    if enlarged:
        logger.info(f"Not quantized, because a LoRA enlarges the weight: {', '.join(enlarged)}.")
    return [name for name in names if name not in enlarged]


def source_of(quantized, full_precision):
    """Return a clone of the MODEL that a quantized MODEL was made from. The host loads the quantized MODEL together with it.

    full_precision: the source. Raises ValueError if it is None, or not the MODEL that the quantized one was made from.
    """
    if full_precision is None:
        raise ValueError(
            "full_precision: the model is quantized, so the MODEL that it was made from is needed too; connect that MODEL here."
        )
    if quantization_of(full_precision) or not is_same(fingerprint(full_precision), fingerprint(quantized)):
        raise ValueError("full_precision: this is not the MODEL that the quantized one was made from; connect that MODEL.")
    source = full_precision.clone()
    source.set_additional_models(KEY, [quantized])
    return source


def _own(model, key, tensor):
    """Return a tensor of the MODEL as before the host loaded and patched it, on the offload device."""
    return original_weight(model, key, tensor).to(model.offload_device)


def _copy_of_model(model, replaced):
    """Return a copy of the MODEL's BaseModel with replaced layers. All other weights on the offload device are shared."""
    source = model.model
    copies = {module: replaced.get(module) or module.__class__.__new__(module.__class__) for module in source.modules()}
    memo = {id(module): new for module, new in copies.items()}
    for prefix, module in source.named_modules():
        if module not in replaced:
            own = [*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False)]
            memo.update({id(tensor): _shared(model, name, tensor, _type_when_loaded(module, name)) for name, tensor in own})
    for shared in (source.model_config, getattr(source, "latent_format", None)):
        memo[id(shared)] = shared
    for module, new in copies.items():
        if module not in replaced:
            own = {name: value for name, value in module.__dict__.items() if not is_host_state(name)}
            new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in own.items()})
    base = copies[source]
    base.device, base.current_patcher = model.offload_device, None
    return base


def _type_when_loaded(module, key):
    """Return the dtype to which ComfyUI 0.33's dynamic loader casts a parameter, None if it does not cast this one."""
    return getattr(module, f"{key.rpartition('.')[2]}_comfy_model_dtype", None)


def _shared(model, key, tensor, dtype):
    """Return a parameter or buffer for the copy.

    It shares memory with the tensor if that is on the offload device and has this dtype (None: any dtype).
    """
    value = _own(model, key, tensor).to(dtype or tensor.dtype)
    return torch.nn.Parameter(value, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else value


def _patcher(model, base, baked):
    """Return the MODEL of a BaseModel, with everything that is on `model` except the patches on the keys `baked`."""
    dynamic = getattr(model, "is_dynamic", lambda: False)()
    kind = comfy.model_patcher.ModelPatcher if dynamic else type(model)
    template = kind.__new__(kind)
    template.__dict__.update(model.__dict__)
    template.__dict__.pop("non_dynamic_delegate_model", None)  # a second network of the source
    template.additional_models = {key: models for key, models in model.additional_models.items() if key != "multigpu"}
    template.model, template.size = base, 0
    template.backup, template.backup_buffers, template.object_patches_backup = {}, {}, {}
    template.hook_backup, template.cached_hook_patches, template.pinned = {}, {}, set()
    template.current_hooks, template.is_injected = None, False
    # References that would keep the source in memory, or make the host confuse the new MODEL with the source.
    template.parent, template.cached_patcher_init, template.clone_base_uuid = None, None, uuid.uuid4()
    quantized = template.clone()
    for key in baked:
        quantized.patches.pop(key, None)
    return mark_quantized(quantized)
