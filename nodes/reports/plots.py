"""Plots of sampling runs, as RGB arrays. Their text is large enough for a node, which shows them 400 pixels wide."""

import itertools
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import IdentityTransform

from ...iec_core.quantization.layer_errors import ranked
from . import fonts

# Okabe and Ito's palette, which can be distinguished with every common colour blindness; the first five are the most distinct.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7")
STYLES = ("-", "--", ":", "-.")
RING = {"marker": "o", "color": COLOURS[4], "markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _figure(height):
    """Return a figure 1040 pixels wide and `height` inches high, at 160 pixels per inch."""
    figure = Figure(figsize=(6.5, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _use_fonts(figure):
    """Let a figure use other installed fonts for characters that the plots' own font lacks."""
    for text in figure.findobj(Text):
        text.set_fontfamily(fonts.families(text.get_text()))


def _picture(figure):
    """Render a figure to uint8 [H, W, 3]."""
    _use_fonts(figure)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def shortened(text, length=40):
    """Return a user's text for a plot; cut its end if it is wider than `length` letters."""
    text, width = fonts.drawable(text), fonts.Letters(100).letters
    if width(text) > length:
        text = next(part for end in range(4 * length, -1, -1) if width(part := f"{text[:end]}…") <= length)
    text = text.replace("$", r"\$")  # else matplotlib draws it as a formula
    return f" {text}" if text.startswith("_") else text  # else legends leave it out


def shortened_apart(labels, length=40):
    """Return {label: the label for a plot}. Labels that are equal once they are shortened get different numbers."""
    found = {}
    for label in dict.fromkeys(labels):
        numbered = (f"{shortened(label, length - 5)} ({number})" for number in itertools.count(2))
        names = itertools.chain([shortened(label, length)], numbered)
        found[label] = next(name for name in names if name not in found.values())
    return found


def _log_scale(axes):
    """Make the y axis logarithmic, with plain numbers at its ticks. Call this after the data are plotted."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_columns(names):
    """Return how many legend columns fit the figure's width."""
    return 2 if len(names) > 2 and max(map(fonts.Letters(100).letters, names)) <= 38 else 1


def run_steps(report):
    """Draw one run's steps: evaluations and sigma, residuals, contraction and damping; uint8 [H, W, 3].

    report: RunReport. Each point is an iteration, averaged over the images that took part in it.
    """
    figure = _figure(6.8)
    cost, residual, contraction = figure.subplots(3, 1, sharex=True)
    steps = [step.step for step in report.steps]
    figure.suptitle("\n".join(_headline(report)), fontsize=11)
    colours = [(COLOURS[1] if step.corrected else "#BBBBBB", 0.4 if step.cached else 1.0) for step in report.steps]
    cost.bar(steps, [step.nfe for step in report.steps], color=colours, width=0.8)
    pale = ";\npale: cached" if any(step.cached for step in report.steps) else ""
    cost.set_ylabel(f"evaluations\n(blue: corrected{pale})")
    cost.yaxis.get_major_locator().set_params(integer=True)
    noise = cost.twinx()
    noise.plot(steps, [step.sigma for step in report.steps], color=COLOURS[2], marker=".")
    _log_scale(noise)
    noise.set_ylabel("sigma", color=COLOURS[2])

    corrected = [step for step in report.steps if step.residuals]
    own = [(*look, f"iteration {number}") for number, look in enumerate(zip(COLOURS[1:], MARKERS), 1)]
    later = "#999999", "x", f"iteration {len(own) + 1} and later"
    for iteration in range(max((len(step.residuals) for step in corrected), default=0)):
        reached = [step for step in corrected if len(step.residuals) > iteration]
        at = [step.step for step in reached]
        colour, style, name = own[iteration] if iteration < len(own) else later
        name = name if iteration <= len(own) else None
        for axes, rows in ((residual, "residuals"), (contraction, "contraction")):
            values = np.array([step.means(rows)[iteration] for step in reached], float)  # None is nan
            axes.plot(at, values, style, color=colour, label=name, alpha=0.9)
    damping = [(step.step, step.means("lambdas")[0]) for step in corrected]
    contraction.plot(*zip(*damping) if damping else ([], []), "_", color=COLOURS[0], markersize=10, label="lambda used first")
    fallen = [step.step for step in report.steps if any(step.fell_back)]
    for step in fallen:
        some = {"label": "an image fell back"} if step == fallen[0] else {}
        contraction.axvspan(step - 0.4, step + 0.4, color=COLOURS[4], alpha=0.35, linewidth=0, **some)
    _log_scale(residual)
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
        figure.legend(*contraction.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    else:
        text = "no step was corrected" if steps else "the sampler's steps are not known"
        residual.text(0.5, 0.5, text, ha="center", transform=residual.transAxes)
    return _picture(figure)


def _headline(report):
    """Return the lines above the plot of a run's steps."""
    yield shortened(report.label, 60)
    yield f"IEC {report.correction}, NFE {report.nfe}, {report.seconds:.2f} s"
    full = [step for step in report.steps if not step.cached]
    if len(full) < len(report.steps):
        cost = f"an expected {report.cached_cost:.2f} of the time without a cache"
        yield f"{len(full)} of {len(report.steps)} steps in full: {cost}"


def _looks(pairs):
    """Return (colour, line style, marker) for each (label, correction). Colour and marker show the label, the line style the
    correction. With a single label the colour shows the correction; with more than 4 corrections the marker depends on the
    correction too. No two are alike for up to 7 labels with up to 28 corrections, or up to 49 labels with up to 4 corrections.
    """
    labels = list(dict.fromkeys(label for label, _ in pairs))
    corrections = sorted(dict.fromkeys(correction for _, correction in pairs), key=lambda name: name != "none")
    groups = -(-len(corrections) // len(STYLES))
    looks = []
    for label, correction in pairs:
        at = corrections.index(correction)
        colour = labels.index(label) if len(labels) > 1 else at
        marker = colour + colour // len(COLOURS) * groups + at // len(STYLES)
        looks.append((COLOURS[colour % len(COLOURS)], STYLES[at % len(STYLES)], MARKERS[marker % len(MARKERS)]))
    return looks


def error_growth(curves):
    """Draw the relative latent error over the steps, log scale; uint8 [H, W, 3].

    curves: list of (label, correction, errors), no two with the same label and correction; errors[i] is the error at the
    start of step i, nan if it is not known.
    """
    short = shortened_apart(label for label, *_ in curves)
    names = [f"{short[label]}, IEC {correction}" for label, correction, _ in curves]
    columns = _legend_columns(names)
    figure = _figure(4 + 0.19 * -(-len(curves) // columns))
    axes = figure.add_subplot()
    looks = _looks([curve[:2] for curve in curves])
    for number, ((_, _, errors), name, (colour, style, marker)) in enumerate(zip(curves, names, looks)):
        errors = np.where(np.asarray(errors) > 0, errors, np.nan)
        apart = max(1, len(errors) // 8)
        # The last one is marked too, so that an error that is known only at the end is visible.
        marked = sorted({*range(1 + number % apart, len(errors), apart), len(errors) - 1})
        look = {"color": colour, "linestyle": style, "marker": marker, "markevery": marked, "markersize": 4, "linewidth": 1.2}
        axes.plot(range(len(errors)), errors, label=name, **look)
    _log_scale(axes)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("relative latent error to the reference")
    axes.grid(True, which="both", alpha=0.25)
    if not any(np.any(np.asarray(errors) > 0) for _, _, errors in curves):
        axes.text(0.5, 0.5, "no run differs from the reference", ha="center", transform=axes.transAxes)
    if curves:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9, handlelength=3.2)
    return _picture(figure)


def _without_the_middle(text, length):
    """Shorten a text to at most `length` characters. Keep its end, which says where a correction is evaluated."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


# x of the columns of a table of runs, as shares of its width: the left edge of the first two columns, the right edge of others.
TABLE = {"run": 0.01, "IEC": 0.41, "NFE": 0.67, "seconds": 0.79, "relative\nerror": 0.9, "PSNR\n(dB)": 0.99}


def table(runs):
    """Draw a table of runs; uint8 [H, W, 3].

    runs: list of (label, correction, NFE, seconds, relative error, PSNR in dB), as texts. The first is the reference.
    """
    short = shortened_apart((label for label, *_ in runs), 31)
    cells = [(short[label], _without_the_middle(correction, 16), *numbers) for label, correction, *numbers in runs]
    figure = _figure(0.3 * (len(cells) + 1.5))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(len(cells) + 0.6, -0.9))
    axes.set_axis_off()
    for row, texts in enumerate([tuple(TABLE), *cells]):
        look = {"fontsize": 10, "va": "center", "weight": "normal" if row else "bold"}
        for column, (text, x) in enumerate(zip(texts, TABLE.values())):
            axes.text(x, row, text, ha="left" if column < 2 else "right", **look)
        axes.axhline(row + 0.5, color="#BBBBBB", linewidth=0.8)
    return _picture(figure)


def _overlap(a, b):
    """Return the area that two boxes (left, bottom, right, top) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def place_labels(points, sizes, bounds, gap, kept_clear=()):
    """Return ([(left, bottom, right, top)], overlap): a box for the label of each point, and the area that is not legible.

    overlap: the area in which boxes cover other boxes, points or the boxes `kept_clear`, or are outside `bounds`; 0 if all
    labels are legible. points: [(x, y)]. sizes: [(width, height)] of the labels. gap: the least distance of a label from its
    point, and half the size of a point. All are in pixels. Each label gets the nearest free place.
    """
    taken = [(x - gap, y - gap, x + gap, y + gap) for x, y in points] + list(kept_clear)
    sides = ((1, 0), (-1, 0), *itertools.product((0, 0.5, -0.5, 1, -1), (1, -1)))
    boxes, total = [], 0
    for (x, y), (width, height) in zip(points, sizes):
        found = []
        for distance, (right, up) in itertools.product((1.2, 2, 4, 6, 8), sides):
            left = x - width / 2 + right * (width / 2 + distance * gap)
            bottom = y - height / 2 + up * (height / 2 + distance * gap)
            box = (left, bottom, left + width, bottom + height)
            outside = width * height - _overlap(box, bounds)
            found.append((round(outside + sum(_overlap(box, other) for other in taken), 3), box))
            if found[-1][0] == 0:
                break
        overlap, box = min(found, key=lambda one: one[0])
        boxes.append(box)
        taken.append(box)
        total += overlap
    return boxes, total


def _label_points(figure, axes, points, texts, lines):
    """Write a text next to each point [(x, y)] of the axes, with a thin line to it. Return whether no text hides anything.

    lines: horizontal and vertical lines [(x, y), (x, y)] that the texts must not cover.
    """
    _use_fonts(figure)
    figure.draw_without_rendering()  # this computes the layout, which then stays fixed
    figure.set_layout_engine("none")
    labels = [figure.text(0, 0, text, fontsize=9, va="bottom", transform=IdentityTransform()) for text in texts]
    _use_fonts(figure)
    extents = [label.get_window_extent() for label in labels]
    at = axes.transData.transform(points)
    bounds, gap = axes.get_window_extent().extents, 4 * figure.dpi / 72
    lines = [axes.transData.transform(line) for line in lines]
    lines = [(*np.min(line, axis=0) - 2, *np.max(line, axis=0) + 2) for line in lines]
    boxes, overlap = place_labels(at, [(extent.width, extent.height) for extent in extents], bounds, gap, lines)
    for label, (x, y), (left, bottom, right, top) in zip(labels, at, boxes):
        label.set_position((left, bottom))
        end = np.clip((x, y), (left, bottom), (right, top))
        start = (x, y) + (end - (x, y)) * gap / max(gap, np.hypot(*(end - (x, y))))
        if np.hypot(*(end - start)) > gap / 2:
            axes.add_artist(Line2D(*zip(start, end), color="#888888", linewidth=0.6, transform=IdentityTransform()))
    return overlap == 0


def _pareto_figure(points, front, reference, cost, texts, listed=(), chosen=None, headline=""):
    """Return (figure, legible) of the Pareto plot.

    texts: written at the points. listed: the points' entries in the legend, if any. reference: (name, cost). chosen: the index
    of the point that gets a ring, None for none. headline: lines of text above the plot. legible:
    whether no text hides anything.
    """
    highest, errors = 1.15 * max(reference[1], *(x for x, _ in points)), [y for _, y in points]
    on_front = {"marker": "o", "color": COLOURS[1], "markersize": 7}
    off_front = {"marker": "s", "color": COLOURS[2], "markersize": 7, "markerfacecolor": "none"}
    looks = [on_front if i in front else off_front for i in range(len(points))]
    at_reference = {"color": COLOURS[0], "linestyle": "--", "linewidth": 1.2}
    keys = [
        Line2D([], [], **at_reference, label=f"reference: {reference[0]}"),
        Line2D([], [], **on_front, label="Pareto front"),
        Line2D([], [], linestyle="", **off_front, label="dominated"),
        *([] if chosen is None else [Line2D([], [], linestyle="", **RING, label="chosen")]),
        *(Line2D([], [], linestyle="", **look, label=line) for look, line in zip(looks, listed)),
    ]
    columns = _legend_columns([key.get_label() for key in keys])
    figure = _figure(4 + 0.19 * -(-len(keys) // columns) + 0.18 * len(headline.splitlines()))
    figure.suptitle(headline, fontsize=10)
    axes = figure.add_subplot(xlim=(0, highest), ylim=(min(errors) / 1.7, max(errors) * 1.7))
    _log_scale(axes)
    axes.set_xlabel(cost)
    axes.set_ylabel("relative error of the final latent")
    axes.set_title("lower left is better", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.axvline(reference[1], **at_reference)
    stairs = list(itertools.pairwise([points[i] for i in front] + [(highest, points[front[-1]][1])]))
    lines = [line for (x, y), (then, lower) in stairs for line in (((x, y), (then, y)), ((then, y), (then, lower)))]
    for line in lines:
        axes.plot(*zip(*line), color=COLOURS[1], linewidth=1.4)
    for point, look in zip(points, looks):
        axes.plot(*point, linestyle="", zorder=3, **look)
    if chosen is not None:
        axes.plot(*points[chosen], linestyle="", zorder=4, **RING)
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, fontsize=9)
    lines.append(((reference[1], min(errors) / 1.7), (reference[1], max(errors) * 1.7)))
    return figure, _label_points(figure, axes, points, texts, lines)


def pareto(runs, front, reference, cost):
    """Draw the runs' error against their cost, and the Pareto front; uint8 [H, W, 3].

    runs: list of (label, correction, cost, error). front: indices of the runs that no other run dominates, cheapest first.
    reference: (label, correction, cost) of the run that errors are relative to. cost: the name of the cost, for the axis. The
    plot shows the names of runs if there is room, otherwise numbers.
    """
    floor = min((error for *_, error in runs if error > 0), default=1e-6) / 3  # where a run with error 0 is drawn
    points = [(spent, error if error > 0 else floor) for *_, spent, error in runs]
    short = shortened_apart([reference[0], *(label for label, *_ in runs)])
    names = [(short[label], f"IEC {correction}{'' if error > 0 else ', error 0'}") for label, correction, _, error in runs]
    reference = f"{short[reference[0]]}, IEC {reference[1]}", reference[2]
    figure, legible = _pareto_figure(points, front, reference, cost, ["\n".join(name) for name in names])
    if not legible:
        listed = [f"{number}  {', '.join(name)}" for number, name in enumerate(names, 1)]
        numbers = [str(number) for number in range(1, len(runs) + 1)]
        figure, _ = _pareto_figure(points, front, reference, cost, numbers, listed)
    return _picture(figure)


def found_settings(candidates, front, chosen, verdict):
    """Draw the candidates of a search: their errors and their shares of the full run's time; uint8 [H, W, 3].

    candidates: list of (settings in words, share, error), in any order. front: as in `pareto`; these have a number, and their
    settings are below the plot. chosen: the index of the chosen one. verdict: a text that stands above the
    plot, of any length.
    """
    order = [*front, *(index for index in range(len(candidates)) if index not in front)]  # the legend lists the first ones
    floor = min((error for *_, error in candidates if error > 0), default=1e-6) / 3  # where an error of 0 is drawn
    points = [(share, error if error > 0 else floor) for _, share, error in (candidates[index] for index in order)]
    short = shortened_apart((candidates[index][0] for index in front), 60)
    listed = [f"{number}  {short[candidates[index][0]]}" for number, index in enumerate(front, 1)]
    texts = [str(number) if number <= len(front) else "" for number in range(1, len(order) + 1)]
    axis, marked = "time as a share of the full run's", order.index(chosen)
    above = textwrap.fill(verdict, 90)
    figure, _ = _pareto_figure(points, list(range(len(front))), ("the full run", 1.0), axis, texts, listed, marked, above)
    return _picture(figure)


def layer_errors(errors, left):
    """Draw the prediction error that each layer causes alone; uint8 [H, W, 3].

    The layers for which full precision removes the most squared error per additional byte come first. errors: LayerErrors.
    left: names of the layers that are suggested to stay in full precision. At most 60 layers are drawn.
    """
    shown = ranked(errors)[:60]
    figure = _figure(1.3 + 0.17 * len(shown))
    axes = figure.subplots()
    places, costs = range(len(shown)), np.sqrt([error.predicted for error in shown])
    least = min(costs[costs > 0], default=1e-6) / 3  # where the bars begin on the log scale
    is_left = [error.name in left for error in shown]
    colours = [COLOURS[2] if one else COLOURS[1] for one in is_left]
    hatches, widths = ["//" if one else "" for one in is_left], np.maximum(costs, least) - least
    bars = axes.barh(places, widths, left=least, color=colours, hatch=hatches, edgecolor="white")
    texts = [f"{cost:.2g}" if cost > 0 else "no change" if error.signal > 0 else "not run" for cost, error in zip(costs, shown)]
    axes.bar_label(bars, texts, padding=3, fontsize=7)
    axes.set_yticks(places, [f"{error.name} ({error.format.split(',')[0]})" for error in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xscale("log")
    most = max([*costs, 10 * least])
    axes.set_xlim(least, most * (most / least) ** 0.15)  # leaves room for the numbers
    axes.set_xlabel("prediction error by this layer alone")
    title = f"{len(shown)} of {len(errors)} quantized layers; first those where full precision removes\n"
    title += "the most squared error per additional byte"
    if left:
        title += f"\norange, hatched: suggested to stay unquantized ({len(left)} in all, {sum(is_left)} of them shown here)"
    figure.suptitle(title, fontsize=10)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    return _picture(figure)


def contraction(report):
    """Draw the norms by which the steps of a run amplify errors and their corrections contract; uint8 [H, W, 3].

    report: ContractionReport. Lines are means over the images; bands span the smallest to the largest value.
    """
    figure = _figure(7.2)
    growth, damped, chosen = figure.subplots(3, 1, sharex=True, height_ratios=(2, 3, 1.3))
    figure.suptitle(f"contraction along {report.total} Euler steps, model {shortened(report.quantization)}", fontsize=11)
    at = [step.step for step in report.steps]
    for values, look, name in (
        ([step.growth for step in report.steps], {"color": "dimgray", "marker": "P"}, "plain step, ||A + BJ||"),
        (
            [step.true_growth for step in report.steps],
            {"color": COLOURS[0], "linestyle": ":", "marker": "x"},
            "by perturbations",
        ),
    ):
        _band(growth, at, values, {**look, "label": name})
    growth.set_ylabel("growth of an\nerror in a step")
    shown = [name for name in ("0.1", "0.3", "0.5", "0.7", "0.9") if report.steps and name in report.steps[0].contraction]
    for name, colour, marker in zip(shown, COLOURS[1:], MARKERS):
        _band(
            damped, at, [step.contraction[name] for step in report.steps],
            {"color": colour, "marker": marker, "label": f"λ {name}"},
        )  # fmt: skip
    own = [step.true_contraction[f"{step.lambda_:g}"] for step in report.steps]
    look = {"color": COLOURS[0], "linestyle": ":", "marker": "x", "label": "by perturbations, at the suggested λ"}
    _band(damped, at, own, look)
    damped.set_ylabel("norm of the iteration\n||(1 \N{MINUS SIGN} λ) I + λ BJ||")
    chosen.step(range(report.total), report.lambdas(), where="mid", color=COLOURS[2])
    chosen.plot(at, [step.lambda_ for step in report.steps], "o", color=COLOURS[2], markersize=4)
    chosen.set_ylabel("λ of\nleast norm")
    chosen.set_ylim(0, 1)
    chosen.set_xlabel("step")
    chosen.xaxis.get_major_locator().set_params(integer=True)
    _log_scale(damped)  # not growth: it is near 1, where a log scale has no labels
    for axes in (growth, damped):
        axes.axhline(1, color="black", linewidth=0.8)
    for axes in (growth, damped, chosen):
        axes.grid(True, alpha=0.25)
        axes.set_xlim(-0.7, max(report.total, 1) - 0.3)
    handles, labels = zip(*(axes.get_legend_handles_labels() for axes in (growth, damped)))
    entries = itertools.chain(*handles), itertools.chain(*labels)
    figure.legend(*map(list, entries), loc="outside lower center", ncols=3, fontsize=8)
    return _picture(figure)


def _band(axes, at, rows, look):
    """Draw the mean of each row of numbers, and a band from its smallest to its largest number."""
    table = np.array(rows, float)  # None is nan
    axes.plot(at, table.mean(1), markersize=4, linewidth=1.2, **look)
    if table.shape[1] > 1:
        axes.fill_between(at, table.min(1), table.max(1), color=look["color"], alpha=0.15, linewidth=0)
