"""CacheQuant: calibrate a cache's schedule and corrections on the user's prompts, save and load them, apply them to a MODEL."""

from comfy_api.latest import io

from ...iec_core.caching.cachequant import CacheProfile
from ...iec_core.caching.feature_cache import SCHEDULE_FORMS, parse_cache_schedule
from ...iec_core.choices import unknown_choice
from ..calibration import profile_name_input, run_inputs, taken_runs, wrong_run_choice
from ..host.caching.cache_run import CORRECTION_PASSES
from ..host.caching.cachequant import apply_profile, calibrate
from ..host.inputs import CheckedNode, known_values
from ..host.profiles import PROFILES
from ..host.schema import schema
from ..types import CacheProfileSocket

CALIBRATED_FORECASTS = ["hold", "linear"]


def parse_calibrated_schedule(text):
    """Return the CacheSchedule of a `schedule` text, None for "dps". Raise ValueError for a text of another form."""
    return None if text.strip().lower() == "dps" else parse_cache_schedule(text, f"dps, {SCHEDULE_FORMS}")


def full_steps_output():
    """Return the output that lists the steps which a profile's cache evaluates in full."""
    return io.String.Output(
        display_name="full_steps",
        tooltip="The steps that are evaluated in full. To correct these steps, set correction_steps to full in a sampler "
        "after the cache.",
    )


class IECCalibrateCacheQuant(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECCalibrateCacheQuant",
            display_name="Calibrate CacheQuant (IEC)",
            category="advanced/model/IEC",
            description="Runs the full-precision model on your prompts, and finds which steps a cache should evaluate in "
            "full and how to correct the feature that the other steps reuse. Also corrects quantization errors of a "
            "quantized model.",
            search_aliases=["calibrate cache", "cache schedule", "cache calibration", "deepcache"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to cache, without a cache on it; quantized, if you sample with a quantized model. "
                    "The node does not change it.",
                ),
                *run_inputs(" The profile is for this schedule."),
                io.Int.Input(
                    "interval",
                    default=3,
                    min=1,
                    max=1000,
                    tooltip="With schedule dps, as many steps are evaluated in full as with a uniform interval of this length. "
                    "Start with 2 or 3.",
                ),
                io.Int.Input(
                    "branch",
                    default=-1,
                    min=-1,
                    max=100,
                    tooltip="How much is evaluated on the other steps, as in DeepCache (IEC). Start with -1, the cheapest.",
                ),
                io.String.Input(
                    "schedule",
                    default="dps",
                    optional=True,
                    tooltip="Which steps are evaluated in full. dps: found by dynamic programming, as in the paper. auto: the "
                    "same, but a change counts by how far its step moves the image. uniform, power:15,1.4 (center, power), "
                    "steps:0,5,9: as in DeepCache (IEC). Start with dps, on a flow transformer from interval 3 on with auto.",
                ),
                io.Combo.Input(
                    "forecast",
                    options=CALIBRATED_FORECASTS,
                    default="linear",
                    optional=True,
                    tooltip="Which features a step's feature is computed from. hold: from the last full step's, as in the "
                    "paper. linear: from those of the last two full steps, which is more exact and keeps a second feature. "
                    "Start with linear.",
                ),
                io.Boolean.Input(
                    "correct_consumer",
                    default=False,
                    optional=True,
                    tooltip="With a quantized U-Net: also correct the output of the block that consumes the feature, as in "
                    "the paper. The calibration then runs the prompts once more: 3 times instead of 2 with schedule dps or "
                    "auto, otherwise 2 instead of 1. Leave it off.",
                ),
                io.Model.Input(
                    "full_precision",
                    optional=True,
                    tooltip="With a quantized model: the full-precision model that it was made from; the calibration runs "
                    "use it.",
                ),
            ],
            outputs=[
                CacheProfileSocket.Output(
                    display_name="profile", tooltip="The steps to evaluate in full, and the corrections, for CacheQuant (IEC)."
                ),
                full_steps_output(),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, sampler_name=None, scheduler=None, schedule=None, forecast=None):
        try:
            schedule is None or parse_calibrated_schedule(schedule)
        except ValueError as error:
            return str(error)
        wrong = wrong_run_choice(sampler_name, scheduler)
        return wrong or unknown_choice(CALIBRATED_FORECASTS, forecast=forecast) or True

    @classmethod
    def run(
        cls, model, interval, branch, schedule="dps", forecast="linear", correct_consumer=False, full_precision=None, **more
    ):  # fmt: skip
        profile = calibrate(
            model,
            full_precision,
            taken_runs(more),
            interval,
            branch,
            parse_calibrated_schedule(schedule),
            forecast,
            correct_consumer,
        )
        return io.NodeOutput(profile, profile.full_steps_text)


class IECSaveCacheProfile(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECSaveCacheProfile",
            display_name="Save Cache Profile (IEC)",
            category="advanced/model/IEC",
            description="Writes a cache profile to models/iec_profiles.",
            is_output_node=True,
            search_aliases=["save calibration", "save cache schedule"],
            inputs=[
                CacheProfileSocket.Input("profile", tooltip="The profile from Calibrate CacheQuant (IEC)."),
                io.String.Input(
                    "name",
                    default="profile",
                    tooltip="The file's name; it can contain folders, such as sdxl/karras_20. A cache profile of the same "
                    "name is replaced.",
                ),
            ],
            outputs=[CacheProfileSocket.Output(display_name="profile", tooltip="The same profile.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, name=None):
        return PROFILES.wrong_name(name, CacheProfile.KIND) or True

    @classmethod
    def run(cls, profile, name):
        return io.NodeOutput(profile, ui={"text": [PROFILES.write(name, profile.KIND, profile.save)]})


class IECLoadCacheProfile(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECLoadCacheProfile",
            display_name="Load Cache Profile (IEC)",
            category="advanced/model/IEC",
            description="Reads a cache profile from models/iec_profiles.",
            search_aliases=["load calibration", "load cache schedule"],
            inputs=[profile_name_input()],
            outputs=[
                CacheProfileSocket.Output(display_name="profile", tooltip="The profile, for CacheQuant (IEC)."),
                full_steps_output(),
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
        profile = PROFILES.read("profile_name", profile_name, CacheProfile.load)
        return io.NodeOutput(profile, profile.full_steps_text)


class IECCacheQuant(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECCacheQuant",
            display_name="CacheQuant (IEC)",
            category="advanced/model/IEC",
            description="DeepCache with a calibrated profile: the profile's steps are evaluated in full, and on the other "
            "steps the reused feature is corrected as the calibration found.",
            search_aliases=["calibrated cache", "deepcache", "cache", "feature cache", "faster", "speed up", "accelerate"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the profile was calibrated on, with the same quantization. The node does not "
                    "change it.",
                ),
                CacheProfileSocket.Input(
                    "profile", tooltip="The profile from Calibrate CacheQuant (IEC) or Load Cache Profile (IEC)."
                ),
                io.Combo.Input(
                    "correction_pass",
                    options=list(CORRECTION_PASSES),
                    default="refresh",
                    optional=True,
                    tooltip="How IEC corrects a full step, as in DeepCache (IEC). Start with refresh.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A clone of the model that caches as the profile says.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, correction_pass=None):
        return unknown_choice(CORRECTION_PASSES, correction_pass=correction_pass) or True

    @classmethod
    def run(cls, model, profile, correction_pass="refresh"):
        return io.NodeOutput(apply_profile(model, profile, correction_pass))


NODES = [IECCalibrateCacheQuant, IECSaveCacheProfile, IECLoadCacheProfile, IECCacheQuant]
