"""IECDeepCache: make a MODEL reuse its deep features between steps."""

from comfy_api.latest import io

from ...iec_core.caching.feature_cache import FORECASTS, SCHEDULE_FORMS, parse_cache_schedule
from ...iec_core.choices import unknown_choice
from ..host.caching.cache_run import CORRECTION_PASSES, CacheSettings
from ..host.caching.cached_model import apply_cache
from ..host.inputs import CheckedNode, known_values
from ..host.schema import schema


class IECDeepCache(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECDeepCache",
            display_name="DeepCache (IEC)",
            category="advanced/model/IEC",
            description="Evaluates the deep blocks of a network only on some steps; the steps between reuse the deep feature "
            "and run only the outermost layers. Faster and less exact.",
            search_aliases=["cache", "feature cache", "block cache", "faster", "speed up", "accelerate", "skip blocks"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A U-Net (SD 1.5, SDXL …) or a transformer (Flux, Z-Image, Wan …); the node does not change it.",
                ),
                io.Int.Input(
                    "interval",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="How many steps there are for each step that is evaluated in full; 1 means no caching. Start with "
                    "2.",
                ),
                io.Int.Input(
                    "branch",
                    default=-1,
                    min=-1,
                    max=100,
                    tooltip="How much of the network is evaluated on the other steps. -1, the cheapest: no block of a "
                    "transformer, the outermost skip connection of a U-Net. Branch b from 0 on: the first b + 1 and the last "
                    "b + 1 blocks (transformer), or the b + 1 outermost skip connections (U-Net). Start with -1.",
                ),
                io.Combo.Input(
                    "correction_pass",
                    options=list(CORRECTION_PASSES),
                    default="refresh",
                    optional=True,
                    tooltip="How IEC corrects a full step. refresh: evaluated in full; the following steps reuse the new "
                    "feature. keep: evaluated in full; the following steps reuse the feature of the step's own evaluation. "
                    "reuse: as cheap as a cached step, with the step's own feature. Start with refresh.",
                ),
                io.String.Input(
                    "schedule",
                    default="auto",
                    optional=True,
                    tooltip=f"Which steps are evaluated in full: {SCHEDULE_FORMS}. auto: where the noise levels of the run "
                    "say that reuse would cost most. uniform: every interval-th. power: at most as many, crowded around the "
                    "center. The first step is always evaluated in full. Start with auto.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="A fraction of the denoising: before this point, every step is evaluated in full. Start with 0.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    tooltip="A fraction of the denoising: from this point on, every step is evaluated in full. Start with 1.",
                ),
                io.Combo.Input(
                    "forecast",
                    options=list(FORECASTS),
                    default="auto",
                    optional=True,
                    tooltip="How the deep feature of the other steps is computed. hold: that of the last full evaluation. "
                    "linear, quadratic: extrapolated from the last two, three. auto: between hold and linear, depending on "
                    "how well linear has predicted the full steps so far. Start with auto.",
                ),
                io.Float.Input(
                    "speed",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="How many times as fast as without the cache a run is to be, instead of interval: as many steps "
                    "are evaluated in full as that leaves time for, judged by the network's weights. 0: by interval. Start "
                    "with 0.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A clone of the model that caches.")],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, correction_pass=None, schedule=None, forecast=None, start_percent=None, end_percent=None, speed=None
    ):
        if None not in (start_percent, end_percent) and start_percent >= end_percent:
            return (
                f"end_percent: {end_percent:g} is not above start_percent, {start_percent:g}; choose a larger end_percent, "
                "because caching happens between the two."
            )
        if speed is not None and 0 < speed < 1:
            return f"speed: {speed:g} would be slower than without the cache; write 1 or more, or 0 to go by interval."
        try:
            if schedule is not None:
                parse_cache_schedule(schedule)
        except ValueError as error:
            return str(error)
        wrong = unknown_choice(CORRECTION_PASSES, correction_pass=correction_pass)
        return wrong or unknown_choice(FORECASTS, forecast=forecast) or True

    @classmethod
    def run(
        cls, model, interval, branch, correction_pass="refresh", schedule="auto", start_percent=0.0, end_percent=1.0,
        forecast="auto", speed=0.0,
    ):  # fmt: skip
        sampling = model.get_model_object("model_sampling")
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
        parsed = parse_cache_schedule(schedule)
        settings = CacheSettings(interval, branch, parsed, start, end, forecast, correction_pass, sampling, speed)
        return io.NodeOutput(apply_cache(model, settings))


NODES = [IECDeepCache]
