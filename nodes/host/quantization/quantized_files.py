"""Quantized MODELs in files of the host's model folder for diffusion models."""

import functools
import itertools
import json
from dataclasses import replace

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ....iec_core.devices import has_float8
from ....iec_core.file_kinds import QUANTIZED_MODEL
from ....iec_core.quantization.packing import Packing
from ....iec_core.quantization.quantized_file import LayerFile, QuantizedFile, description, layer_tensors, scale_tensors, write
from ....iec_core.quantization.two_scales import LARGEST_BITS
from ..builtin_model import CONFIG_OF_CLASS
from ..folders import ModelFolder
from .activation_scales import apply_scales, scales_of
from .quantized_layers import FASTEST, ActivationFormat, class_for, quantized_layers
from .quantized_network import (
    PREFIX,
    check_shapes,
    mark_quantized,
    network_state,
    patched_packed,
    quantization_of,
    warn_of_lost_changes,
)
from .weights import fingerprint, original_weight, patched_shape, patched_weight

FILES = ModelFolder("diffusion_models")

# By these tensors, which no network has, the host tells how a model is to be used.
MARKS = (
    "v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "__index_timestep_zero__",
)  # fmt: skip


def save_quantized_model(model, name):
    """Write a quantized MODEL, with the LoRAs and the scales of activations that lie on it. Return [what the file is called, a
    sentence on what opens it].

    Raises ValueError, with a sentence, where the MODEL is not quantized, the host would not make the same of its file, or the
    file cannot be written.
    """
    if quantization_of(model) is None:
        raise ValueError(
            "model: this MODEL is not quantized; put Quantize Model (IEC) in front, or save it with the host's nodes."
        )
    base = model.model
    check_shapes(model)
    _check_patches(model)
    warn_of_lost_changes(model)
    quantized = quantized_layers(base.diffusion_model)
    layers = {key: _layer_file(model, key, layer) for key, layer in quantized.items()}
    activation, scales = next(iter(quantized.values())).activation, scales_of(model)
    about = description(
        layers, quantization_of(model), {"bits": activation.bits, "per_tensor": activation.per_tensor}, _dtype_name(base),
        type(base).__name__, fingerprint(model), _settings_to_keep(base, layers), scales,
    )  # fmt: skip
    sources = _sources(model, layers, activation.bits, scale_tensors(scales))
    return [FILES.write(name, QUANTIZED_MODEL, lambda path: write(path, sources, about)), _what_opens(base, layers)]


def load_quantized_model(name, compute=FASTEST):
    """Return the MODEL in a file that `save_quantized_model` wrote. compute: of its ActivationFormat. Raises ValueError, with a
    sentence, where there is none, or none that can be read.
    """
    base, scales = FILES.read("model_name", name, functools.partial(_read, compute))
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = comfy.model_patcher.ModelPatcher(base.to(offload_device), load_device=device, offload_device=offload_device)
    model = mark_quantized(model)
    return model if scales is None else apply_scales(model, scales)


# What is written


def _layer_file(model, name, layer):
    """Return the LayerFile of a quantized MODEL's layer. What patches make of its weight is not kept, but found again when it
    is written, for all of it may not fit into memory.
    """
    rank = layer.packing.rank(patched_packed(model, name, layer))
    return LayerFile(tuple(layer.packing.shape), replace(layer.packing.format, rank=rank))


def _what_opens(base, layers):
    if type(base).__name__ in CONFIG_OF_CLASS:
        return "Only Load Quantized Model (IEC) opens it: ComfyUI does not know the network of the built-in model."
    others = [name for name, layer in layers.items() if not layer.is_hosts]
    if not others:
        return "ComfyUI's own Load Diffusion Model opens it too, from 0.33 on."
    named = others[0] if len(others) == 1 else f"{others[0]} and {len(others) - 1} more"
    return f"Only Load Quantized Model (IEC) opens it: ComfyUI has no such format for its layer {named}."


