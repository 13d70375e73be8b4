"""Measure how errors grow and corrections contract along a run of the built-in models.

    python tools/norms.py [--list] [--again KEY]

The results are docs/results/norms.csv, and smoothness_norms.csv for the U-Net weights of train_smooth.py.

A row is a step of one image's run, measured by Contraction Probe (IEC): ||A + B J||, the factor by which the step multiplies an
error; and ||(1 - lambda) I + lambda B J|| for dampings of 0.1 to 0.9, the factor by which an iteration multiplies the distance
of two iterates. Columns with `true_` are measured with changes of 1 % on the network itself, including the rounding of a
quantized network. Rows of smoothness_norms.csv also have `residual_1` to 3: by how much each iteration of a correction of this
step alone, at its own timestep, would move the result. Existing rows are skipped. The command can be stopped; a stop loses less
than two minutes of work.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import ClassVar

import experiment_samples
import experiments
import torch
from experiment_rows import EXACT_SCHEDULER, WEIGHTS, Run, TunedRun

STEPS, EVERY = 20, 4
SETTINGS = {
    "seed": 7, "steps": STEPS, "cfg": 3.0, "every": EVERY, "iterations": 40, "tolerance": 0.02, "perturbation": 0.01,
}  # fmt: skip
LABELS = ("face", "flag", "fruit")
FORMATS = ("none", "W8A8", "W4A8")
# The correction whose residuals are measured.
CORRECTION = {"evaluation_point": "paper", "lambda_": 0.5, "max_iterations": 3, "tolerance": 0.0}


@dataclass(frozen=True)
class Case:
    """A run that is measured: of an image of this class."""

    architecture: str
    quantization: str
    label: str
    file: ClassVar[str] = "norms"

    @property
    def key(self):
        return " ".join((self.architecture, self.quantization, self.label))

    @property
    def run(self):
        """The Run of its MODEL."""
        return Run(architecture=self.architecture, quantization=self.quantization)

    @property
    def rows(self):
        """The rows of its run."""
        return [StepRow(self, step) for step in range(0, STEPS, EVERY)]


@dataclass(frozen=True)
class TunedCase(Case):
    """A Case of the U-Net with one of `experiment_rows.WEIGHTS`; it also measures the residuals of three iterations."""

    weights: str
    file: ClassVar[str] = "smoothness_norms"

    @property
    def key(self):
        return f"{super().key} {self.weights} weights"

    @property
    def run(self):
        return TunedRun(architecture=self.architecture, quantization=self.quantization, weights=self.weights)


@dataclass(frozen=True)
class StepRow:
    """A line of the file: a measured step."""

    case: Case
    step: int

    @property
    def file(self):
        return self.case.file

    @property
    def key(self):
        return f"{self.case.key} step {self.step}"


CASES = [Case(*parts) for parts in itertools.product(EXACT_SCHEDULER, FORMATS, LABELS)]
CASES += [TunedCase("unet", bits, label, weights) for weights, bits, label in itertools.product(WEIGHTS, FORMATS[:2], LABELS)]


def declared():
    """Return {file name without suffix: [StepRow, ...]}."""
    rows = [row for case in CASES for row in case.rows]
    return {file: [row for row in rows if row.file == file] for file in dict.fromkeys(row.file for row in rows)}


def digest(row):
    """Return the digest of a row: settings, and the model's weights."""
    weights = experiment_samples.weights_digest(row.case.run)
    more = [CORRECTION] if isinstance(row.case, TunedCase) else []
    return experiment_samples.digest_of([row.key, SETTINGS, EXACT_SCHEDULER[row.case.architecture], weights, *more])


def results(folder=experiments.RESULTS):
    """Return the Results of a folder."""
    return experiments.Results(folder, declared(), digest)


def measured(case):
    """Return (the case, the columns of each of its rows), in a prepared process."""
    sampler, begin = experiment_samples.prepare(), time.perf_counter()
    positive, negative = (sampler.run("IECClassLabel", labels=text)[0] for text in (case.label, "none"))
    inputs = {
        "model": sampler.model(case.run), "positive": positive, "negative": negative,
        "scheduler": EXACT_SCHEDULER[case.architecture], "latent_image": {"samples": torch.zeros(1, 3, 32, 32)},
    }  # fmt: skip
    *_, told = sampler.run("IECContractionProbe", **inputs, **SETTINGS)
    told = json.loads(told)
    more = [residuals(sampler, inputs, row.step) if isinstance(case, TunedCase) else {} for row in case.rows]
    seconds = (time.perf_counter() - begin) / len(told["steps"])
    found = zip(case.rows, told["steps"], more, strict=True)
    return case, [columns(row, step, told["jvp"], seconds) | residual for row, step, residual in found]


