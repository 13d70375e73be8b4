"""Draw the figures of docs/results.md."""

import numpy as np
from answer_rows import MODELS, cache, front, grouped, norms_by_step, place_of, precision, rule, told_apart
from experiment_rows import Run
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's palette, distinguishable with every common colour blindness; the markers distinguish more than seven kinds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def drawing(width, height, panels=1):
    """Return (Figure, its axes); width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def on_lines(axes, labels):
    """Give each label, a tuple of texts, its own line, the first one on top. The part "none" (no cache) is left out."""
    axes.set_yticks(range(len(labels)), [", ".join(part for part in label if part != "none") for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")


def legend_below(figure, axes):
    """Put the legend of the axes' points below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)


def style(place):
    """Return the colour and marker of the `place`-th kind of points."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def plain_numbers(axis, low, high):
    """Give a logarithmic axis round ticks (1, 2, 5 times powers of ten) from low to high, written as plain numbers."""
    ticks = [one * 10.0**power for power in range(-4, 3) for one in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def ratios(rows, name=rule, subject_of=None):
    """Draw the error divided by the uncorrected error: a line for each subject, a marker for each name(run). Return None if no
    row has such a ratio.
    """
    of = subject_of or told_apart(rows)[1]
    corrected = [found for found in rows if found.ratio("exact")]
    if not corrected:
        return None
    subjects = list(dict.fromkeys(of(found.run) for found in corrected))
    names = list(dict.fromkeys(name(found.run) for found in corrected))
    figure, (axes,) = drawing(9, 1.4 + 0.32 * len(subjects) + 0.1 * len(names))
    for place, one in enumerate(names):
        points = [found for found in corrected if name(found.run) == one]
        values, lows, highs = np.array([found.ratio("exact") for found in points]).T
        heights = [subjects.index(of(found.run)) + 0.6 * (place / max(len(names) - 1, 1) - 0.5) for found in points]
        axes.errorbar(values, heights, xerr=[values - lows, highs - values], ls="", ms=4, lw=0.8, label=one, **style(place))
    axes.axvline(1, color="0.6", lw=1, zorder=0)
    on_lines(axes, subjects)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis, *axes.get_xlim())
    axes.set_xlabel("error to the exact solution, over that without a correction")
    legend_below(figure, axes)
    return figure


def ratios_by_steps(rows):
    """Draw `ratios` with a line for each subject (without its number of steps), and a marker for each number of steps."""
    return ratios(rows, lambda run: f"{run.steps} steps", told_apart(rows, left_out=["steps"])[1])


def changes(rows):
    """Draw by how much each run changes the Fréchet distance and the error, a line for each run. Return None if no run is
    compared with a baseline.
    """
    _, of = told_apart(rows)
    changed = grouped([found for found in rows if found.columns["change_imagenet_frechet"]], of)
    if not changed:
        return None
    names = {
        "change_imagenet_frechet": "change of the Fréchet distance",
        "change_exact": "change of the error to the exact solution",
    }
    names = {name: words for name, words in names.items() if any(found.columns[name] for found in changed)}
    figure, panels = drawing(2 + 4 * len(names), 1 + 0.3 * len(changed), len(names))
    for axes, (name, words) in zip(panels, names.items()):
        for height, found in enumerate(changed):
            value, low, high = found.interval(name)
            if np.isnan(value):
                continue
            colour = COLOURS[2] if high < 0 else COLOURS[1] if low > 0 else "0.5"
            axes.errorbar([value], [height], xerr=[[value - low], [high - value]], fmt="o", ms=4, color=colour)
        axes.axvline(0, color="0.6", lw=1, zorder=0)
        on_lines(axes, [(*of(found.run), rule(found.run)) for found in changed])
        axes.set_xlabel(words)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    for axes in panels[1:]:
        axes.set_yticklabels([])
    return figure


def against_damping(rows):
    """Draw the error over the damping of one iteration, for each precision and point. Return None if no row is corrected."""
    corrected = [found for found in rows if found.run.correction_steps != "none" and found.run.max_iterations == 1]
    if not corrected:
        return None
    figure, (axes,) = drawing(8, 4)
    kinds = list(dict.fromkeys((precision(found.run), found.run.evaluation_point) for found in corrected))
    for place, kind in enumerate(kinds):
        points = sorted(
            (found.run.lambda_, *found.interval("error_exact"))
            for found in corrected
            if (precision(found.run), found.run.evaluation_point) == kind
        )
        x, value, low, high = np.array(points).T
        axes.errorbar(x, value, yerr=[value - low, high - value], lw=1, ms=4, label=", ".join(kind), **style(place))
    for found in rows:
        if found.run.correction_steps == "none":
            line = {"color": "0.4", "ls": "--" if found.run.quantization == "none" else ":"}
            axes.axhline(found.number("error_exact"), lw=1, label=f"{precision(found.run)}, none", **line)
    axes.set(yscale="log", xlabel="lambda", ylabel="error to the exact solution")
    plain_numbers(axes.yaxis, *axes.get_ylim())
    axes.grid(color="0.9")
    legend_below(figure, axes)
    return figure


def kind_of_choice(run):
    return ", ".join([run.sampler, *([cache(run).partition(",")[0].partition(" ")[0]] if run.interval > 1 else []), rule(run)])


def against_time(rows):
    """Draw the error over the time (as a share of 20 plain euler steps), for each model, with the Pareto front."""
    figure, panels = drawing(11, 5.5, 2)
    kinds = list(dict.fromkeys(kind_of_choice(found.run) for found in rows))
    for axes, (model, name) in zip(panels, MODELS.items()):
        own = [found for found in rows if found.run.architecture == model]
        for place, kind in enumerate(kinds):
            points = [place_of(one) for one in own if kind_of_choice(one.run) == kind]
            if points:
                axes.plot(*zip(*points), ls="", ms=6, label=kind, **style(place))
        best = [place_of(found) for found in front(own)]
        if best:
            axes.plot(*zip(*best), color="0.5", lw=1, zorder=0)
        axes.set(xscale="log", yscale="log", title=name)
        axes.set(xlabel="time, of that of 20 euler steps", ylabel="error to the exact solution")
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            plain_numbers(axis, *limits)
        axes.grid(color="0.9")
    legend_below(figure, panels[0])
    return figure


def along_the_run(rows):
    """Draw, for each model, the growth over the steps in each precision, and the contraction over the damping in each step."""
    found = norms_by_step(rows)
    models = [name for name in MODELS if any(architecture == name for architecture, _, _ in found)]
    figure = Figure(figsize=(10, 3.6 * len(models)), dpi=110, layout="constrained")
    for panels, model in zip(figure.subplots(len(models), 2, squeeze=False), models):
        own = {place[1:]: numbers for place, numbers in found.items() if place[0] == model}
        _growths(panels[0], own)
        _contractions(panels[1], {step: numbers for (quantization, step), numbers in own.items() if quantization == "none"})
        panels[0].set_title(MODELS[model])
    return figure


def _growths(axes, own):
    for place, quantization in enumerate(dict.fromkeys(quantization for quantization, _ in own)):
        steps = [step for one, step in own if one == quantization]
        for name, line in (("growth", "-"), ("true_growth", "--")):
            values = [own[quantization, step][name] for step in steps]
            label = precision(Run(quantization=quantization)) if line == "-" else None
            axes.plot(steps, values, line, ms=4, label=label, **style(place))
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    axes.set(xlabel="step", ylabel="||A + B J||, dashed: by changes of 1 %")
    axes.legend(fontsize="small", frameon=False)


def _contractions(axes, steps):
    for place, (step, numbers) in enumerate(steps.items()):
        points = [(float(name.rpartition("_")[2]), value) for name, value in numbers.items() if name.startswith("contraction_")]
        axes.plot(*zip(*points), ms=4, label=f"step {step}", **style(place))
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    axes.set(xlabel="lambda", ylabel="||(1 - lambda) I + lambda B J||")
    axes.legend(fontsize="small", frameon=False)


def of_weights(rows):
    """Draw the growth, the contraction and the residuals over the steps, for each of the U-Net's weights; dashed: quantized."""
    found = norms_by_step(rows, lambda case: case.weights)
    figure, panels = drawing(13, 4.2, 4)
    drawn = {
        "growth": "||A + B J||", "contraction_0.5": "||0.5 I + 0.5 B J||",
        "residual_1": "residual of the 1st iteration", "residual_3": "residual of the 3rd iteration",
    }  # fmt: skip
    kinds = list(dict.fromkeys((weights, quantization) for weights, quantization, _ in found))
    colours = list(dict.fromkeys(weights for weights, _ in kinds))
    for axes, (name, words) in zip(panels, drawn.items()):
        for weights, quantization in kinds:
            points = [(at[2], numbers[name]) for at, numbers in found.items() if at[:2] == (weights, quantization)]
            label, line = f"{weights}, {precision(Run(quantization=quantization))}", "-" if quantization == "none" else "--"
            axes.plot(*zip(*points), line, ms=4, label=label, **style(colours.index(weights)))
        axes.set(xlabel="step", ylabel=words)
        axes.grid(color="0.9")
    for axes in panels[2:]:
        axes.set_yscale("log")
    legend_below(figure, panels[0])
    return figure


FIGURES = {
    "authors": changes, "distances": changes, "noise": changes,
    "rules": ratios, "steps": ratios, "limits": ratios, "samplers": ratios, "caches": ratios,
    "schedules": ratios_by_steps, "cells": ratios_by_steps,
    "damping": against_damping, "choices": against_time, "norms": along_the_run,
    "smoothness": ratios, "smoothness_norms": of_weights,
}  # fmt: skip
