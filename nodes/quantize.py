"""Quantized MODELs: made from another, and kept in a file."""

from comfy_api.latest import io

from ..iec_core.choices import unknown_choice
from ..iec_core.file_kinds import QUANTIZED_MODEL
from ..iec_core.quantization import WeightFormat
from .host.inputs import CheckedNode, known_values
from .host.quantize import LayerRules, Quantization, parse_patterns, quantize_model
from .host.quantized_files import FILES, load_quantized_model, save_quantized_model
from .host.quantized_layers import COMPUTE, EIGHT_BIT, FASTEST, ActivationFormat
from .host.schema import schema

KINDS = {"8": "int8", "4": "int4", "fp8": "fp8"}
ACTIVATION_BITS = ["8", "16"]
GROUP_SIZES = ["none", "32", "64", "128"]
SCALES = ["absmax", "search"]
ACTIVATION_SCALES = ["token", "tensor"]
ALIASES = [
    "quantise", "quantization", "int8", "int4", "fp8", "float8", "8-bit", "4-bit", "w8a8", "w4a8", "w8a16", "w4a16",
    "less memory", "low vram", "convrot",
]  # fmt: skip


def _wrong_group(group_size, weight_bits, activation_bits):
    """Return the sentence for a group size that does not go with the bits, else None."""
    if group_size not in (None, "none") and (activation_bits == "8" or weight_bits == "fp8"):
        return f"group_size: {group_size} goes with weight_bits 8 or 4 and activation_bits 16 only; write none."


def _wrong_compute(compute, activation_bits):
    """Return the sentence for a way to compute that does not go with the bits, else None."""
    if compute == EIGHT_BIT and activation_bits == "16":
        return f"compute: {compute} goes with activation_bits 8 only; write {FASTEST}, or other bits."


def _compute_input(tip):
    return io.Combo.Input("compute", options=list(COMPUTE), default=FASTEST, optional=True, tooltip=tip)


class IECQuantizeModel(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECQuantizeModel",
            display_name="Quantize Model (IEC)",
            category="advanced/model/IEC",
            description="Makes a model with quantized Linear and Conv2d layers, which takes less memory and computes in "
            "integers. LoRAs go in front of it: of what is changed afterwards, small changes are rounded away.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize; it stays as it is."),
                io.Combo.Input(
                    "weight_bits",
                    options=list(KINDS),
                    default="8",
                    tooltip="8, 4: symmetric integers, one scale per output channel. fp8: float8 e4m3, one scale per weight.",
                ),
                io.Combo.Input(
                    "activation_bits",
                    options=ACTIVATION_BITS,
                    default="8",
                    tooltip="8: quantized at run time, and products summed exactly. 16: left in the model's compute type; this "
                    "saves memory, not time.",
                ),
                io.Boolean.Input(
                    "keep_sensitive_layers",
                    default=True,
                    tooltip="Leave the first and the last layer and the embeddings of timestep and label unquantized.",
                ),
                io.Combo.Input(
                    "group_size",
                    options=GROUP_SIZES,
                    default="none",
                    optional=True,
                    tooltip="With activation_bits 16: how many weights share a scale. Fewer are more exact, and take more "
                    "memory. none: a whole output channel.",
                ),
                io.Combo.Input(
                    "weight_scale",
                    options=SCALES,
                    default="absmax",
                    optional=True,
                    tooltip="absmax: the largest weight fits. search: the scale of least squared error, which clips the "
                    "largest ones; the paper's. It takes longer to quantize.",
                ),
                io.Boolean.Input(
                    "rotate",
                    default=False,
                    optional=True,
                    tooltip="Rotate the inputs of Linear layers by a Hadamard matrix (ConvRot), which spreads outliers. It "
                    "costs a small product more per layer.",
                ),
                io.Combo.Input(
                    "activation_scale",
                    options=ACTIVATION_SCALES,
                    default="token",
                    optional=True,
                    tooltip="With activation_bits 8. token: a scale for each token or pixel, of larger convolutions for each "
                    "image. tensor: one for all of it.",
                ),
                io.Boolean.Input(
                    "keep_output_projections",
                    default=False,
                    optional=True,
                    tooltip="Leave the last layers of attention and of feed-forward networks unquantized too.",
                ),
                io.String.Input(
                    "include",
                    default="",
                    optional=True,
                    tooltip="Quantize only layers that one of these names fits, such as input_blocks.*; * is any part of a "
                    "name. Nothing: all layers.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    optional=True,
                    tooltip="Leave layers unquantized that one of these names fits, such as *.proj_in middle_block.*",
                ),
                _compute_input(
                    "With activation_bits 8. 8-bit: products in 8 bits. dequantized: in the model's compute type, activations "
                    "unquantized. fastest: on a GPU the faster of the two for each layer, timed at its first use; else 8-bit."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, weight_bits=None, activation_bits=None, group_size=None, weight_scale=None, activation_scale=None, compute=None
    ):  # fmt: skip
        wrong = unknown_choice(list(KINDS), weight_bits=weight_bits)
        wrong = wrong or unknown_choice(ACTIVATION_BITS, activation_bits=activation_bits)
        wrong = wrong or unknown_choice(GROUP_SIZES, group_size=group_size)
        wrong = wrong or unknown_choice(SCALES, weight_scale=weight_scale)
        wrong = wrong or unknown_choice(ACTIVATION_SCALES, activation_scale=activation_scale)
        wrong = wrong or unknown_choice(COMPUTE, compute=compute)
        wrong = wrong or _wrong_group(group_size, weight_bits, activation_bits)
        return wrong or _wrong_compute(compute, activation_bits) or True

    @classmethod
    def run(
        cls, model, weight_bits, activation_bits, keep_sensitive_layers, group_size="none", weight_scale="absmax", rotate=False,
        activation_scale="token", keep_output_projections=False, include="", exclude="", compute=FASTEST,
    ):  # fmt: skip
        group = 0 if group_size == "none" else int(group_size)
        rules = LayerRules(keep_sensitive_layers, keep_output_projections, parse_patterns(include), parse_patterns(exclude))
        weight = WeightFormat(KINDS[weight_bits], group, 0, weight_scale == "search" and weight_bits != "fp8")
        activation = ActivationFormat(int(activation_bits), activation_scale == "tensor", compute)
        return io.NodeOutput(quantize_model(model, Quantization(weight, activation, rules, rotate)))


