"""Pictures that compare sampling runs with a reference, one node each: IECErrorPlot, IECImageGrid, IECParetoPlot."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.metrics import pareto_front
from ..host.inputs import CheckedNode, known_values
from ..host.schema import schema
from ..types import Report, as_image, shown_on
from . import grids, plots
from .compare import captions, check_reports, decoded, error_plot, final_error, told_apart

# {kind of cost: (how to read it from a run's report, its name in the plot)}
COSTS = {
    "seconds": (lambda report: report.seconds, "seconds of the sampler"),
    "evaluations": (lambda report: report.nfe, "evaluations of the network (NFE)"),
}


def reports_input():
    """Return the input for the runs that a picture shows."""
    return Report.Input(
        "reports",
        tooltip="Two runs or more: the reports of KSampler (IEC) nodes with keep_latents on, "
        "joined by Join Reports (IEC). The first run is the reference. Use the same seed for all runs.",
    )


class IECErrorPlot(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECErrorPlot",
            display_name="Error Plot (IEC)",
            category="sampling/IEC",
            description="Plots how far the latent of each sampling run is from that of the first run at every step. The node "
            "shows the plot and outputs it as an image.",
            search_aliases=["error growth", "plot", "drift", "trajectory error", "compare"],
            is_output_node=True,
            inputs=[reports_input()],
            outputs=[
                io.Image.Output(
                    display_name="plot",
                    tooltip="The relative error of the latent at each step, mean over the batch, log scale.",
                )
            ],
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
            description="Shows the images of sampling runs side by side, each with its amplified difference from the first "
            "run's image. The node shows the grid and outputs it as an image.",
            search_aliases=["compare images", "difference", "side by side", "contact sheet", "xy grid"],
            is_output_node=True,
            inputs=[
                reports_input(),
                io.Vae.Input(
                    "vae", tooltip="Decodes the final latents. For the built-in model, use VAELoader with pixel_space."
                ),
                io.Float.Input(
                    "difference_gain",
                    default=8.0,
                    min=1.0,
                    max=100.0,
                    step=1.0,
                    optional=True,
                    tooltip="The absolute difference from the reference is multiplied by this number. Start with 8; use more "
                    "if differences are black, less if they are white, and 1 for the true differences.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid",
                    tooltip="One column per run: its images, each with its difference from the reference "
                    "to the right or below.",
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
            description="Plots the error of each sampling run's result against the cost of the run, and marks the runs that "
            "no other run beats. The node shows the plot and outputs it as an image.",
            search_aliases=["pareto", "quality against speed", "trade-off", "benchmark", "plot"],
            is_output_node=True,
            inputs=[
                reports_input(),
                io.Combo.Input(
                    "cost",
                    options=list(COSTS),
                    default="seconds",
                    tooltip="How the cost of a run is measured. seconds: the wall time of the sampler, on your machine. Start "
                    "with it if runs are cached or quantized, since their evaluations cost less. The first run after a start, "
                    "or after another model, is slower: queue once, and then again with another seed. evaluations: how often "
                    "the network was evaluated (NFE), the same on every machine. Use it if all runs use one model without a "
                    "cache.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="plot",
                    tooltip="The relative error of the final latent, mean over the batch, log scale, against the cost.",
                )
            ],
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