def _check_patches(model):
    """Raise ValueError where a patch enlarges a weight that is not quantized."""
    for name, tensor in _plain_tensors(model.model, quantized_layers(model.model.diffusion_model)).items():
        if PREFIX + name not in model.patches:
            continue
        shape = tuple(original_weight(model, PREFIX + name, tensor).shape)
        larger = patched_shape(model.patches.get(PREFIX + name), shape)
        if larger != shape:
            raise ValueError(
                f"model: it cannot be saved, for a LoRA enlarges its weight {name} from {shape} to {larger}, and ComfyUI would "
                "make another network of the file; keep the workflow that quantizes it."
            )


def _sources(model, layers, activation_bits, more):
    """Return what `write` wants to know of every tensor. more: {key: tensor} beside those of the network."""
    network = model.model.diffusion_model

    @functools.lru_cache(maxsize=1)
    def tensors(name):
        packed = patched_packed(model, name, comfy.utils.get_attr(network, name))
        return layer_tensors(name, layers[name], packed, activation_bits)

    def plain(name, tensor):
        key = PREFIX + name
        weight = original_weight(model, key, tensor)
        return patched_weight(model, key, weight).to(tensor.dtype)

    sources = {}
    for name, layer in layers.items():
        empty = torch.empty(Packing(layer.shape, layer.format).nbytes, dtype=torch.int8, device="meta")
        for key, tensor in layer_tensors(name, layer, empty, activation_bits).items():
            sources[key] = tensor.dtype, tensor.shape, lambda name=name, key=key: tensors(name)[key]
    for name, tensor in _plain_tensors(model.model, layers).items():
        sources[name] = tensor.dtype, tensor.shape, functools.partial(plain, name, tensor)
    for name, tensor in {**_marks(model.model), **more}.items():
        sources[name] = tensor.dtype, tensor.shape, lambda tensor=tensor: tensor
    return sources


def _plain_tensors(base, layers):
    """Return {name: tensor} of a BaseModel's network, of what is not quantized."""
    return {key: tensor for key, tensor in network_state(base).items() if key.removesuffix(".weight") not in layers}


def _marks(base):
    """Return those of MARKS by which the host makes the like of a BaseModel."""
    settings, empty = base.model_config.sampling_settings, torch.zeros(0)
    if base.model_config.unet_config.get("default_ref_method") == "index_timestep_zero":
        return {"__index_timestep_zero__": empty}
    if base.model_type.name == "V_PREDICTION":
        return {"v_pred": empty} | ({"ztsnr": empty} if settings.get("zsnr") else {})
    if base.model_type.name == "EDM":
        return {"edm_mean": empty, "edm_std": empty}
    if base.model_type.name == "V_PREDICTION_EDM":
        return {f"edm_vpred.{name}": torch.tensor(settings[name]) for name in ("sigma_max", "sigma_min") if name in settings}
    return {}


def _dtype_name(base):
    name = str(base.get_dtype()).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"model: its network is in {name}; one in float32, float16 or bfloat16 can be saved.")
    return name


def _settings_to_keep(base, layers):
    """Return the settings of a BaseModel's network, a dict, that its weights do not tell the host. Raises ValueError where the
    host would not make the like of it from its file.
    """
    apart = [name for name, _ in base.named_parameters() if not name.startswith(PREFIX)]
    kept = [name for name, weight in base.named_parameters() if type(weight.data) is not torch.Tensor]
    if apart or kept:
        why = "is not of its diffusion network" if apart else "is quantized by ComfyUI"
        raise ValueError(
            f"model: it cannot be saved, for its weight {[*apart, *kept][0]} {why}, and the file has no place for it."
        )
    if type(base).__name__ in CONFIG_OF_CLASS:
        return {}
    weights = {**_plain_tensors(base, layers), **_marks(base)}
    made = functools.partial(_made, type(base).__name__)
    try:
        again = made(base.get_dtype(), weights, layers, {})
        settings = _untold_settings(base, again)
        again = made(base.get_dtype(), weights, layers, settings) if settings else again
    except ValueError as error:
        raise ValueError(f"model: it cannot be saved, for it could not be loaded: {error}.") from error
    difference = _difference(base, again, layers)
    if difference:
        raise ValueError(
            f"model: it cannot be saved, for its weights do not tell ComfyUI its {difference}, and another model would be "
            "loaded."
        )
    return settings


