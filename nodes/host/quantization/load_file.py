"""Load quantized MODELs from files in the host's model folder for diffusion models."""

import functools
import itertools
import json

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ....iec_core.devices import has_float8
from ....iec_core.quantization.packing import Packing
from ....iec_core.quantization.quantized_file import QuantizedFile
from ....iec_core.quantization.two_scales import LARGEST_BITS
from ..builtin_model import CONFIG_OF_CLASS
from ..folders import ModelFolder
from .activation_scales import apply_scales
from .quantized_layers import FASTEST, ActivationFormat, class_for
from .quantized_network import (
    mark_quantized,
    network_state,
)

FILES = ModelFolder("diffusion_models")

# Tensors that no network has. From them the host knows how a model is to be used.
MARKS = (
    "v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "__index_timestep_zero__",
)  # fmt: skip


def load_quantized_model(name, compute=FASTEST):
    """Return the MODEL in a file that `save_quantized_model` wrote.

    compute: a field of its ActivationFormat. Raises ValueError, with a sentence, if the file does not exist or cannot be read.
    """
    base, scales = FILES.read("model_name", name, functools.partial(_read, compute))
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model = comfy.model_patcher.ModelPatcher(base.to(offload_device), load_device=device, offload_device=offload_device)
    model = mark_quantized(model)
    return model if scales is None else apply_scales(model, scales)


def _read(compute, path):
    """Return the BaseModel in a file, and its ActivationScales or None. Raises ValueError, with what is wrong with the file."""
    with QuantizedFile(path) as file:
        device = comfy.model_management.get_torch_device()
        if any(layer.format.kind == "fp8" for layer in file.layers.values()) and not has_float8(device):
            raise ValueError(
                f"its weights are float8, and this device ({device}) has no float8; save a model with weight_bits 8 or 4"
            )
        weights, scales = {key: file.tensor(key) for key in file.plain}, file.scales()
        make = functools.partial(
            made, file.about["network"], getattr(torch, file.about["dtype"]), weights, file.layers, file.settings
        )
        _check_before_memory(make, weights, file)
        base = make()
        _check_network(base, weights, file)
        _fill(base.diffusion_model, weights, file, compute)
        base.iec_quantization = file.about["name"]
        base.iec_fingerprint = torch.tensor(file.about["fingerprint"], dtype=torch.float32)
    return base, scales


def _check_before_memory(make, weights, file):
    """Check the model of make() on the meta device, before it takes memory.

    Besides large weights the host also allocates other tensors, whose sizes depend on numbers in the file.
    """
    try:
        with torch.device("meta"):
            base = make()
    except ValueError as error:
        if "meta" not in str(error):
            raise
    else:  # make() succeeded: the network reads no tensor values while it is made
        _check_network(base, weights, file)


def _check_network(base, weights, file):
    """Raise ValueError if a BaseModel does not match a file."""
    if type(base).__name__ != file.about["network"]:
        raise ValueError(f"it is a {file.about['network']}, but this ComfyUI would load it as a {type(base).__name__}")
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


def made(network, dtype, weights, layers, settings):
    """Return the BaseModel that the host makes from a file, in a torch dtype; its large weights have no values and no memory.

    network: the name of the BaseModel's class. weights: {name: tensor} of the tensors that are not quantized. layers: {name:
    LayerFile}. settings: dict of settings of the network that the host cannot detect from the weights. Raises ValueError if the
    host cannot make a model.
    """
    shapes = {f"{name}.weight": torch.empty(layer.shape, dtype=dtype, device="meta") for name, layer in layers.items()}
    weights = {**weights, **shapes}
    try:
        config = CONFIG_OF_CLASS[network]() if network in CONFIG_OF_CLASS else _detected(weights, settings)
        return _from_config(config, dtype, weights)
    except Exception as error:  # the host's code may raise anything for an arbitrary file
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"this ComfyUI cannot make a network from it ({type(error).__name__}: {words})") from error


def _detected(weights, settings):
    """Return the host's config for these weights. settings: dict of settings that cannot be detected from the weights."""
    detection = comfy.model_detection
    if settings and set(settings) & set(detection.detect_unet_config(weights, "") or {}):
        raise ValueError(f"its weights contradict its settings {', '.join(settings)}")
    about = {"config": json.dumps({"transformer": settings})} if settings else None
    config = detection.model_config_from_unet(weights, "", metadata=about)
    if config is None:
        raise ValueError("ComfyUI knows no model with such weights")
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
    """Return the host's operations, but with layers whose weights have no memory.

    The `iec_class` of a layer is the host's class. Raises ValueError, in a layer's constructor, if there are more than `most`
    layers, the number of weights in the file.
    """
    made = itertools.count(1)

    def without(kind):
        class WithoutMemory(kind):
            iec_class = kind

            def __init__(self, *args, **kwargs):
                if next(made) > most:
                    raise ValueError("its network would have more layers than the file has weights")
                super().__init__(*args, **{**kwargs, "device": "meta"})

            # Because this class overrides the method, the host creates the weights in the constructor, not only when it loads.
            def _load_from_state_dict(self, *args):
                super()._load_from_state_dict(*args)

        return WithoutMemory

    kinds = {name: without(getattr(operations, name)) for name in ("Linear", "Conv2d", "Embedding")}
    return type("WithoutMemory", (operations,), kinds)


def _fill(network, weights, file, compute):
    """Put the file's weights and quantized layers into a network. compute: how the quantized layers compute."""
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
