"""Save quantized MODELs to files in the host's model folder for diffusion models."""

import functools
from dataclasses import replace

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ....iec_core.file_kinds import QUANTIZED_MODEL
from ....iec_core.quantization.packing import Packing
from ....iec_core.quantization.quantized_file import LayerFile, description, layer_tensors, scale_tensors, write
from ..builtin_model import CONFIG_OF_CLASS
from .activation_scales import scales_of
from .load_file import FILES, made
from .quantized_layers import quantized_layers
from .quantized_network import (
    PREFIX,
    check_shapes,
    network_state,
    patched_packed,
    quantization_of,
    warn_of_lost_changes,
)
from .weights import fingerprint, original_weight, patched_shape, patched_weight


def save_quantized_model(model, name):
    """Write a quantized MODEL with its LoRAs and activation scales. Return [name of the file, sentence on what can open it].

    Raises ValueError, with a sentence, if the MODEL is not quantized, if the host would make another model from the file, or if
    the file cannot be written.
    """
    if quantization_of(model) is None:
        raise ValueError(
            "model: this MODEL is not quantized; put Quantize Model (IEC) before this node, or save it with ComfyUI's own "
            "nodes."
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


def _layer_file(model, name, layer):
    """Return the LayerFile of a quantized MODEL's layer.

    The patched weight is not kept, but computed again when it is written, because all patched weights together may not fit into
    memory.
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
    """Raise ValueError if a patch enlarges a weight that is not quantized."""
    for name, tensor in _plain_tensors(model.model, quantized_layers(model.model.diffusion_model)).items():
        if PREFIX + name not in model.patches:
            continue
        shape = tuple(original_weight(model, PREFIX + name, tensor).shape)
        larger = patched_shape(model.patches.get(PREFIX + name), shape)
        if larger != shape:
            raise ValueError(
                f"model: it cannot be saved, because a LoRA enlarges its weight {name} from {shape} to {larger}, and ComfyUI "
                "would load another network from the file; keep the workflow that quantizes it."
            )


def _sources(model, layers, activation_bits, more):
    """Return {key: (dtype, shape, function that returns the tensor)} for `write`. more: further {key: tensor}."""
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
    """Return {name: tensor} of the tensors of a BaseModel's network that are not quantized."""
    return {key: tensor for key, tensor in network_state(base).items() if key.removesuffix(".weight") not in layers}


def _marks(base):
    """Return {name: tensor} of the MARKS with which the host makes a BaseModel of the same kind."""
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
        raise ValueError(f"model: its network is in {name}; only float32, float16 and bfloat16 can be saved.")
    return name


def _settings_to_keep(base, layers):
    """Return the settings of a BaseModel's network, a dict, that the host cannot detect from its weights.

    Raises ValueError if the host would make another model from the file.
    """
    apart = [name for name, _ in base.named_parameters() if not name.startswith(PREFIX)]
    kept = [name for name, weight in base.named_parameters() if type(weight.data) is not torch.Tensor]
    if apart or kept:
        why = "is not part of its diffusion network" if apart else "is quantized by ComfyUI"
        raise ValueError(
            f"model: it cannot be saved, because its weight {[*apart, *kept][0]} {why}, and the file cannot store such a "
            "weight."
        )
    if type(base).__name__ in CONFIG_OF_CLASS:
        return {}
    weights = {**_plain_tensors(base, layers), **_marks(base)}
    make = functools.partial(made, type(base).__name__)
    try:
        again = make(base.get_dtype(), weights, layers, {})
        settings = _untold_settings(base, again)
        again = make(base.get_dtype(), weights, layers, settings) if settings else again
    except ValueError as error:
        raise ValueError(f"model: it cannot be saved, because it could not be loaded again: {error}.") from error
    difference = _difference(base, again, layers)
    if difference:
        raise ValueError(
            f"model: it cannot be saved, because ComfyUI cannot detect its {difference} from the weights and would load "
            "another model."
        )
    return settings


def _difference(base, again, layers):
    """Return, in words, how another BaseModel differs from a quantized one, None if it does not."""
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
    """Return the settings of a BaseModel's network that differ in another BaseModel, a dict."""
    found = again.model_config.unet_config
    settings = base.model_config.unet_config.items()
    return {key: value for key, value in settings if key != "dtype" and not _are_alike(value, found.get(key))}


def _are_alike(one, other):
    """Return whether two settings are equal. The order in lists of numbers is ignored: the host takes it from the file."""
    if (
        isinstance(one, (list, tuple))
        and isinstance(other, (list, tuple))
        and all(type(value) is int for value in (*one, *other))
    ):
        return sorted(one) == sorted(other)
    return one == other
