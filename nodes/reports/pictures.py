"""Pictures of sampling runs against a reference, a node each: IECErrorPlot, IECImageGrid, IECParetoPlot."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.metrics import pareto_front
from ..host.inputs import CheckedNode, known_values
from ..host.schema import schema
from ..types import Report, as_image, shown_on
from . import grids, plots
from .compare import captions, check_reports, decoded, error_plot, final_error, told_apart

# What a run's cost is: how to read it from its report, and what the plot calls it.
COSTS = {
    "seconds": (lambda report: report.seconds, "seconds of the sampler"),
    "evaluations": (lambda report: report.nfe, "evaluations of the network (NFE)"),
}


def reports_input():
    """The runs that a picture is of."""
    return Report.Input("reports", tooltip="Joined reports with latents, of two runs or more; the first is the reference.")


class IECErrorPlot(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECErrorPlot",
            display_name="Error Plot (IEC)",
            category="sampling/IEC",
            description="Plots how far each run's latent is from the first run's at every step, and shows it on the node.",
            search_aliases=["error growth", "plot", "drift", "trajectory error", "compare"],
            is_output_node=True,
            inputs=[reports_input()],
            outputs=[io.Image.Output(display_name="plot", tooltip="Relative latent error over the steps, log scale.")],
        )

    @classmethod
    def run(cls, reports):
        check_reports(reports, least=2)
        plot = error_plot(reports)
        return io.NodeOutput(plot, ui=shown_on(cls, plot))


class IECImageGrid(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECImageGrid",
            display_name="Image Grid (IEC)",
            category="sampling/IEC",
            description="The runs' images side by side, each over its amplified difference to the first run's, shown on the "
            "node.",
            search_aliases=["compare images", "difference", "side by side", "contact sheet", "xy grid"],
            is_output_node=True,
            inputs=[
                reports_input(),
                io.Vae.Input("vae", tooltip="Decodes the final latents. For the built-in model: VAELoader, pixel_space."),
                io.Float.Input(
                    "difference_gain",
                    default=8.0,
                    min=1.0,
                    max=100.0,
                    step=1.0,
                    optional=True,
                    tooltip="What the absolute difference to the first run is multiplied by, so that it can be seen. 1 shows "
                    "it as it is.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid", tooltip="A column per run: its images, each over its difference to the first run's."
                )
            ],
        )

    @classmethod
    def run(cls, reports, vae, difference_gain=8.0):
        check_reports(reports, least=2)
        images = [batch.numpy() for batch in decoded(reports, vae)]
        grid = as_image(grids.side_by_side(captions(reports), images, difference_gain))
        return io.NodeOutput(grid, ui=shown_on(cls, grid))


class IECParetoPlot(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECParetoPlot",
            display_name="Pareto Plot (IEC)",
            category="sampling/IEC",
            description="Plots each run's final error to the first run against what it cost, and which runs no other beats in "
            "both, shown on the node.",
            search_aliases=["pareto", "quality against speed", "trade-off", "benchmark", "plot"],
            is_output_node=True,
            inputs=[
                reports_input(),
                io.Combo.Input(
                    "cost",
                    options=list(COSTS),
                    default="seconds",
                    tooltip="seconds: wall time of the sampler, to be taken where runs are cached or quantized, since their "
                    "evaluations cost less; the first run after a start is slower, so queue once before. evaluations: the "
                    "same on every machine, to be taken where all runs are of one model without a cache.",
                ),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="Final relative latent error against cost.")],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, cost=None):
        return unknown_choice(COSTS, cost=cost) or True

    @classmethod
    def run(cls, reports, cost):
        check_reports(reports, least=2)
        spent, axis = COSTS[cost]
        names = told_apart(reports)
        points = [(spent(report), final_error(report, reports[0])) for report in reports[1:]]
        runs = [(*name, *point) for name, point in zip(names[1:], points)]
        plot = as_image(plots.pareto(runs, pareto_front(points), (*names[0], spent(reports[0])), axis))
        return io.NodeOutput(plot, ui=shown_on(cls, plot))


NODES = [IECErrorPlot, IECImageGrid, IECParetoPlot]
