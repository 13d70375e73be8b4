"""Run the candidates of a search, and measure their times and errors."""

import time
from dataclasses import replace

import comfy.model_management
import torch

from ....iec_core.metrics import relative_error
from ....iec_core.search.candidates import NONE
from ....iec_core.search.trials import RefusedError, Trial

CONVERGED = 4  # how many times the steps of the full run the converged solution has


def seconds():
    """Return the time of a clock."""
    return time.perf_counter()


class Measuring:
    """Measures candidates: `measure(candidate, run)` as a Search wants it.

    variants: the Variants. runs: the Runs; their prompts are taken in turn, each time with the next seed. full: the Candidate
    of the full run. converged: whether errors are relative to the converged solution instead of the full run's result.
    """

    def __init__(self, model, variants, levels, runs, full, converged):
        self._model, self._variants, self._levels, self._runs, self._full = model, variants, levels, runs, full
        self._converged = converged
        self._warm = set()
        self._references, self._full_trials = {}, {}
        _, once = self._sample(self._model, self._full, 0)
        self._enter_full(0)
        first = self._full_trials[0]
        self._full_trials[0] = replace(first, seconds=min(once, first.seconds))

    @property
    def full_seconds(self):
        """The time of the full run: of the fastest one so far, since other work on the machine only adds time."""
        return min(trial.seconds for trial in self._full_trials.values())

    def measure(self, candidate, run):
        """Return the Trial of a candidate. Raises RefusedError if it cannot be run."""
        if run not in self._full_trials:
            self._enter_full(run)
        if candidate == self._full:
            return self._full_trials[run]
        begun = seconds()
        try:
            samples, took = self._sample(self._variants.model(candidate), candidate, run)
        except comfy.model_management.OOM_EXCEPTION as error:
            comfy.model_management.soft_empty_cache()
            raise RefusedError("out of memory", (seconds() - begun) / self.full_seconds) from error
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RefusedError(reason, (seconds() - begun) / self.full_seconds) from error
        error = _error(samples, self._references[run])
        if not error < float("inf"):
            raise RefusedError("its result contains NaN or infinity", (seconds() - begun) / self.full_seconds)
        return Trial(took, error, (seconds() - begun) / self.full_seconds)

    def _enter_full(self, run):
        """Do the full run and, if asked, the converged one."""
        samples, took = self._sample(self._model, self._full, run)
        self._references[run] = samples
        if self._converged:
            way = self._full.way
            steps = CONVERGED * self._levels.steps(self._full)
            self._references[run] = self._runs.one(run, steps, way.sampler, way.scheduler, self._model)
        self._full_trials[run] = Trial(took, _error(samples, self._references[run]), 0.0)

    def _sample(self, model, candidate, run):
        """Return (the result, the seconds) of a run. Weights are loaded and kernels chosen by one step beforehand."""
        way = candidate.way
        if way.weights not in self._warm:
            self._runs.one(run, 1, way.sampler, way.scheduler, model)
            self._warm = {NONE, way.weights}  # the previous quantized model is gone
        self._wait(model)
        begun = seconds()
        samples = self._runs.one(run, self._levels.steps(candidate), way.sampler, way.scheduler, model)
        self._wait(model)
        return samples, seconds() - begun

    @staticmethod
    def _wait(model):
        """Wait until the device has done its work."""
        if torch.device(model.load_device).type == "cuda":
            torch.cuda.synchronize(model.load_device)


def _error(samples, reference):
    """Return the mean relative error of a batch's latents, over all parts of nested ones."""
    pairs = zip(_parts(samples), _parts(reference))
    errors = [relative_error(part, right).mean().item() for part, right in pairs]
    return sum(errors) / len(errors)


def _parts(samples):
    return samples.unbind() if getattr(samples, "is_nested", False) else [samples]
