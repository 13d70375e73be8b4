"""IECQuantizationReport: the error that quantization causes in each layer, and which layers to leave unquantized."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.quantization import layer_errors as core
from ..calibration import run_inputs, taken_runs, wrong_run_choice
from ..host.inputs import CheckedNode, known_values
from ..host.quantization.layer_errors import layer_errors
from ..host.schema import schema
from ..reports import plots
from ..types import as_image, shown_on

BUDGETS = ["none", "size", "error"]


class IECQuantizationReport(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECQuantizationReport",
            display_name="Quantization Report (IEC)",
            category="advanced/model/IEC",
            description="Compares every quantized layer with full precision on your prompts. Gives a table and a plot. In "
            "both, the layers for which full precision removes the most squared error per additional byte come first. Suggests "
            "which layers to leave unquantized under a budget of size or error.",
            search_aliases=["sqnr", "quantization error", "layer sensitivity", "sensitive layers", "mixed precision"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A model from Quantize Model or Calibrate Weights (IEC)."),
                io.Model.Input(
                    "full_precision",
                    tooltip="The full-precision model that it was made from. Put LoRAs on both models or on neither.",
                ),
                *run_inputs(""),
                io.Combo.Input(
                    "budget",
                    options=BUDGETS,
                    default="none",
                    optional=True,
                    tooltip="Which limit the suggestion keeps to. size: the weights of all layers in the table together take "
                    "at most size_mb. error: every layer's output has at least least_sqnr. Start with none.",
                ),
                io.Float.Input(
                    "size_mb",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.1,
                    optional=True,
                    tooltip="With budget size: how many megabytes, of 2^20 bytes, the weights of all layers in the table may "
                    "take together. Start with a tenth more than they take now.",
                ),
                io.Float.Input(
                    "least_sqnr",
                    default=30.0,
                    min=0.0,
                    max=200.0,
                    step=0.5,
                    optional=True,
                    tooltip="With budget error: the least signal-to-noise ratio that every layer's output should have, in "
                    "dB. Start with 30, an error of 3 %.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="table",
                    tooltip="Markdown table, one row per layer. The layers for which full precision removes the most "
                    "squared error per additional byte come first.",
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="By how much each layer changes the prediction; with more than 60 layers, only the first 60.",
                ),
                io.String.Output(
                    display_name="exclude",
                    tooltip="The layers to leave unquantized, for the exclude input of Quantize Model (IEC).",
                ),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, sampler_name=None, scheduler=None, budget=None):
        return wrong_run_choice(sampler_name, scheduler) or unknown_choice(BUDGETS, budget=budget) or True

    @classmethod
    def run(cls, model, full_precision, budget="none", size_mb=0.0, least_sqnr=30.0, **more):
        errors = layer_errors(model, full_precision, taken_runs(more))
        left = {
            "none": lambda: [],
            "size": lambda: core.left_for_size(errors, size_mb * 2**20),
            "error": lambda: core.left_for_error(errors, least_sqnr),
        }[budget]()
        table, plot = core.table(errors), as_image(plots.layer_errors(errors, left))
        return io.NodeOutput(table, plot, " ".join(left), ui=shown_on(cls, plot, table))


NODES = [IECQuantizationReport]