def _difference(base, again, layers):
    """Return, in words, in what another BaseModel differs from a quantized one, None where in nothing."""
    one, other = base.model_config, again.model_config
    if type(base) is not type(again):
        return f"class {type(base).__name__}"
    if base.model_type != again.model_type or one.sampling_settings != other.sampling_settings:
        return f"sampling ({base.model_type.name}, {one.sampling_settings})"
    if type(base.latent_format) is not type(again.latent_format):
        return f"latents ({type(base.latent_format).__name__})"
    settings = _untold_settings(base, again)
    if settings:
        return f"settings {', '.join(settings)}"
    shapes = {name: tuple(tensor.shape) for name, tensor in network_state(base).items()}
    shapes |= {f"{name}.weight": layer.shape for name, layer in layers.items()}
    found = {name: tuple(tensor.shape) for name, tensor in network_state(again).items()}
    return next((f"weight {name}" for name in {**shapes, **found} if shapes.get(name) != found.get(name)), None)


def _untold_settings(base, again):
    """Return the settings of a BaseModel's network that another has not."""
    found = again.model_config.unet_config
    settings = base.model_config.unet_config.items()
    return {key: value for key, value in settings if key != "dtype" and not _are_alike(value, found.get(key))}


def _are_alike(one, other):
    """Tell whether two settings are the same; of lists of numbers the host takes the order from that of the file."""
    if (
        isinstance(one, (list, tuple))
        and isinstance(other, (list, tuple))
        and all(type(value) is int for value in (*one, *other))
    ):
        return sorted(one) == sorted(other)
    return one == other


# What is read


def _read(compute, path):
    """Return the BaseModel in a file, and its ActivationScales or None. Raises ValueError, with what is wrong with it."""
    with QuantizedFile(path) as file:
        device = comfy.model_management.get_torch_device()
        if any(layer.format.kind == "fp8" for layer in file.layers.values()) and not has_float8(device):
            raise ValueError(f"its weights are float8, which this device ({device}) has not; save one with weight_bits 8 or 4")
        weights, scales = {key: file.tensor(key) for key in file.plain}, file.scales()
        make = functools.partial(
            _made, file.about["network"], getattr(torch, file.about["dtype"]), weights, file.layers, file.settings
        )
        _check_before_memory(make, weights, file)
        base = make()
        _check_network(base, weights, file)
        _fill(base.diffusion_model, weights, file, compute)
        base.iec_quantization = file.about["name"]
        base.iec_fingerprint = torch.tensor(file.about["fingerprint"], dtype=torch.float32)
    return base, scales


def _check_before_memory(make, weights, file):
    """Check what make() returns while it has no memory: what the host makes besides large weights is as large as the numbers of
    the file say.
    """
    try:
        with torch.device("meta"):
            base = make()
    except ValueError as error:
        if "meta" not in str(error):
            raise
    else:  # not a network that looks at values while it is made
        _check_network(base, weights, file)


def _check_network(base, weights, file):
    """Raise ValueError where a BaseModel is not that of a file."""
    if type(base).__name__ != file.about["network"]:
        raise ValueError(f"it is of a {file.about['network']}, and this ComfyUI would make a {type(base).__name__} of it")
    wanted = {name: tuple(tensor.shape) for name, tensor in network_state(base).items()}
    missing = set(wanted) - set(weights) - {f"{name}.weight" for name in file.layers}
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    for name, layer in file.layers.items():
        if wanted.get(f"{name}.weight") != layer.shape:
            raise ValueError(f"its network has no layer {name} of shape {layer.shape}")
    for name, tensor in weights.items():
        if name not in MARKS and wanted.get(name) != tuple(tensor.shape):
            raise ValueError(f"its network has no weight {name} of shape {tuple(tensor.shape)} and type {tensor.dtype}")


