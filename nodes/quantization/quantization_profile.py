"""Calibrated activation scales: find them on the user's prompts, save and load them, apply them to a quantized MODEL."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.quantization.activation_scales import ActivationScales
from ..calibration import profile_name_input, run_inputs, taken_runs, wrong_run_choice
from ..host.inputs import CheckedNode, known_values
from ..host.profiles import PROFILES
from ..host.quantization.activation_scales import apply_scales, calibrate_activations
from ..host.schema import schema
from ..types import QuantizationProfileSocket

SCALES = ["timestep-wise", "static"]
SCALE_BY = ["search", "absmax"]


class IECCalibrateQuantization(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECCalibrateQuantization",
            display_name="Calibrate Quantization (IEC)",
            category="advanced/model/IEC",
            description="Runs a quantized model on your prompts and finds the scales of its activations: one per layer and "
            "timestep, as in the paper, or one per layer.",
            search_aliases=["activation scales", "static quantization", "ptq", "int8 calibration", "timestep-wise"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model from Quantize Model (IEC) or Calibrate Weights (IEC) with activation_bits 8; the node "
                    "does not change it.",
                ),
                *run_inputs(""),
                io.Combo.Input(
                    "scales",
                    options=SCALES,
                    default="timestep-wise",
                    optional=True,
                    tooltip="timestep-wise: one scale for each layer and step, interpolated between steps. static: one scale "
                    "for each layer, for all steps. Start with timestep-wise; with 4-bit weights static was no worse where "
                    "measured.",
                ),
                io.Combo.Input(
                    "activation_scale",
                    options=SCALE_BY,
                    default="search",
                    optional=True,
                    tooltip="search: the scale with the least squared error, which clips the largest values; all runs are "
                    "done twice. absmax: the largest value that was seen still fits. Start with search.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with calibrated activations."),
                QuantizationProfileSocket.Output(display_name="profile", tooltip="The scales, to save or to apply elsewhere."),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, sampler_name=None, scheduler=None, scales=None, activation_scale=None):
        wrong = wrong_run_choice(sampler_name, scheduler) or unknown_choice(SCALES, scales=scales)
        return wrong or unknown_choice(SCALE_BY, activation_scale=activation_scale) or True

    @classmethod
    def run(cls, model, scales="timestep-wise", activation_scale="search", **more):
        runs, searched = taken_runs(more), activation_scale == "search"
        profile = calibrate_activations(model, runs, scales == "timestep-wise", searched)
        return io.NodeOutput(apply_scales(model, profile), profile)


class IECSaveQuantizationProfile(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECSaveQuantizationProfile",
            display_name="Save Quantization Profile (IEC)",
            category="advanced/model/IEC",
            description="Writes calibrated scales of activations to models/iec_profiles.",
            is_output_node=True,
            search_aliases=["save calibration", "save activation scales"],
            inputs=[
                QuantizationProfileSocket.Input("profile", tooltip="The profile from Calibrate Quantization (IEC)."),
                io.String.Input(
                    "name",
                    default="quantization",
                    tooltip="The file's name; it can contain folders, such as sd15/w8a8_20. A quantization profile of the "
                    "same name is replaced.",
                ),
            ],
            outputs=[QuantizationProfileSocket.Output(display_name="profile", tooltip="The same profile.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, name=None):
        return PROFILES.wrong_name(name, ActivationScales.KIND) or True

    @classmethod
    def run(cls, profile, name):
        return io.NodeOutput(profile, ui={"text": [PROFILES.write(name, profile.KIND, profile.save)]})


class IECLoadQuantizationProfile(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECLoadQuantizationProfile",
            display_name="Load Quantization Profile (IEC)",
            category="advanced/model/IEC",
            description="Reads calibrated scales of activations from models/iec_profiles.",
            search_aliases=["load calibration", "load activation scales"],
            inputs=[profile_name_input()],
            outputs=[
                QuantizationProfileSocket.Output(
                    display_name="profile", tooltip="The profile, for Apply Quantization Profile (IEC)."
                )
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, profile_name=None):
        return PROFILES.missing(profile_name=profile_name) or True

    @classmethod
    def fingerprint_inputs(cls, profile_name):
        return PROFILES.changed(profile_name)

    @classmethod
    def run(cls, profile_name):
        return io.NodeOutput(PROFILES.read("profile_name", profile_name, ActivationScales.load))


class IECApplyQuantizationProfile(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECApplyQuantizationProfile",
            display_name="Apply Quantization Profile (IEC)",
            category="advanced/model/IEC",
            description="Gives a quantized model's activations the scales of a calibration, instead of scales computed while "
            "sampling.",
            search_aliases=["apply calibration", "activation scales", "static quantization"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The quantized model that the profile was calibrated on, with the same quantization; the node "
                    "does not change it.",
                ),
                QuantizationProfileSocket.Input(
                    "profile", tooltip="The profile from Calibrate Quantization (IEC) or Load Quantization Profile (IEC)."
                ),
            ],
            outputs=[io.Model.Output(tooltip="A clone of the model with calibrated activations.")],
        )

    @classmethod
    def run(cls, model, profile):
        return io.NodeOutput(apply_scales(model, profile))


NODES = [IECCalibrateQuantization, IECSaveQuantizationProfile, IECLoadQuantizationProfile, IECApplyQuantizationProfile]
