"""The built-in models as MODELs of the host: a U-Net that predicts v, and a flow-matching transformer.

Both are class-conditional and work in pixel space. The class label reaches the network as a one-hot vector in two ways, like
the conditioning of SDXL and Flux: as the only token of the context, and added to the timestep embedding. A dropped label is a
vector of zeros.
"""

import functools
import json
import pathlib

import comfy.latent_formats
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import safetensors
import torch

ASSETS = pathlib.Path(__file__).parent.parent / "assets"


class PixelFormat(comfy.latent_formats.LatentFormat):
    """Latents that are pixels in -1..1: three channels, full resolution."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class _ClassLabel:
    """Adds the class label, which is the pooled output of the conditioning, to the timestep embedding."""

    def encode_adm(self, **kwargs):
        label = kwargs.get("pooled_output")
        if label is None or label.shape[-1] != len(self.model_config.classes):
            raise ValueError(
                "conditioning: it is not from Class Label (IEC), which the built-in model needs; connect Class Label (IEC) to "
                "positive and negative."
            )
        return label


class BuiltinModel(_ClassLabel, comfy.model_base.BaseModel):
    """The host's BaseModel with the class label; the network is the host's U-Net."""


class BuiltinTransformer(_ClassLabel, comfy.model_base.Flux):
    """The host's Flux with the class label."""


class BuiltinConfig(comfy.supported_models_base.BASE):
    """The config of a model family that the host needs, for the built-in U-Net."""

    unet_extra_config = {}
    latent_format = PixelFormat
    memory_usage_factor = 1.0
    path = ASSETS / "emoji32.safetensors"
    model_type, model_class = comfy.model_base.ModelType.V_PREDICTION, BuiltinModel

    def __init__(self):
        about = metadata(self.path)
        super().__init__(about["unet_config"])
        self.classes = about["classes"]

    def get_model(self, state_dict, prefix="", device=None):
        return self.model_class(self, model_type=self.model_type, device=device)


class BuiltinTransformerConfig(BuiltinConfig):
    """The config for the built-in transformer. Its network gets sigma itself as the time (multiplier 1)."""

    sampling_settings = {"shift": 1.0, "multiplier": 1.0}
    path = ASSETS / "emoji32_flow.safetensors"
    model_type, model_class = comfy.model_base.ModelType.FLOW, BuiltinTransformer

    def __init__(self):
        super().__init__()
        if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:  # hosts of 2026 require this field
            self.unet_config["txt_ids_dims"] = []

    def process_unet_state_dict(self, state_dict):
        """Return the weights with the names that this host's Flux uses; hosts of 2026 renamed some."""
        return comfy.supported_models.Flux.process_unet_state_dict(self, state_dict)


ARCHITECTURES = {"unet": BuiltinConfig, "transformer": BuiltinTransformerConfig}
CONFIG_OF_CLASS = {config.model_class.__name__: config for config in ARCHITECTURES.values()}


@functools.cache
def metadata(path=BuiltinConfig.path):
    """Return the metadata of a model file: {"unet_config": dict, "classes": list of names}."""
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
    return {name: json.loads(facts["iec." + name]) for name in ("unet_config", "classes")}


def load_builtin_model(dtype=None, architecture="unet"):
    """Return a built-in model as a ModelPatcher.

    dtype: torch dtype of the network, None for the dtype that the host chooses. architecture: a key of ARCHITECTURES.
    """
    config = ARCHITECTURES[architecture]()
    weights = comfy.utils.load_torch_file(str(config.path))
    management = comfy.model_management
    if dtype is None:
        count, supported = comfy.utils.calculate_parameters(weights), config.supported_inference_dtypes
        dtype = management.unet_dtype(model_params=count, supported_dtypes=supported)
    model = _empty_model(config, dtype)
    # The host may use these tensors without a cast, so they are cast here.
    model.load_model_weights({name: tensor.to(dtype) for name, tensor in weights.items()})
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload_device)


def _empty_model(config, dtype):
    """Return the BaseModel of a built-in model's config, with the network in a torch dtype and without weights."""
    management = comfy.model_management
    device, supported = management.get_torch_device(), config.supported_inference_dtypes
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    return config.get_model({}).to(management.unet_offload_device())


def class_conditioning(labels):
    """Return CONDITIONING for a list of class names, one per image of the batch; "none" means no label.

    Raises ValueError if a name is not a class of the model, or if there is no name.
    """
    classes = metadata()["classes"]
    unknown = [label for label in labels if label not in classes and label != "none"]
    if unknown or not labels:
        named = f"'{unknown[0]}' is not a class" if unknown else "it names no class"
        raise ValueError(f"labels: {named} of the built-in model; write none or one of its classes: {', '.join(classes)}.")
    one_hot = torch.tensor([[float(label == name) for name in classes] for label in labels])
    return [[one_hot[:, None], {"pooled_output": one_hot}]]
