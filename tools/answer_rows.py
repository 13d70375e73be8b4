"""Read the rows of docs/results for the tables and figures, each with its baseline, and name the runs."""

from dataclasses import dataclass

import experiment_rows
import experiments
import norms
import numpy as np
import sample_distance
import times
from experiment_rows import CHUNK, Run

LEVEL = 0.99  # confidence level of the intervals of ratios; high because there are hundreds of them
MODELS = {"unet": "U-Net", "transformer": "transformer"}


@dataclass(frozen=True, eq=False)
class Found:
    """A Run, the columns of its row (a text each, empty where a value is missing), and the Found of its baseline, None if the
    run is a baseline itself.
    """

    run: Run
    columns: dict
    baseline: "Found | None" = None

    def number(self, name):
        """Return the number in a column; NaN where the column is empty."""
        return float(self.columns[name] or "nan")

    def interval(self, name):
        """Return (value, low, high) of a column that has an interval."""
        return tuple(self.number(name + end) for end in ("", "_low", "_high"))

    def errors(self, name):
        """Return the error of each image, float64 [images]."""
        return np.array([float(text) for text in self.columns[f"errors_{name}"].split(";")])

    def ratio(self, name):
        """Return (value, low, high) of the error over the baseline's error, in pairs of images.

        All three are infinity where only the baseline's error is zero, and 1 where both errors are. None where there is no such
        error.
        """
        comparable = name == "exact" or not self.run.instead_of  # with other steps, same_steps is another run
        if self.baseline is None or not comparable or not self.columns[f"errors_{name}"]:
            return None
        if not self.baseline.errors(name).any():  # full precision, compared with itself
            return (np.inf if self.errors(name).any() else 1.0,) * 3
        found = sample_distance.ratio_with_interval(self.errors(name), self.baseline.errors(name), LEVEL)
        return found.value, found.low, found.high


def read(folder=experiments.RESULTS):
    """Return {file name without suffix: [Found, ...]} of the rows that are there, in the declared order."""
    files = experiment_rows.declared("small", CHUNK)
    results = experiments.Results(folder, files)
    columns = {name: {row.run: found for row in rows if (found := results.get(row))} for name, rows in files.items()}
    columns["choices"] = with_times(columns["choices"], folder)
    return {name: with_baselines(found) for name, found in columns.items()}


def with_times(columns, folder):
    """Return {Run: its columns and its time's columns} for the runs that have a time in the folder's times.csv."""
    known = times.results(folder)
    timed = {row.run: found for row in times.declared()[times.TimeRow.file] if (found := known.get(row))}
    return {run: timed[run] | found for run, found in columns.items() if run in timed}


def with_baselines(columns):
    """Return [Found, ...] of {Run: its columns}, each with its baseline's Found if that row is there."""
    plain = {run: Found(run, found) for run, found in columns.items()}
    return [Found(run, found, plain.get(run.baseline) if run.baseline != run else None) for run, found in columns.items()]


def read_norms(folder=experiments.RESULTS):
    """Return {file name without suffix: [(norms.StepRow, its columns), ...]} of the norms that are there."""
    results = norms.results(folder)
    return {name: [(row, found) for row in rows if (found := results.get(row))] for name, rows in norms.declared().items()}


def precision(run):
    return "full precision" if run.quantization == "none" else run.quantization


def cache(run):
    if run.interval == 1:
        return "none"
    return f"{'DeepCache' if run.cache == 'deepcache' else 'calibrated'} {run.interval}, forecast {run.forecast}"


def rule(run):
    """Return the corrected steps and the evaluation point; or the control; or the number of steps taken instead of a
    correction.
    """
    if run.instead_of:
        return f"{run.steps} steps"
    if run.control != "none":
        return run.control
    if run.correction_steps in ("none", "auto"):
        return run.correction_steps
    return f"{run.correction_steps}, {run.evaluation_point}"


def damping(run):
    return f"K {run.max_iterations}" if run.max_iterations > 1 else f"{run.lambda_:g}"


def subject(run):
    """Return, in words, what a run corrects: the parts that distinguish the rows of a file."""
    model = MODELS[run.architecture], run.weights
    return *model, run.sampler, run.scheduler, f"{run.baseline.steps} steps", precision(run), cache(run)


SUBJECT = ("model", "weights", "sampler", "schedule", "steps", "precision", "cache")


def grouped(rows, of):
    """Return the rows with equal of(run) next to each other; groups are in the order of their first rows."""
    groups = list(dict.fromkeys(of(found.run) for found in rows))
    return sorted(rows, key=lambda found: groups.index(of(found.run)))


def told_apart(rows, left_out=()):
    """Return (names, subject) of only those parts of `subject` in which the runs differ, without the names in left_out."""
    parts = [subject(found.run) for found in rows]
    differ = [place for place in range(len(SUBJECT)) if len({part[place] for part in parts}) > 1]
    kept = [place for place in differ if SUBJECT[place] not in left_out]
    return [SUBJECT[place] for place in kept], lambda run: tuple(subject(run)[place] for place in kept)


def place_of(found):
    """Return (time as a share of the model's 20 plain euler steps, error to the exact solution)."""
    return found.number("time"), found.number("error_exact")


def front(rows):
    """Return the Pareto front, fastest first: the rows for which no other row is both faster and better."""
    kept = []
    for found in sorted(rows, key=place_of):
        if not kept or found.number("error_exact") < kept[-1].number("error_exact"):
            kept.append(found)
    return kept


def norms_by_step(rows, of=lambda case: case.architecture):
    """Return {(of(case), quantization, step): {column: the largest of the images' numbers}} of rows of norms.

    A number is NaN where one image's is not finite. "converged": whether all images' norms converged; if not, the numbers are
    lower bounds.
    """
    found = {}
    for row, columns in rows:
        numbers = found.setdefault((of(row.case), row.case.quantization, row.step), {"converged": True})
        numbers["converged"] &= columns["converged"] == "True"
        for name, text in columns.items():
            if any(kind in name for kind in ("growth", "contraction", "residual")):
                numbers[name] = float(np.max([numbers.get(name, 0.0), float(text or "nan")]))
    return found
