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
            description="Loads a small diffusion model of emoji that comes with the pack: 32 x 32 pixels, class-conditional. "
            "Connect EmptyChromaRadianceLatentImage (32 x 32) as latent and VAELoader with pixel_space as VAE.",
            search_aliases=["emoji", "demo model", "example model", "test model", "tiny model", "without download"],
            inputs=[
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Number type of the network. Start with auto, which lets ComfyUI choose for the device; use "
                    "float32 for exact comparisons.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default="unet",
                    optional=True,
                    tooltip="unet: blocks of SD 1.5 and SDXL, predicts v; what works for it also works for these models. "
                    "transformer: blocks of Flux, flow matching; what works for it also works for Flux and similar models.",
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
            description="Outputs class labels for the built-in model as CONDITIONING, one for each image of the batch.",
            search_aliases=["emoji", "class conditioning", "prompt of the built-in model"],
            inputs=[
                io.String.Input(
                    "labels",
                    default="face, heart, fruit, clock",
                    tooltip="The class of each image of the batch, in order, separated by commas; with more images than "
                    "names, the names start again. Start with classes that come out well, such as the four default ones. For "
                    "the negative conditioning, write the word none. The help page lists the classes.",
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="Only for the built-in model.")],
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
