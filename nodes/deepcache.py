"""IECDeepCache: a U-Net MODEL that reuses its deep features between steps."""

from comfy_api.latest import io

from .choices import unknown_choice
from .host.deepcache import CORRECTION_PASSES, apply_deepcache


class IECDeepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="IECDeepCache",
            display_name="DeepCache (IEC)",
            category="advanced/model/IEC",
            description="Evaluates a U-Net's deep blocks on every interval-th step only and reuses their feature between. "
            "A correction of a full step refreshes the feature, or reuses it.",
            inputs=[
                io.Model.Input("model", tooltip="A U-Net model (SD 1.5, SDXL, the built-in model); it stays as it is."),
                io.Int.Input(
                    "interval",
                    default=3,
                    min=1,
                    max=1000,
                    tooltip="Every interval-th step is evaluated in full, from the first on. 1 is no caching.",
                ),
                io.Int.Input(
                    "branch",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="How much is evaluated on the other steps, counted from the outermost skip connection: 0 is the "
                    "cheapest and the least exact.",
                ),
                io.Combo.Input(
                    "correction_pass",
                    options=list(CORRECTION_PASSES),
                    default="refresh",
                    optional=True,
                    tooltip="What IEC's correction of a full step does. refresh: evaluated in full, its feature is reused on. "
                    "keep: evaluated in full, the step's first feature is reused on. reuse: evaluated as cheaply as a cached "
                    "step, on the step's own feature.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A clone of the model that caches.")],
        )

    @classmethod
    def validate_inputs(cls, correction_pass=None):
        return unknown_choice(CORRECTION_PASSES, correction_pass=correction_pass) or True

    @classmethod
    def execute(cls, model, interval, branch, correction_pass="refresh"):
        return io.NodeOutput(apply_deepcache(model, interval, branch, correction_pass))


NODES = [IECDeepCache]