def _made(network, dtype, weights, layers, settings):
    """Return the BaseModel that the host makes of a file, in a torch dtype; its large weights have no values and no memory.

    network: the name of its class. weights: {name: tensor} of those that are not quantized. layers: {name: LayerFile}.
    settings: dict, what the weights do not tell of the network. Raises ValueError where the host makes none.
    """
    shapes = {f"{name}.weight": torch.empty(layer.shape, dtype=dtype, device="meta") for name, layer in layers.items()}
    weights = {**weights, **shapes}
    try:
        config = CONFIG_OF_CLASS[network]() if network in CONFIG_OF_CLASS else _detected(weights, settings)
        return _from_config(config, dtype, weights)
    except Exception as error:  # of the host's code, on whatever is in a file
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"this ComfyUI cannot make a network of it ({type(error).__name__}: {words})") from error


def _detected(weights, settings):
    """Return the host's config for weights. settings: dict, what the weights do not tell."""
    detection = comfy.model_detection
    if settings and set(settings) & set(detection.detect_unet_config(weights, "") or {}):
        raise ValueError(f"the weights tell otherwise than the settings {', '.join(settings)}")
    about = {"config": json.dumps({"transformer": settings})} if settings else None
    config = detection.model_config_from_unet(weights, "", metadata=about)
    if config is None:
        raise ValueError("its weights are of no model that it knows")
    return config


def _from_config(config, dtype, weights):
    management = comfy.model_management
    cast = management.unet_manual_cast(dtype, management.get_torch_device(), config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    fast = config.optimizations.get("fp8", False)
    operations = comfy.ops.pick_operations(dtype, cast, fp8_optimizations=fast, model_config=config)
    config.custom_operations = _without_memory(operations, len(weights))
    base = config.get_model(weights, "")
    config.custom_operations = None
    for module in base.modules():
        module.__class__ = getattr(module, "iec_class", module.__class__)
    return base


def _without_memory(operations, most):
    """Return the host's operations, but with layers whose weights have no memory. Their `iec_class` is the host's. They raise
    ValueError where there are to be more than `most`, which a file has weights for.
    """
    made = itertools.count(1)

    def without(kind):
        class WithoutMemory(kind):
            iec_class = kind

            def __init__(self, *args, **kwargs):
                if next(made) > most:
                    raise ValueError("its network would have more layers than the file has weights")
                super().__init__(*args, **{**kwargs, "device": "meta"})

            def _load_from_state_dict(self, *args):  # by one of its own the host tells that weights are to be made now
                super()._load_from_state_dict(*args)

        return WithoutMemory

    kinds = {name: without(getattr(operations, name)) for name in ("Linear", "Conv2d", "Embedding")}
    return type("WithoutMemory", (operations,), kinds)


def _fill(network, weights, file, compute):
    """Give a network the file's weights, and put quantized layers where the file has them, which compute as asked for."""
    activation = ActivationFormat(**file.about["activation"], compute=compute)
    modules = dict(network.named_modules())
    for key, tensor in weights.items():
        if key not in MARKS:
            _set(modules, key, tensor)
    for name, layer in file.layers.items():
        kind = class_for(modules.get(name))
        if kind is None:
            raise ValueError(f"its network has no layer {name} of shape {layer.shape}")
        packing, packed = Packing(layer.shape, layer.format), file.packed(name)
        scale, factors = packing.scale(packed), packing.factors(packed) or ()
        if not all(part.isfinite().all() for part in (scale, *factors)):
            raise ValueError(f"{name} has a scale or a factor that is not finite")
        if layer.format.calibrated and not (scale > 0).all():
            raise ValueError(f"{name} has a scale that is not above 0")
        if layer.format.two_scales and (packing.stored(packed)[2] > LARGEST_BITS).any():
            raise ValueError(f"{name} has a group whose scale is out of its range")
        quantized = kind.of(name, modules[name], packing, packed, modules[name].bias, activation)
        comfy.utils.set_attr(network, name, quantized)


def _set(modules, key, tensor):
    owner, _, name = key.rpartition(".")
    module = modules.get(owner)
    before = None if module is None else module._parameters.get(name, module._buffers.get(name))
    if before is None or before.shape != tensor.shape or before.is_floating_point() != tensor.is_floating_point():
        raise ValueError(f"its network has no weight {key} of shape {tuple(tensor.shape)} and type {tensor.dtype}")
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