class IECSaveQuantizedModel(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECSaveQuantizedModel",
            display_name="Save Quantized Model (IEC)",
            category="advanced/model/IEC",
            description="Writes a quantized model to models/diffusion_models, with the LoRAs that are on it.",
            is_output_node=True,
            search_aliases=["save int8", "save fp8", "export quantized", "write checkpoint"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Quantize Model (IEC)."),
                io.String.Input("name", default="quantized", tooltip="Name of the file; one of the same name is replaced."),
            ],
            outputs=[],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, name=None):
        return FILES.wrong_name(name, QUANTIZED_MODEL) or True

    @classmethod
    def run(cls, model, name):
        return io.NodeOutput(ui={"text": [save_quantized_model(model, name)]})


class IECLoadQuantizedModel(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECLoadQuantizedModel",
            display_name="Load Quantized Model (IEC)",
            category="advanced/model/IEC",
            description="Reads a quantized model that Save Quantized Model (IEC) wrote to models/diffusion_models.",
            search_aliases=["load int8", "load fp8", "open quantized", "diffusion model loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=FILES.names(),
                    tooltip="A file of models/diffusion_models that Save Quantized Model (IEC) wrote. One that was just saved "
                    "is listed after a refresh of the page (R).",
                ),
                _compute_input(
                    "What multiplies activations of 8 bits, as in Quantize Model (IEC). A file does not keep it: it is for "
                    "the GPU to tell."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, model_name=None, compute=None):
        return FILES.missing(model_name=model_name) or unknown_choice(COMPUTE, compute=compute) or True

    @classmethod
    def fingerprint_inputs(cls, model_name, compute=None):
        return FILES.changed(model_name)

    @classmethod
    def run(cls, model_name, compute=FASTEST):
        return io.NodeOutput(load_quantized_model(model_name, compute))


NODES = [IECQuantizeModel, IECSaveQuantizedModel, IECLoadQuantizedModel]
