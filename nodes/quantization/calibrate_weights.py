"""IECCalibrateWeights: quantize a model with GPTQ, calibrated on the layer inputs that the user's prompts produce."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.quantization.mixed_precision import Budget
from ..calibration import run_inputs, taken_runs, wrong_run_choice
from ..host.inputs import CheckedNode, known_values
from ..host.quantization.weight_calibration import calibrate_weights, factors_of
from ..host.schema import schema
from .formats import MIXED, OF_LAYERS, format_inputs, quantization, wrong_format

RANKS = ["auto", "0", "8", "16", "32", "64"]
AUTO_RANK = {"4": 16}  # {weight_bits: rank}; 0 for other weight_bits, which lose little or have a better use for the bits
BUDGETS = ["bits", "error"]


class IECCalibrateWeights(CheckedNode):
    @classmethod
    def define_schema(cls):
        inputs = format_inputs(weight_bits="4", mixed=True)
        return schema(
            node_id="IECCalibrateWeights",
            display_name="Calibrate Weights (IEC)",
            category="advanced/model/IEC",
            description="Runs a model on your prompts and quantizes it: weights are rounded so that the layers' outputs change "
            "little (GPTQ), and a small low-rank branch adds what 4 bits cannot represent.",
            search_aliases=["gptq", "svdquant", "int4", "4-bit", "w4a8", "w4a16", "low-rank", "quantize", "ptq", "less memory"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to quantize, in full precision, with its LoRAs; the node does not change it."
                ),
                *(inputs[name] for name in ("weight_bits", "activation_bits", "keep_sensitive_layers")),
                io.Combo.Input(
                    "rank",
                    options=RANKS,
                    default="auto",
                    tooltip="The rank of the 16-bit low-rank branch next to each weight. A higher rank keeps more of the "
                    "image, and takes memory and time. 0: no branch. auto: 16 with 4 bits, otherwise no branch. Start with "
                    "auto.",
                ),
                *run_inputs(""),
                inputs["group_size"],
                *(inputs[name] for name in OF_LAYERS),
                io.Float.Input(
                    "memory_gb",
                    default=4.0,
                    min=0.1,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="About how much memory of the device, in 2^30 bytes, the calibration may take in addition to the "
                    "model. If all layers together need more, the runs are repeated for one part of the layers after the "
                    "other. Start with 4.",
                ),
                io.Combo.Input(
                    "budget",
                    options=BUDGETS,
                    default="bits",
                    optional=True,
                    tooltip="With weight_bits mixed. bits: the least error within average_bits. error: the smallest model "
                    "within most_error. Start with bits.",
                ),
                io.Float.Input(
                    "average_bits",
                    default=5.0,
                    min=1.0,
                    max=32.0,
                    step=0.1,
                    optional=True,
                    tooltip="With budget bits: the average bits per weight, including scales and branches, over the layers "
                    "that may be quantized. Start with 5.",
                ),
                io.Float.Input(
                    "most_error",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    optional=True,
                    tooltip="With budget error: the largest relative change of a prediction. Images change several times as "
                    "much. Start with 0.01.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The quantized model."),
                io.String.Output(
                    display_name="layers",
                    tooltip="With weight_bits mixed, a table in Markdown: the error and the chosen bits of each layer. The "
                    "layers for which full precision removes the most squared error per additional byte come first.",
                ),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, weight_bits=None, activation_bits=None, group_size=None, activation_scale=None, compute=None, rank=None,
        sampler_name=None, scheduler=None, memory_gb=None, budget=None,
    ):  # fmt: skip
        wrong = wrong_format(weight_bits, activation_bits, group_size, activation_scale, compute, mixed=True)
        wrong = wrong or unknown_choice(RANKS, rank=rank) or unknown_choice(BUDGETS, budget=budget)
        return wrong or wrong_run_choice(sampler_name, scheduler) or True

    @classmethod
    def run(
        cls, model, weight_bits, rank, memory_gb=4.0, budget="bits", average_bits=5.0, most_error=0.01, **more
    ):  # fmt: skip
        rank, runs = AUTO_RANK.get(weight_bits, 0) if rank == "auto" else int(rank), taken_runs(more)
        smallest = "4" if weight_bits == MIXED else weight_bits
        asked = quantization(smallest, calibrated=True, rank=rank, factors=factors_of(model), **more)
        spent = Budget(bits=average_bits) if budget == "bits" else Budget(error=most_error)
        of_budget = spent if weight_bits == MIXED else None
        return io.NodeOutput(*calibrate_weights(model, asked, runs, int(memory_gb * 2**30), of_budget))


NODES = [IECCalibrateWeights]
