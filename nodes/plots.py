"""Pictures of sampling runs, as RGB arrays: the error-growth plot and the labelled image grid."""

import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette: told apart with every common colour blindness.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")


def _picture(figure):
    """Render a figure to uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _means(step, rows):
    """Mean of every iteration's numbers over the images that it was iterated for, nan where there is none.

    step: StepReport; rows: the name of one of its lists. An image that is done has no contraction.
    """
    means = []
    for row, contraction in zip(getattr(step, rows), step.contraction):
        kept = [value for value, still in zip(row, contraction) if still is not None and value is not None]
        means.append(np.mean(kept) if kept else np.nan)
    return means


def run_steps(report):
    """Draw one run's steps: evaluations and sigma, residuals, contraction and damping; uint8 [H, W, 3].

    report: RunReport. A point for each iteration, the mean over the images that it was iterated for.
    """
    figure = Figure(figsize=(10, 8), dpi=110, layout="constrained")
    cost, residual, contraction = figure.subplots(3, 1, sharex=True)
    steps = [step.step for step in report.steps]
    name = textwrap.shorten(report.label, 60, placeholder="...")
    figure.suptitle(f"{name}\nIEC {report.correction}, NFE {report.nfe}, {report.seconds:.2f} s", fontsize=11)
    colours = [COLOURS[1] if step.corrected else "#BBBBBB" for step in report.steps]
    cost.bar(steps, [step.nfe for step in report.steps], color=colours, width=0.8)
    cost.set_ylabel("evaluations\n(blue: corrected)")
    cost.yaxis.get_major_locator().set_params(integer=True)
    noise = cost.twinx()
    noise.plot(steps, [step.sigma for step in report.steps], color=COLOURS[2], marker=".")
    noise.set_yscale("log")
    noise.set_ylabel("sigma", color=COLOURS[2])

    corrected = [step for step in report.steps if step.residuals]
    for iteration in range(max((len(step.residuals) for step in corrected), default=0)):
        reached = [step for step in corrected if len(step.residuals) > iteration]
        at, style = [step.step for step in reached], MARKERS[iteration % len(MARKERS)]
        name, colour = f"iteration {iteration + 1}", COLOURS[1 + iteration % (len(COLOURS) - 1)]
        for axes, rows in ((residual, "residuals"), (contraction, "contraction")):
            values = [_means(step, rows)[iteration] for step in reached]
            axes.plot(at, values, style, color=colour, label=name, alpha=0.9)
    damping = [(step.step, _means(step, "lambdas")[0]) for step in corrected]
    contraction.plot(*zip(*damping) if damping else ([], []), "_", color=COLOURS[0], markersize=10, label="lambda used first")
    fallen = [step.step for step in report.steps if any(step.fell_back)]
    for step in fallen:
        some = {"label": "an image fell back"} if step == fallen[0] else {}
        contraction.axvspan(step - 0.4, step + 0.4, color=COLOURS[5], alpha=0.35, linewidth=0, **some)
    residual.set_yscale("log")
    residual.set_ylabel("relative residual")
    contraction.axhline(1, color="black", linewidth=0.8)
    contraction.set_ylabel("contraction of the\ndamped map; lambda")
    contraction.set_ylim(bottom=0)
    contraction.set_xlabel("step")
    contraction.xaxis.get_major_locator().set_params(integer=True)
    for axes in (cost, residual, contraction):
        axes.grid(True, alpha=0.25)
        axes.set_xlim(-0.7, max(len(steps), 1) - 0.3)
    if corrected:
        figure.legend(*contraction.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    else:
        text = "no step was corrected" if steps else "the sampler's steps are not known"
        residual.text(0.5, 0.5, text, ha="center", transform=residual.transAxes)
    return _picture(figure)


def error_growth(curves):
    """Draw the relative latent error over the steps, log scale; uint8 [H, W, 3].

    curves: list of (label, correction, errors), errors[i] the error at the start of step i, nan where there is none.
    A colour stands for a label, a line style for a correction.
    """
    labels = list(dict.fromkeys(label for label, _, _ in curves))
    corrections = dict.fromkeys(correction for _, correction, _ in curves)
    corrections = sorted(corrections, key=lambda correction: correction != "none")  # solid is uncorrected
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label, correction, errors in curves:
        errors = np.where(np.asarray(errors) > 0, errors, np.nan)
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        style = STYLES[corrections.index(correction) % len(STYLES)]
        axes.plot(range(len(errors)), errors, color=colour, linestyle=style, label=f"{label}, IEC {correction}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative latent error to the reference run")
    axes.grid(True, which="both", alpha=0.25)
    if curves:
        figure.legend(loc="outside right upper", fontsize=9)
    return _picture(figure)


def image_grid(rows, tile=96, columns=8):
    """Draw one row of images per run with its caption at the left; uint8 [H, W, 3].

    rows: list of (caption, images), images float [B, H, W, 3] in 0..1; at most `columns` of a row are shown. Images are
    scaled to a width of about `tile` pixels, by repeating pixels where that enlarges them.
    """
    gap, text_width, font = 4, 330, ImageFont.load_default(size=18)
    shown = [(caption, images[:columns]) for caption, images in rows]
    height = round(tile * shown[0][1].shape[1] / shown[0][1].shape[2])
    width = text_width + (tile + gap) * max(len(images) for _, images in shown)
    grid = Image.new("RGB", (width, (height + gap) * len(shown)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (caption, images) in enumerate(shown):
        top = row * (height + gap)
        draw.multiline_text((8, top + height // 2), caption, fill="black", font=font, anchor="lm", spacing=6)
        for column, image in enumerate(images):
            picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
            method = Image.NEAREST if picture.width < tile else Image.LANCZOS
            grid.paste(picture.resize((tile, height), method), (text_width + column * (tile + gap), top))
    return np.asarray(grid)


def layer_errors(errors, left):
    """Draw the layers' output SQNR, the worst first; uint8 [H, W, 3].

    errors: LayerErrors. left: names of those that are suggested to stay in full precision. More than 60 layers: the worst 60.
    """
    shown = sorted(errors, key=lambda error: -error.relative_noise)[:60]
    figure = Figure(figsize=(11, 1.4 + 0.22 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    places, ratios = range(len(shown)), np.array([error.sqnr for error in shown])
    finite = np.isfinite(ratios)
    widths = np.where(finite, ratios, np.where(np.isnan(ratios), 0, max(ratios[finite], default=1)))
    is_left = [error.name in left for error in shown]
    colours = [COLOURS[2] if one else COLOURS[1] for one in is_left]
    bars = axes.barh(places, widths, color=colours, hatch=["//" if one else "" for one in is_left], edgecolor="white")
    texts = [f"{ratio:.1f}" if np.isfinite(ratio) else "not run" if np.isnan(ratio) else "no error" for ratio in ratios]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_yticks(places, [f"{error.name} ({error.format.split(',')[0]})" for error in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel("output SQNR, dB: higher is better")
    title = f"{len(shown)} of {len(errors)} quantized layers, the worst first"
    if left:
        title += f"\norange, hatched: suggested to leave in full precision ({len(left)} in all, {sum(is_left)} of these here)"
    figure.suptitle(title, fontsize=11)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    return _picture(figure)
