"""Write the tables of docs/results.md, in Markdown."""

import numpy as np
from answer_rows import MODELS, cache, damping, front, grouped, norms_by_step, precision, rule, told_apart
from experiment_rows import Run


def error(found, name="exact"):
    """Return an error for a table: bold if the interval of its ratio to the uncorrected error is below 1, in italics if it is
    above.
    """
    if not found.columns[f"error_{name}"]:
        return "-"
    text, ratio = f"{found.number(f'error_{name}'):.3f}", found.ratio(name)
    return marked(text, *ratio, 1) if ratio else text


def both(found):
    """Return the error to the exact solution, and in brackets the error to full precision of as many steps."""
    return f"{error(found)} ({error(found, 'same_steps')})"


def marked(text, value, low, high, middle):
    """Return a text in bold if the whole interval is below the middle, in italics if it is above."""
    return f"**{text}**" if high < middle else f"*{text}*" if low > middle else text


def distance(found, name):
    """Return a distance and half the width of its interval, for a table."""
    value, low, high = found.interval(name)
    return f"{value:.3g} ± {(high - low) / 2:.2g}"


def change(found, name):
    """Return the change of a distance for a table, marked like an error by its 95 % interval."""
    value, low, high = found.interval(f"change_{name}")
    return "-" if np.isnan(value) else marked(f"{value:+.3g} ({low:+.2g} to {high:+.2g})", value, low, high, 0)


def markdown(head, lines):
    """Return a table in Markdown; head: texts; lines: lists of as many texts as head."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def pivot(rows, names, subject, column, cell=both):
    """Return a table with a line for every subject(run), a tuple of texts under `names`, and a column for every column(run)."""
    columns = list(dict.fromkeys(column(found.run) for found in rows))
    lines = {}
    for found in rows:
        lines.setdefault(subject(found.run), {})[column(found.run)] = cell(found)
    return markdown([*names, *columns], [[*line, *(cells.get(one, "-") for one in columns)] for line, cells in lines.items()])


def by_rule(rows):
    """Return a table of both errors, with a line for each subject and a column for each rule."""
    return pivot(rows, *told_apart(rows), rule)


def by_distance(rows):
    """Return a table with a line for each run: its distances to the real images, their changes, and both errors."""
    names, of = told_apart(rows)
    head = [*names, "corrected", "evaluations", "Fréchet", "its change", "kernel", "its change", "same steps", "exact"]
    lines = [
        [
            *of(found.run), rule(found.run), found.columns["nfe"],
            distance(found, "imagenet_frechet"), change(found, "imagenet_frechet"),
            distance(found, "imagenet_kernel"), change(found, "imagenet_kernel"),
            error(found, "same_steps"), error(found),
        ]
        for found in grouped(rows, of)
    ]  # fmt: skip
    return markdown(head, lines)


def by_steps(rows):
    """Return a table with a line for each subject (without its steps) and a column for each number of steps; a cell is
    uncorrected → corrected.
    """
    names, of = told_apart(rows, left_out=["steps"])
    pairs = [found for found in rows if found.run.correction_steps != "none" and found.baseline]

    def cell(found):
        return f"{error(found.baseline)} → {both(found)}"

    return pivot(pairs, names, of, lambda run: f"{run.steps} steps", cell)


def by_damping(rows):
    """Return a table with a line for each precision and point, and a column for no correction and for each damping."""
    ordered = sorted(rows, key=lambda found: (found.run.max_iterations, found.run.lambda_))
    plain = {precision(found.run): both(found) for found in rows if found.run.correction_steps == "none"}
    lines = {}
    for found in ordered:
        if found.run.correction_steps != "none":
            lines.setdefault((precision(found.run), found.run.evaluation_point), {})[damping(found.run)] = both(found)
    columns = list(dict.fromkeys(name for cells in lines.values() for name in cells))
    return markdown(
        ["precision", "evaluated", "none", *columns],
        [[*line, plain.get(line[0], "-"), *(cells.get(one, "-") for one in columns)] for line, cells in lines.items()],
    )


def by_choice(rows):
    """Return a table of each model's Pareto front, fastest first; times as shares of 20 plain euler steps."""
    lines = [
        [
            MODELS[model], found.run.sampler, str(found.run.steps), cache(found.run), rule(found.run), found.columns["nfe"],
            f"{found.number('time'):.2f}", both(found),
        ]
        for model in MODELS
        for found in front([one for one in rows if one.run.architecture == model])
    ]  # fmt: skip
    return markdown(["model", "sampler", "steps", "cache", "corrected", "evaluations", "time", "error"], lines)


def by_norm(rows):
    """Return a table with a line for each measured step of a model in a precision: the largest norm of the images, ≥ where it
    is only a lower bound.
    """
    columns = ("growth", "true_growth", "contraction_0.5", "true_contraction_0.5", "contraction_0.9", "true_contraction_0.9")
    lines = []
    for (architecture, quantization, step), numbers in norms_by_step(rows).items():
        subject = MODELS[architecture], precision(Run(quantization=quantization)), str(step)
        bound = "" if numbers["converged"] else "≥ "
        lines.append([*subject, *(f"{bound}{numbers[name]:.3f}" for name in columns)])
    names = ("growth", "true growth", "contraction at 0.5", "true", "at 0.9", "true")
    return markdown(["model", "precision", "step", *names], lines)


def by_weights(rows):
    """Return a table with a line for each measured step on each of the U-Net's weights: the images' largest norms and
    residuals.
    """
    lines = []
    for (weights, quantization, step), numbers in norms_by_step(rows, lambda case: case.weights).items():
        bound = "" if numbers["converged"] else "≥ "
        cells = [f"{bound}{numbers[name]:.3f}" for name in ("growth", "true_growth", "contraction_0.5")]
        cells += [f"{numbers[f'residual_{iteration}']:.4f}" for iteration in (1, 2, 3)]
        lines.append([weights, precision(Run(quantization=quantization)), str(step), *cells])
    head = ["weights", "precision", "step", "growth", "true growth", "contraction at 0.5", "residual 1", "2", "3"]
    return markdown(head, lines)


TABLES = {
    "authors": by_distance, "distances": by_distance, "noise": by_distance,
    "rules": by_rule, "steps": by_rule, "limits": by_rule, "samplers": by_rule, "caches": by_rule,
    "schedules": by_steps, "cells": by_steps, "damping": by_damping, "choices": by_choice, "norms": by_norm,
    "smoothness": by_rule, "smoothness_norms": by_weights,
}  # fmt: skip
