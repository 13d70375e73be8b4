"""The built-in model as a MODEL of the host: a class-conditional pixel-space U-Net that predicts v.

The class label reaches the network as one-hot vector twice, as SDXL's conditioning does: as the only token of the
cross-attention context, and added to the timestep embedding. A dropped label is a vector of zeros.
"""

import functools
import json
import pathlib

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import safetensors
import torch

PATH = pathlib.Path(__file__).parent.parent / "assets" / "emoji32.safetensors"


class PixelFormat(comfy.latent_formats.LatentFormat):
    """Pixels in -1..1 as latents: three channels, full resolution."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class BuiltinModel(comfy.model_base.BaseModel):
    """The host's BaseModel with the class label, carried as the pooled output, added to the timestep embedding."""

    def encode_adm(self, **kwargs):
        label = kwargs.get("pooled_output")
        if label is None or label.shape[-1] != self.adm_channels:
            raise ValueError("conditioning: the built-in model takes that of Class Label (IEC), and this is another.")
        return label


class BuiltinConfig(comfy.supported_models_base.BASE):
    """What the host wants to know of a model family."""

    unet_extra_config = {}
    latent_format = PixelFormat
    memory_usage_factor = 1.0

    def get_model(self, state_dict, prefix="", device=None):
        return BuiltinModel(self, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device)


@functools.cache
def metadata():
    """Return the model file's metadata: {"unet_config": dict, "classes": list of names, "training": dict}."""
    with safetensors.safe_open(PATH, "pt") as file:
        facts = file.metadata()
    return {name: json.loads(facts["iec." + name]) for name in ("unet_config", "classes", "training")}


def load_builtin_model(dtype=None):
    """Return the built-in model as a ModelPatcher; dtype: torch dtype of the network, None for the host's choice."""
    weights = comfy.utils.load_torch_file(str(PATH))
    management = comfy.model_management
    if dtype is None:
        count, supported = comfy.utils.calculate_parameters(weights), BuiltinConfig.supported_inference_dtypes
        dtype = management.unet_dtype(model_params=count, supported_dtypes=supported)
    model = empty_builtin_model(dtype)
    model.load_model_weights({name: tensor.to(dtype) for name, tensor in weights.items()})  # the host may take them as they are
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload_device)


def empty_builtin_model(dtype):
    """Return the built-in model's BaseModel, its network in a torch dtype and without values."""
    management, config = comfy.model_management, BuiltinConfig(metadata()["unet_config"])
    device, supported = management.get_torch_device(), config.supported_inference_dtypes
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    return config.get_model({}).to(management.unet_offload_device())


def class_conditioning(labels):
    """Return CONDITIONING for a batch of class names, one image each; "none" stands for no label.

    Raises ValueError for a name that the model does not know.
    """
    classes = metadata()["classes"]
    unknown = [label for label in labels if label not in classes and label != "none"]
    if unknown or not labels:
        named = f"'{unknown[0]}' is not a class" if unknown else "no class is named"
        raise ValueError(f"labels: {named} of the built-in model; its classes are none, {', '.join(classes)}.")
    one_hot = torch.tensor([[float(label == name) for name in classes] for label in labels])
    return [[one_hot[:, None], {"pooled_output": one_hot}]]
