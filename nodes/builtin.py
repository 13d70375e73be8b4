"""The built-in models: their loader, and their class labels as CONDITIONING."""

import torch
from comfy_api.latest import io

from ..iec_core.choices import unknown_choice
from .host.builtin_model import ARCHITECTURES, class_conditioning, load_builtin_model
from .host.inputs import CheckedNode, known_values
from .host.schema import schema

PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class IECLoadBuiltinModel(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECLoadBuiltinModel",
            display_name="Load Built-in Model (IEC)",
            category="loaders/IEC",
            description="A small diffusion model of emoji that comes with the pack: 32 x 32 pixels, class-conditional. Wire "
            "EmptyChromaRadianceLatentImage (32 x 32) as latent and VAELoader with pixel_space as VAE.",
            search_aliases=["emoji", "demo model", "example model", "test model", "tiny model", "without download"],
            inputs=[
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Number type of the network. auto: the type that ComfyUI chooses for the device.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default="unet",
                    optional=True,
                    tooltip="unet: blocks of SD 1.5 and SDXL, predicts v. transformer: blocks of Flux, flow matching.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The built-in model.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, precision=None, architecture=None):
        bad = unknown_choice(PRECISIONS, precision=precision) or unknown_choice(ARCHITECTURES, architecture=architecture)
        return bad or True

    @classmethod
    def run(cls, precision, architecture="unet"):
        return io.NodeOutput(load_builtin_model(PRECISIONS[precision], architecture))


def split_labels(labels):
    """Return the class names of a comma-separated text."""
    return [name for part in labels.split(",") if (name := " ".join(part.lower().split()))]


class IECClassLabel(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECClassLabel",
            display_name="Class Label (IEC)",
            category="conditioning/IEC",
            description="Class labels of the built-in model as conditioning, one for each image of the batch.",
            search_aliases=["emoji", "class conditioning", "prompt of the built-in model"],
            inputs=[
                io.String.Input(
                    "labels",
                    default="face, heart, fruit, clock",
                    tooltip="Class names, separated by commas, for the images of the batch in turn; with more images than "
                    "names they begin again. none is no label, as for the negative. The help page lists the classes.",
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="Conditioning for the built-in model.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, labels=None):
        try:
            labels is None or class_conditioning(split_labels(labels))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def run(cls, labels):
        return io.NodeOutput(class_conditioning(split_labels(labels)))


NODES = [IECLoadBuiltinModel, IECClassLabel]
