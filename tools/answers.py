"""The tables and figures of docs/results.md, made from the rows in docs/results in seconds: nothing is sampled.

    python tools/answers.py

In docs/results.md a table stands between `<!-- table NAME -->` and `<!-- end -->`; what stands there is replaced, and nothing
else. Where there is no such page, it begins as the list of the questions. A figure is docs/results/NAME.png. A row that is not
there yet is left out, and so is a figure that has none.
"""

import pathlib
import re
import sys
from dataclasses import dataclass

import comfyui
import experiment_rows
import experiments
import norms
import numpy as np
import sample_distance
from experiment_rows import CHUNK, Run
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, StrMethodFormatter

LEVEL = 0.99  # of the intervals of ratios: there are hundreds of them
PAGE = comfyui.ROOT / "docs/results.md"
MODELS = {"unet": "U-Net", "transformer": "transformer"}
# Okabe and Ito's palette, told apart with every common colour blindness, and what tells more than seven apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, eq=False)
class Found:
    """A Run; the columns of its row, a text each, empty where there is nothing to say; the Found of its baseline, if it is not
    one itself.
    """

    run: Run
    columns: dict
    baseline: "Found | None" = None

    def number(self, name):
        """Return a column's number; NaN where it is empty."""
        return float(self.columns[name] or "nan")

    def interval(self, name):
        """Return (value, low, high) of a column that has an interval."""
        return tuple(self.number(name + end) for end in ("", "_low", "_high"))

    def errors(self, name):
        """Return the images' errors, float64 [images]."""
        return np.array([float(text) for text in self.columns[f"errors_{name}"].split(";")])

    def ratio(self, name):
        """Return (value, low, high) of the error over that of the run that it is compared with, in pairs of images; None where
        there is no such error.
        """
        comparable = name == "exact" or not self.run.instead_of  # a baseline of other steps has another run of as many
        if self.baseline is None or not comparable or not self.columns[f"errors_{name}"]:
            return None
        found = sample_distance.ratio_with_interval(self.errors(name), self.baseline.errors(name), LEVEL)
        return found.value, found.low, found.high


def read(folder=experiments.RESULTS):
    """Return {file name without suffix: [Found, ...]} of the rows that are there, in the declared order."""
    files = experiment_rows.declared("small", CHUNK)
    results = experiments.Results(folder, files)
    return {
        name: with_baselines({row.run: found for row in rows if (found := results.get(row))}) for name, rows in files.items()
    }


def with_baselines(columns):
    """Return [Found, ...] of {Run: its columns}, each with that of the run that it is compared with, if that is there."""
    plain = {run: Found(run, found) for run, found in columns.items()}
    return [Found(run, found, plain.get(run.baseline) if run.baseline != run else None) for run, found in columns.items()]


def read_norms(folder=experiments.RESULTS):
    """Return [(norms.StepRow, its columns), ...] of the norms that are there."""
    results = norms.results(folder)
    return [(row, found) for row in norms.declared()["norms"] if (found := results.get(row))]


# How a run is called.


def precision(run):
    return "full precision" if run.quantization == "none" else run.quantization


def cache(run):
    if run.interval == 1:
        return "none"
    return f"{'DeepCache' if run.cache == 'deepcache' else 'calibrated'} {run.interval}, {run.forecast}"


def rule(run):
    """Return what is corrected, and where; or the control, or the steps instead."""
    if run.instead_of:
        return f"{run.steps} steps"
    if run.control != "none":
        return run.control
    if run.correction_steps in ("none", "auto"):
        return run.correction_steps
    return f"{run.correction_steps}, {run.evaluation_point}"


def damping(run):
    return f"K {run.max_iterations}" if run.max_iterations > 1 else f"{run.lambda_:g}"


# Tables.


def error(found, name="exact"):
    """Return an error for a table: bold where the interval of its ratio to that without a correction lies below 1, in italics
    where it lies above.
    """
    if not found.columns[f"error_{name}"]:
        return "-"
    text, ratio = f"{found.number(f'error_{name}'):.3f}", found.ratio(name)
    return marked(text, *ratio, 1) if ratio else text


def marked(text, value, low, high, middle):
    """Return a text in bold where the whole interval lies below the middle, in italics where it lies above."""
    return f"**{text}**" if high < middle else f"*{text}*" if low > middle else text