def residuals(sampler, inputs, step):
    """Return the columns of the relative residuals of the iterations that correct this step.

    Only this step is corrected, so that the run reaches it as the run of the norms does. inputs: a MODEL, conditionings,
    schedule and latent, as a sampling node takes them.
    """
    run = {"denoise": 1.0, "sampler_name": "euler"} | {name: SETTINGS[name] for name in ("seed", "steps", "cfg")}
    _, (report,) = sampler.run("IECKSampler", **inputs, **run, **CORRECTION, correction_steps=f"steps:{step}")
    texts = ["" if value is None else experiments.number(value) for (value,) in report.steps[step].residuals]
    names = [f"residual_{number + 1}" for number in range(CORRECTION["max_iterations"])]
    return dict.fromkeys(names, "") | dict(zip(names, texts))


def columns(row, step, jvp, seconds):
    """Return a row as a dict of texts by column, empty for a norm that is not finite. step: of the probe's JSON. jvp: how the
    Jacobian-vector products were computed.
    """
    case, number = row.case, experiments.number
    norms = {"growth": step["growth"], "true_growth": step["true_growth"]}
    for kind in ("contraction", "true_contraction"):
        norms |= {f"{kind}_{lambda_}": values for lambda_, values in step[kind].items()}
    texts = {"key": row.key, "digest": digest(row), "architecture": case.architecture, "quantization": case.quantization}
    texts |= {"weights": case.weights} if isinstance(case, TunedCase) else {}
    texts |= {"label": case.label, "seed": str(SETTINGS["seed"]), "step": str(row.step), "sigma": number(step["sigma"])}
    texts |= {name: "" if value is None else number(value) for name, (value,) in norms.items()}
    texts |= {"converged": str(step["converged"]), "products": str(step["products"]), "jvp": jvp}
    return texts | {"seconds": f"{seconds:.1f}", "device": experiment_samples.device(), **experiments.versions()}


def compute(cases, found, workers, on_case=lambda case: None):
    """Measure cases in this many processes, and add their rows to the Results `found` as soon as they are known.

    On an interrupt, the current cases are finished first.
    """
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, experiment_samples.prepare_child)
    waiting = {executor.submit(measured, case) for case in cases}
    try:
        for future in concurrent.futures.as_completed(set(waiting)):
            waiting.discard(future)
            _take(future, found, on_case)
    finally:
        executor.shutdown(cancel_futures=True)
        for future in waiting:
            if not future.cancelled() and future.exception() is None:
                _take(future, found, on_case)


def _take(future, found, on_case):
    case, rows = future.result()
    for row, texts in zip(case.rows, rows, strict=True):
        found.add(row, texts)
    on_case(case)


def compute_again(case, found, workers):
    """Measure an existing case again; return the columns whose digits differ."""
    with tempfile.TemporaryDirectory() as folder:
        anew = results(folder)
        compute([case], anew, workers)
        names = [experiments.differing(found.get(row), anew.get(row)) for row in case.rows]
    return list(dict.fromkeys(itertools.chain(*names)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print all rows, and whether they are there")
    parser.add_argument("--again", metavar="KEY", help="measure a row's run anew, and tell whether its digits are the same")
    options, found, workers = parser.parse_args(), results(), experiments.default_workers()
    if options.list:
        experiments.list_rows([row for case in CASES for row in case.rows], found)
        return 0
    if options.again:
        return _again(options.again, found, workers)
    missing = [case for case in CASES if not all(map(found.get, case.rows))]
    print(f"norms: {len(missing)} of {len(CASES)} runs are missing." if missing else "norms: nothing is missing.", flush=True)
    missing, refused = experiments.without_weights(missing)
    if missing:
        compute(missing, found, workers, lambda case: print(case.key, flush=True))
    return experiments.said(refused)


def _again(key, found, workers):
    named = [case for case in CASES if key in {row.key for row in case.rows}]
    _, refused = experiments.without_weights(named)
    if refused:
        return experiments.said(refused)
    if not named or not all(map(found.get, named[0].rows)):
        print(f"key: '{key}' is no row that is there; --list has them all.", file=sys.stderr)
        return 2
    changed = compute_again(named[0], found, workers)
    print(f"{key}: " + (f"other digits in {', '.join(changed)}" if changed else "the same digits"))
    return bool(changed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl+C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; what was measured is kept.")
