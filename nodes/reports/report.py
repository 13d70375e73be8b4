"""IECReport: show what a sampling run did, as JSON and as a plot."""

import torch
from comfy_api.latest import io

from ...iec_core.run_report import to_json
from ..correction.samplers import after_input, check_is_done
from ..host.inputs import CheckedNode
from ..host.schema import schema
from ..types import Report, as_image, shown_on
from . import plots


class IECReport(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECReport",
            display_name="IEC Report",
            category="sampling/IEC",
            description="Shows what sampling runs did, step by step, as JSON text and as a plot: sigma, corrected or not, "
            "damping, residuals, contraction, evaluations and seconds.",
            search_aliases=["sampling report", "convergence", "residuals", "contraction", "statistics"],
            is_output_node=True,
            inputs=[
                Report.Input("report", tooltip="The report of KSampler (IEC), Apply IEC (model) or IEC Sampler (wrap)."),
                after_input("report"),
            ],
            outputs=[
                io.String.Output(display_name="json", tooltip="The report as JSON text: a list with one entry per run."),
                io.Image.Output(display_name="plot", tooltip="One picture per run."),
            ],
        )

    @classmethod
    def run(cls, report, after=None):
        check_is_done("report", report, after)
        text, pictures = to_json(report), torch.cat([as_image(plots.run_steps(run)) for run in report])
        return io.NodeOutput(text, pictures, ui=shown_on(cls, pictures, text))


NODES = [IECReport]