def distance(found, name):
    """Return a distance with the half of its interval for a table."""
    value, low, high = found.interval(name)
    return f"{value:.3g} ± {(high - low) / 2:.2g}"


def change(found, name):
    """Return the change of a distance for a table, marked as an error is, by its interval of 95 %."""
    value, low, high = found.interval(f"change_{name}")
    return "-" if np.isnan(value) else marked(f"{value:+.3g} ({low:+.2g} to {high:+.2g})", value, low, high, 0)


def markdown(head, lines):
    """Return a table in Markdown; head: texts; lines: lists of as many."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def pivot(rows, names, subject, column, cell=error):
    """Return a table with a line for every subject(run), a tuple of texts under `names`, and a column for every column(run)."""
    columns = list(dict.fromkeys(column(found.run) for found in rows))
    lines = {}
    for found in rows:
        lines.setdefault(subject(found.run), {})[column(found.run)] = cell(found)
    return markdown([*names, *columns], [[*line, *(cells.get(one, "-") for one in columns)] for line, cells in lines.items()])


def subject(run):
    """Return what a run corrects, in words: the parts that tell the rows of a file apart."""
    return MODELS[run.architecture], run.sampler, run.scheduler, str(run.baseline.steps), precision(run), cache(run)


SUBJECT = ("model", "sampler", "schedule", "steps", "precision", "cache")


def grouped(rows, of):
    """Return the rows with those of the same of(run) one after the other, in the order of the first of them."""
    groups = list(dict.fromkeys(of(found.run) for found in rows))
    return sorted(rows, key=lambda found: groups.index(of(found.run)))


def told_apart(rows):
    """Return (names, subject): those parts of `subject` alone in which the runs differ."""
    parts = [subject(found.run) for found in rows]
    kept = [place for place in range(len(SUBJECT)) if len({part[place] for part in parts}) > 1]
    return [SUBJECT[place] for place in kept], lambda run: tuple(subject(run)[place] for place in kept)


def by_rule(rows):
    """The errors to the exact solution, a line for each subject and a column for each rule."""
    return pivot(rows, *told_apart(rows), rule)


def by_distance(rows):
    """A line for each run: its distances to the real images, how they change, and both errors."""
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


def by_schedule(rows):
    """A line for each schedule, a column for each number of steps: without a correction, and with every step corrected."""
    plain = {(found.run.scheduler, found.run.steps): found for found in rows if found.run.correction_steps == "none"}
    pairs = [found for found in rows if found.run.correction_steps != "none"]

    def cell(found):
        return f"{error(plain[found.run.scheduler, found.run.steps])} → {error(found)}"

    known = [found for found in pairs if (found.run.scheduler, found.run.steps) in plain]
    return pivot(known, ["schedule"], lambda run: (run.scheduler,), lambda run: f"{run.steps} steps", cell)


def by_damping(rows):
    """A line for each precision and point, a column for none and for each damping."""
    ordered = sorted(rows, key=lambda found: (found.run.max_iterations, found.run.lambda_))
    plain = {precision(found.run): error(found) for found in rows if found.run.correction_steps == "none"}
    lines = {}
    for found in ordered:
        if found.run.correction_steps != "none":
            lines.setdefault((precision(found.run), found.run.evaluation_point), {})[damping(found.run)] = error(found)
    columns = list(dict.fromkeys(name for cells in lines.values() for name in cells))
    return markdown(
        ["precision", "evaluated", "none", *columns],
        [[*line, plain.get(line[0], "-"), *(cells.get(one, "-") for one in columns)] for line, cells in lines.items()],
    )


def front(rows):
    """Return the rows that no other is both faster and better than, fastest first."""
    kept = []
    for found in sorted(rows, key=lambda found: (found.number("seconds_an_image"), found.number("error_exact"))):
        if not kept or found.number("error_exact") < kept[-1].number("error_exact"):
            kept.append(found)
    return kept


def by_choice(rows):
    """The front of each model, fastest first."""
    lines = [
        [
            MODELS[model], found.run.sampler, str(found.run.steps), cache(found.run), rule(found.run), found.columns["nfe"],
            f"{found.number('seconds_an_image'):.2f}", error(found),
        ]
        for model in MODELS
        for found in front([one for one in rows if one.run.architecture == model])
    ]  # fmt: skip
    return markdown(["model", "sampler", "steps", "cache", "corrected", "evaluations", "seconds an image", "error"], lines)


def norms_by_step(rows):
    """Return {(architecture, quantization, step): {column: the largest of the images' numbers}} of rows of norms; NaN where one
    is not finite. "converged": whether all are; those that are not are bounds from below.
    """
    found = {}
    for row, columns in rows:
        numbers = found.setdefault((row.case.architecture, row.case.quantization, row.step), {"converged": True})
        numbers["converged"] &= columns["converged"] == "True"
        for name, text in columns.items():
            if "growth" in name or "contraction" in name:
                numbers[name] = float(np.max([numbers.get(name, 0.0), float(text or "nan")]))
    return found


def by_norm(rows):
    """A line for each measured step of a model in a precision; the largest norm of the images, ≥ where it is but a bound."""
    columns = ("growth", "true_growth", "contraction_0.5", "true_contraction_0.5", "contraction_0.9", "true_contraction_0.9")
    lines = []
    for (architecture, quantization, step), numbers in norms_by_step(rows).items():
        subject = MODELS[architecture], precision(Run(quantization=quantization)), str(step)
        bound = "" if numbers["converged"] else "≥ "
        lines.append([*subject, *(f"{bound}{numbers[name]:.3f}" for name in columns)])
    names = ("growth", "true growth", "contraction at 0.5", "true", "at 0.9", "true")
    return markdown(["model", "precision", "step", *names], lines)


TABLES = {
    "authors": by_distance, "distances": by_distance, "noise": by_distance,
    "rules": by_rule, "steps": by_rule, "samplers": by_rule, "caches": by_rule,
    "schedules": by_schedule, "damping": by_damping, "choices": by_choice, "norms": by_norm,
}  # fmt: skip


# Figures.


def drawing(width, height, panels=1):
    """Return (Figure, its axes); sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def on_lines(axes, labels):
    """Give each of the labels, tuples of texts, a line of its own, the first one on top. That there is no cache is not said."""
    axes.set_yticks(range(len(labels)), [", ".join(part for part in label if part != "none") for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")


def legend_below(figure, axes):
    """Put the legend of the axes' points below all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)


def style(place):
    """Return how the `place`-th of several kinds of points is drawn."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def plain_numbers(axis, low, high):
    """Let a logarithmic axis have round numbers from low to high for ticks, written out."""
    ticks = [one * 10.0**power for power in range(-4, 3) for one in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def ratios(rows, name=rule, subject_of=None):
    """The error over that without a correction: a line for each subject, a marker for each name(run); None where no row has
    such a ratio.
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


def ratios_by_schedule(rows):
    """`ratios` with a line for each schedule, and a marker for each number of steps."""
    return ratios(rows, lambda run: f"{run.steps} steps", lambda run: (run.scheduler,))


def changes(rows):
    """How the Fréchet distance and the error change by what a run does, a line for each run; None where none is compared."""
    _, of = told_apart(rows)
    changed = grouped([found for found in rows if found.columns["change_imagenet_frechet"]], of)
    if not changed:
        return None
    figure, panels = drawing(10, 1 + 0.3 * len(changed), 2)
    names = {
        "change_imagenet_frechet": "change of the Fréchet distance",
        "change_exact": "change of the error to the exact solution",
    }
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
    panels[1].set_yticklabels([])
    return figure


def against_damping(rows):
    """The error over the damping of one iteration, for each precision and point; None where no row is corrected."""
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


def place_of(found):
    """Return (time of an image in seconds, error to the exact solution)."""
    return found.number("seconds_an_image"), found.number("error_exact")


def kind_of_choice(run):
    return ", ".join([run.sampler, *([cache(run).partition(",")[0].partition(" ")[0]] if run.interval > 1 else []), rule(run)])


def against_time(rows):
    """The error over the time that an image takes, for each model, with the front."""
    figure, panels = drawing(11, 5.5, 2)
    kinds = list(dict.fromkeys(kind_of_choice(found.run) for found in rows))
    for axes, (model, name) in zip(panels, MODELS.items()):
        own = [found for found in rows if found.run.architecture == model]
        for place, kind in enumerate(kinds):
            points = [
                (one.number("seconds_an_image"), one.number("error_exact")) for one in own if kind_of_choice(one.run) == kind
            ]
            if points:
                axes.plot(*zip(*points), ls="", ms=6, label=kind, **style(place))
        best = [place_of(found) for found in front(own)]
        if best:
            axes.plot(*zip(*best), color="0.5", lw=1, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="seconds an image", ylabel="error to the exact solution", title=name)
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            plain_numbers(axis, *limits)
        axes.grid(color="0.9")
    legend_below(figure, panels[0])
    return figure


def along_the_run(rows):
    """For each model, the growth over the steps in each precision, and the contraction over the damping in each step."""
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
    axes.set(xlabel="step", ylabel="||A + B J||, dashed: by changes of 1 %", yscale="log")
    plain_numbers(axes.yaxis, *axes.get_ylim())
    axes.legend(fontsize="small", frameon=False)


def _contractions(axes, steps):
    for place, (step, numbers) in enumerate(steps.items()):
        points = [(float(name.rpartition("_")[2]), value) for name, value in numbers.items() if name.startswith("contraction_")]
        axes.plot(*zip(*points), ms=4, label=f"step {step}", **style(place))
    axes.axhline(1, color="0.6", lw=1, zorder=0)
    axes.set(xlabel="lambda", ylabel="||(1 - lambda) I + lambda B J||")
    axes.legend(fontsize="small", frameon=False)


FIGURES = {
    "authors": changes, "distances": changes, "noise": changes,
    "rules": ratios, "steps": ratios, "samplers": ratios, "caches": ratios,
    "schedules": ratios_by_schedule, "damping": against_damping, "choices": against_time, "norms": along_the_run,
}  # fmt: skip
NORMS_ASKED = "By how much does a step multiply an error, and does the correction contract?"


def frame():
    """Return a page of all questions, with a place for the table of each and its figure."""
    asked = {question.file: question.asked for question in experiment_rows.QUESTIONS} | {"norms": NORMS_ASKED}
    parts = [
        f"## {text}\n\n<!-- table {name} -->\n<!-- end -->\n\n![{text}](results/{name}.png)\n" for name, text in asked.items()
    ]
    return "\n".join(["# Results\n", *parts])


def with_tables(text, tables):
    """Return a page in which the tables, {name: Markdown}, stand at their places. Raises ValueError for a place of no table,
    for one without an end, and for a table without a place.
    """
    places = re.findall(r"<!-- table (\S+) -->\n(?:(?!<!-- table ).)*?<!-- end -->", text, re.DOTALL)
    begun = re.findall(r"<!-- table (\S+) -->", text)
    if wrong := [name for name in begun if name not in tables]:
        raise ValueError(f"{', '.join(wrong)}: there is no such table; the page can have {', '.join(tables)}.")
    if wrong := [name for name in begun if name not in places]:
        raise ValueError(f"{', '.join(wrong)}: the table's place has no end; write <!-- end --> below it.")
    if wrong := [name for name in tables if name not in places]:
        raise ValueError(
            f"{', '.join(wrong)}: the page has no place for this table; write <!-- table {wrong[0]} --> and its end."
        )
    for name, table in tables.items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


def write(results=experiments.RESULTS, page=PAGE):
    """Put the tables into the page, and write the figures beside the rows; return the paths that were written."""
    results, page = pathlib.Path(results), pathlib.Path(page)
    rows = read(results) | {"norms": read_norms(results)}
    tables = {name: table(rows[name]) if rows[name] else "No row is there yet." for name, table in TABLES.items()}
    page.write_text(with_tables(page.read_text() if page.exists() else frame(), tables))
    figures = {name: draw(rows[name]) for name, draw in FIGURES.items() if rows[name]}
    drawn = {results / f"{name}.png": figure for name, figure in figures.items() if figure}
    for path, figure in drawn.items():
        figure.savefig(path, metadata={"Software": None})
    return [page, *drawn]


if __name__ == "__main__":
    try:
        print(*write(), sep="\n")
    except (OSError, ValueError) as failure:
        sys.exit(str(failure))
