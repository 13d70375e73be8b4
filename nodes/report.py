"""IECReport: what a sampling run did, as JSON and as a plot."""

import torch
from comfy_api.latest import io

from ..iec_core.report import to_json
from . import plots
from .correct import RunLog
from .host.schema import schema
from .types import Report, as_image, shown_on


class IECReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECReport",
            display_name="IEC Report",
            category="sampling/IEC",
            description="What sampling runs did, step by step: sigma, corrected or not, damping, residuals, contraction, "
            "evaluations and seconds; as JSON and as a plot.",
            search_aliases=["sampling report", "convergence", "residuals", "contraction", "statistics"],
            is_output_node=True,
            inputs=[
                Report.Input("report", tooltip="The report of KSampler (IEC), Apply IEC or IEC Sampler."),
                io.Latent.Input(
                    "after",
                    optional=True,
                    tooltip="With Apply IEC and IEC Sampler: the latent of the last sampler that the report is of, so that it "
                    "is read after the run. KSampler (IEC) needs none.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="json", tooltip="The report as JSON text: a list with an entry for each run."),
                io.Image.Output(display_name="plot", tooltip="One picture a run."),
            ],
        )

    @classmethod
    def execute(cls, report, after=None):
        if isinstance(report, RunLog) and after is None:
            raise ValueError(
                "report: it is of runs that come later; wire the latent of the last sampler that it is about into 'after', so "
                "that it is read when that is done."
            )
        if not report:
            raise ValueError(
                "report: none of its runs was in this prompt; wire the latent of a sampler that it is about into 'after', and "
                "change the seed if that sampler is done already."
            )
        text, pictures = to_json(report), torch.cat([as_image(plots.run_steps(run)) for run in report])
        return io.NodeOutput(text, pictures, ui=shown_on(cls, pictures, text))


NODES = [IECReport]
