"""The nodes that quantize a MODEL, and save and load a quantized MODEL."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.file_kinds import QUANTIZED_MODEL
from ..host.inputs import CheckedNode, known_values
from ..host.quantization.load_file import FILES, load_quantized_model
from ..host.quantization.quantize import quantize_model
from ..host.quantization.quantized_layers import COMPUTE, FASTEST
from ..host.quantization.save_file import save_quantized_model
from ..host.schema import schema
from .formats import OF_LAYERS, compute_input, format_inputs, quantization, wrong_format

SCALES = ["absmax", "search"]
ALIASES = [
    "quantise", "quantization", "int8", "int4", "fp8", "float8", "8-bit", "4-bit", "w8a8", "w4a8", "w8a16", "w4a16",
    "less memory", "low vram", "convrot",
]  # fmt: skip


class IECQuantizeModel(CheckedNode):
    @classmethod
    def define_schema(cls):
        inputs = format_inputs()
        return schema(
            node_id="IECQuantizeModel",
            display_name="Quantize Model (IEC)",
            category="advanced/model/IEC",
            description="Quantizes the Linear and Conv2d layers of a model, so that it takes less memory and computes in "
            "integers. LoRAs before this node take no extra time; LoRAs after it are kept next to the weights, and their own "
            "products take time.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to quantize, in float16, bfloat16 or float32; the node does not change it."
                ),
                *(inputs[name] for name in ("weight_bits", "activation_bits", "keep_sensitive_layers", "group_size")),
                io.Combo.Input(
                    "weight_scale",
                    options=SCALES,
                    default="absmax",
                    optional=True,
                    tooltip="absmax: the largest weight fits. search: the scale with the least squared error, as in the "
                    "paper, which clips the largest weights; this takes longer to make. Start with absmax.",
                ),
                *(inputs[name] for name in OF_LAYERS),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, weight_bits=None, activation_bits=None, group_size=None, weight_scale=None, activation_scale=None, compute=None
    ):  # fmt: skip
        wrong = wrong_format(weight_bits, activation_bits, group_size, activation_scale, compute)
        return wrong or unknown_choice(SCALES, weight_scale=weight_scale) or True

    @classmethod
    def run(cls, model, weight_bits, weight_scale="absmax", **more):
        search = weight_scale == "search" and weight_bits != "fp8"
        return io.NodeOutput(quantize_model(model, quantization(weight_bits, search=search, **more)))


class IECSaveQuantizedModel(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECSaveQuantizedModel",
            display_name="Save Quantized Model (IEC)",
            category="advanced/model/IEC",
            description="Writes a quantized model to models/diffusion_models, with its LoRAs and activation scales.",
            is_output_node=True,
            search_aliases=["save int8", "save fp8", "export quantized", "write checkpoint"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Quantize Model or Calibrate Weights (IEC)."),
                io.String.Input(
                    "name",
                    default="quantized",
                    tooltip="The file's name; it can contain folders, such as sdxl/w8a8. A quantized model of the same name "
                    "is replaced.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, name=None):
        return FILES.wrong_name(name, QUANTIZED_MODEL) or True

    @classmethod
    def run(cls, model, name):
        return io.NodeOutput(ui={"text": save_quantized_model(model, name)})


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
                    tooltip="A file in models/diffusion_models that Save Quantized Model (IEC) wrote. Press R to list a file "
                    "that was just saved.",
                ),
                compute_input(
                    "How 8-bit activations are multiplied, as in Quantize Model (IEC). A file does not store this setting, "
                    "because the best choice depends on the GPU. Start with fastest."
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
