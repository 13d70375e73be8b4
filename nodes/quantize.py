"""IECQuantizeModel: a MODEL evaluated with integer weights and activations."""

from comfy_api.latest import io

from ..iec_core.choices import unknown_choice
from ..iec_core.quantization import ACTIVATION_BITS, WEIGHT_BITS
from .host.quantize import apply_quantization

WEIGHT_CHOICES = [str(bits) for bits in WEIGHT_BITS]
ACTIVATION_CHOICES = [str(bits) for bits in ACTIVATION_BITS]


class IECQuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="IECQuantizeModel",
            display_name="Quantize Model (IEC)",
            category="advanced/model/IEC",
            description="Evaluates a model's Linear and Conv2d layers with quantized weights and activations. LoRAs reach "
            "the quantized layers, wherever in the chain they are.",
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize; it stays as it is."),
                io.Combo.Input(
                    "weight_bits",
                    options=WEIGHT_CHOICES,
                    default="8",
                    tooltip="Bits of a weight: symmetric integers, one scale per output channel.",
                ),
                io.Combo.Input(
                    "activation_bits",
                    options=ACTIVATION_CHOICES,
                    default="8",
                    tooltip="8: integers with scales taken at run time, summed exactly in int32. 16: activations are not "
                    "quantized and stay in the model's compute type.",
                ),
                io.Boolean.Input(
                    "keep_sensitive_layers",
                    default=True,
                    tooltip="Leave the first and the last layer and the embeddings of timestep and label unquantized.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A clone of the model that is evaluated in integers.")],
        )

    @classmethod
    def validate_inputs(cls, weight_bits=None, activation_bits=None):
        wrong_weight = unknown_choice(WEIGHT_CHOICES, weight_bits=weight_bits)
        return wrong_weight or unknown_choice(ACTIVATION_CHOICES, activation_bits=activation_bits) or True

    @classmethod
    def execute(cls, model, weight_bits, activation_bits, keep_sensitive_layers):
        return io.NodeOutput(apply_quantization(model, int(weight_bits), int(activation_bits), keep_sensitive_layers))


NODES = [IECQuantizeModel]
