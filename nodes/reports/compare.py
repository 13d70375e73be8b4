"""The measurements that compare sampling runs with a reference run, and the nodes IECJoinReports and IECCompare."""

import csv
import io as text_io
import itertools
import math

from comfy_api.latest import io

from ...iec_core.metrics import psnr, relative_error
from ..correction.samplers import after_input, check_is_done
from ..host.inputs import CheckedNode
from ..host.schema import schema
from ..types import Report, as_image, shown_on
from . import grids, plots

COLUMNS = ("variant", "correction_steps", "NFE", "seconds", "relative_error", "PSNR")
MORE = ("more", *(f"more_{number}" for number in range(2, 8)))  # the inputs of Join Reports (IEC) after the first one


class IECJoinReports(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECJoinReports",
            display_name="Join Reports (IEC)",
            category="sampling/IEC",
            description="Puts the reports of up to eight inputs into one list, in order, for Compare Runs (IEC) and the plots. "
            "For more inputs, chain several of these nodes.",
            search_aliases=["merge reports", "combine reports", "concatenate reports"],
            inputs=[
                Report.Input(
                    "reports",
                    tooltip="The first reports. Start with the run in full precision without IEC: the "
                    "very first run is the reference of the comparison.",
                ),
                *(Report.Input(name, optional=name != MORE[0], tooltip="The reports that follow.") for name in MORE),
                after_input("reports"),
            ],
            outputs=[Report.Output(display_name="reports", tooltip="All reports, in order.")],
        )

    @classmethod
    def run(cls, reports, after=None, **more):
        given = {"reports": reports, **{name: more[name] for name in MORE if more.get(name) is not None}}
        for option, found in given.items():
            check_is_done(option, found, after)
        return io.NodeOutput([*itertools.chain.from_iterable(given.values())])


def trajectory_error(report, reference):
    """Return the mean relative error of the batch at the start of every step and at the end; nan where it is unknown."""
    if report.sigmas != reference.sigmas:
        return [math.nan] * (len(report.latents) - 1) + [final_error(report, reference)]
    pairs = zip(report.latents, reference.latents)
    return [math.nan if None in (a, b) else relative_error(a, b).mean().item() for a, b in pairs]


def final_error(report, reference):
    """Return the mean relative error of the batch's final latents."""
    return relative_error(report.latents[-1], reference.latents[-1]).mean().item()


def check_reports(reports, least=1):
    """Raise ValueError if there are fewer than `least` reports, or if one cannot be compared with the first."""
    if len(reports) < least:
        raise ValueError(
            f"reports: the number of runs is {len(reports)}, but must be at least {least}, with the reference first; join the "
            "reports of several KSampler (IEC) nodes with Join Reports (IEC)."
        )
    for report in reports:
        if report.keep_latents and not report.latents:
            raise ValueError(
                f"reports: the run '{report.label}' took no steps, as with denoise 0; compare runs that take steps."
            )
        if report.result is None or not report.latents:
            raise ValueError(
                f"reports: the run '{report.label}' kept no latents; only KSampler (IEC) keeps them, with keep_latents on."
            )
        if report.latents[-1].shape != reports[0].latents[-1].shape:
            raise ValueError(
                f"reports: the run '{report.label}' has latents of shape {tuple(report.latents[-1].shape)}, the reference "
                f"of shape {tuple(reports[0].latents[-1].shape)}; compare runs of the same shape."
            )


def told_apart(reports):
    """Return (label, correction) of every run. If an earlier run has the same pair, add a number to the label."""
    names = []
    for report in reports:
        labels = itertools.chain([report.label], (f"{report.label} ({number})" for number in itertools.count(2)))
        names.append(next(name for label in labels if (name := (label, report.correction)) not in names))
    return names


def captions(reports):
    """Return the caption of every run's images."""
    return [f"{report.label}\nIEC {report.correction}\nNFE {report.nfe}" for report in reports]


def decoded(reports, vae):
    """Return every run's images, float32 [B, H, W, 3] on the CPU. Each frame of a video counts as an image."""
    return [vae.decode(report.result).float().cpu().flatten(0, -4) for report in reports]


def error_plot(reports):
    """Return a plot, as IMAGE, of every run's error relative to the first run, over the steps."""
    errors = [trajectory_error(run, reports[0]) for run in reports]
    return as_image(plots.error_growth([(*name, curve) for name, curve in zip(told_apart(reports), errors)][1:]))


def rows(reports, images):
    """Return a row of texts per run, with the columns COLUMNS; the first run is the reference."""
    measured = []
    for report, image in zip(reports, images):
        error = final_error(report, reports[0])
        quality = psnr(image, images[0])
        texts = str(report.nfe), f"{report.seconds:.2f}", f"{error:.5f}", f"{quality:.2f}"
        measured.append((report.label, report.correction, *texts))
    return measured


def as_csv(lines):
    """Return rows as CSV text, with the header COLUMNS."""
    out = text_io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *lines])
    return out.getvalue()


class IECCompare(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECCompare",
            display_name="Compare Runs (IEC)",
            category="sampling/IEC",
            description="Compares sampling runs with the first one: the images side by side, the relative error of the latent "
            "per step, and a table of evaluations, seconds, final error and PSNR.",
            search_aliases=["compare", "benchmark", "psnr", "side by side", "measure error", "reference"],
            is_output_node=True,
            inputs=[
                Report.Input(
                    "reports",
                    tooltip="One run or more: reports of KSampler (IEC) nodes with keep_latents on, "
                    "joined by Join Reports (IEC). The first run is the reference. Use the same seed, size and batch for all "
                    "runs.",
                ),
                io.Vae.Input(
                    "vae", tooltip="Decodes the final latents. For the built-in model, use VAELoader with pixel_space."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="One row of images per run."),
                io.Image.Output(
                    display_name="error_plot",
                    tooltip="Relative error of the latent at each step, mean over the batch, log scale.",
                ),
                io.String.Output(display_name="table", tooltip=f"CSV with the columns {', '.join(COLUMNS)}."),
                io.Image.Output(display_name="table_image", tooltip="The same table as an image."),
            ],
        )

    @classmethod
    def run(cls, reports, vae):
        check_reports(reports)
        images = decoded(reports, vae)
        grid = as_image(grids.image_grid([(name, batch.numpy()) for name, batch in zip(captions(reports), images)]))
        plot, lines = error_plot(reports), rows(reports, images)
        text, drawn = as_csv(lines), as_image(plots.table(lines))
        return io.NodeOutput(grid, plot, text, drawn, ui=shown_on(cls, [*grid, *plot, *drawn], text))


NODES = [IECJoinReports, IECCompare]
