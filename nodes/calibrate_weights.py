"""IECCalibrateWeights: a quantized model whose weights are rounded by what comes into their layers on the user's prompts."""

from comfy_api.latest import io

from ..iec_core.choices import unknown_choice
from .calibration import RUN_INPUTS, run_inputs, sampling_of, taken_prompts, wrong_run_choice
from .formats import OF_LAYERS, format_inputs, quantization, wrong_format
from .host.inputs import CheckedNode, known_values
from .host.schema import schema
from .host.weight_calibration import calibrate_weights, factors_of

RANKS = ["auto", "0", "8", "16", "32", "64"]
AUTO_RANK = {"4": 16}  # by weight_bits; 0 with all others, which lose little


class IECCalibrateWeights(CheckedNode):
    @classmethod
    def define_schema(cls):
        inputs = format_inputs(weight_bits="4")
        return schema(
            node_id="IECCalibrateWeights",
            display_name="Calibrate Weights (IEC)",
            category="advanced/model/IEC",
            description="Runs a model on your prompts, and makes a quantized one of it whose weights are rounded so that what "
            "the layers put out stays (GPTQ), with a small low-rank branch for what 4 bits cannot hold.",
            search_aliases=["gptq", "svdquant", "int4", "4-bit", "w4a8", "w4a16", "low-rank", "quantize", "ptq", "less memory"],
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, in full precision, with its LoRAs; it stays as it is."),
                *(inputs[name] for name in ("weight_bits", "activation_bits", "keep_sensitive_layers")),
                io.Combo.Input(
                    "rank",
                    options=RANKS,
                    default="auto",
                    tooltip="Of the low-rank branch beside each weight, in 16 bits. More keep more, and take memory and time. "
                    "0: none. auto: 16 with 4 bits, else none.",
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
                    tooltip="About how much of the device's memory, in 2^30 bytes, the calibration may take beside the model. "
                    "With less, runs are repeated for one part of the layers after the other.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, weight_bits=None, activation_bits=None, group_size=None, activation_scale=None, compute=None, rank=None,
        sampler_name=None, scheduler=None, memory_gb=None,
    ):  # fmt: skip
        wrong = wrong_format(weight_bits, activation_bits, group_size, activation_scale, compute)
        return wrong or unknown_choice(RANKS, rank=rank) or wrong_run_choice(sampler_name, scheduler) or True

    @classmethod
    def run(cls, model, weight_bits, rank, negative, latent_image, seed, runs, memory_gb=4.0, **more):
        rank = AUTO_RANK.get(weight_bits, 0) if rank == "auto" else int(rank)
        of_runs = {name: more.pop(name) for name in RUN_INPUTS if name in more}
        asked = quantization(weight_bits, calibrated=True, rank=rank, factors=factors_of(model), **more)
        return io.NodeOutput(
            calibrate_weights(
                model, asked, taken_prompts(of_runs), negative, latent_image, seed, runs, sampling_of(of_runs),
                int(memory_gb * 2**30),
            )
        )  # fmt: skip


NODES = [IECCalibrateWeights]
