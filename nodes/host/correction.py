"""IEC in the host's sampling loop: one hook, `with_correction`, serves every node.

A sampler function of the host gets a callable `model(x, sigma, **extra_args)` that returns the denoised latent, with
guidance and the in-paint mask applied. That callable is what is corrected.
"""

import copy
import logging

import comfy.patcher_extension
import comfy.samplers
import torch

from ...iec_core.correction import corrected_denoised
from ...iec_core.report import Stopwatch
from .events import EvaluationProgress
from .noise import NoiseAhead, can_draw_ahead, sampler_name
from .rehearsal import CannotRehearse, rehearse

KEY = "iec"
TRY_PRECISION = "Try another precision of the model, or fewer patches on it."


class CountedDenoiser:
    """Stands before a sampler function in place of the host's denoiser, and counts. Unknown attributes are the host
    denoiser's, which samplers read.
    """

    def __init__(self, model, report):
        self._model = model
        self._report = report

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, **extra_args):
        self._report.nfe += 1
        return self._model(x, sigma, **extra_args)


class CorrectedDenoiser(CountedDenoiser):
    """Corrects the steps that `settings` name, each at the evaluation that it is taken with; a sampler's further evaluations
    pass through. Nothing is read back from the device before `finish`.
    """

    def __init__(self, model, rehearsal, settings, report, noise, progress, stopwatch):
        super().__init__(model, report)
        self._rehearsal = rehearsal
        self._corrected = settings.corrected_steps(rehearsal.sigmas)
        self._settings = settings
        self._noise = noise
        self._progress = progress
        self._stopwatch = stopwatch
        self._evaluation = 0
        self._finite = []
        self._traces = {}
        report.start(rehearsal.sigmas, self._corrected)

    def __call__(self, x, sigma, **extra_args):
        if self._evaluation >= len(self._rehearsal.evaluations):
            raise self._departed()
        step, is_own = self._rehearsal.evaluations[self._evaluation]
        self._evaluation += 1
        if is_own:
            self._begin(step, x)
        predictions = []

        def evaluate(x_in, at, iteration):
            place = sigma if iteration == 0 else torch.full_like(sigma, at)
            told = _tell(extra_args, {"step": step, "iteration": iteration}) if is_own else extra_args
            denoised = self._evaluate(step, iteration, x_in, place, told)
            if not predictions:
                predictions.append(denoised if extra_args.get("denoise_mask") is not None else None)
            return denoised

        if step not in self._corrected or not is_own:
            return evaluate(x, None, 0)
        rehearsed = self._rehearsal.steps[step]
        noise = (lambda: self._noise.of(rehearsed.draws)) if rehearsed.draws else None
        corrected, self._traces[step] = corrected_denoised(evaluate, x, rehearsed.step, self._settings, noise)
        return self._outside_mask(predictions[0], corrected, sigma, extra_args)

    def _evaluate(self, step, iteration, x, sigma, extra_args):
        self._report.steps[step].nfe += 1
        denoised = super().__call__(x, sigma, **extra_args)
        if iteration == 0:  # a correction that is not finite falls back
            self._finite.append((step, denoised.isfinite().all()))
        self._progress.evaluated()
        return denoised

    def _outside_mask(self, first, corrected, sigma, extra_args):
        """Keep the uncorrected prediction outside the in-paint mask: there it is the image to keep, and not the network's."""
        mask = extra_args.get("denoise_mask")
        if mask is None:
            return corrected
        change = extra_args.get("model_options", {}).get("denoise_mask_function")
        if change is not None:  # as in the host's KSamplerX0Inpaint
            options = {"model": self._model.inner_model, "sigmas": self._model.sigmas}
            mask = change(sigma, mask, extra_options=options)
        return torch.lerp(first, corrected, mask.to(corrected).expand_as(corrected))

    def _begin(self, step, x):
        self._report.keep(step, x)
        self._stopwatch.mark()
        self._progress.step(step)

    def on_step(self, info):
        """Check a sampler's callback, with the number of its step, against the rehearsal."""
        if self._evaluation == 0 or self._rehearsal.evaluations[self._evaluation - 1][0] != info["i"]:
            raise self._departed()

    def _departed(self):
        return RuntimeError(
            "sampler: it takes other steps in this run than its schedule says, so that no step can be corrected; choose a "
            "sampler of the host's list other than dpm_adaptive, or correction_steps none."
        )

    def finish(self, samples):
        """Take down the run's final latent, and read back what happened.

        Raises RuntimeError where an evaluation that the sampler used was not finite.
        """
        self._begin(len(self._rehearsal.steps), samples)
        flags = torch.stack([flag for _, flag in self._finite]).tolist()
        self._report.finish(self._traces, self._stopwatch.seconds())
        for warning in self._report.warnings:
            logging.warning(f"[ComfyUI-IEC] {warning}")
        if not all(flags):
            step = self._finite[flags.index(False)][0]
            raise RuntimeError(
                f"model: in step {step} of {len(self._rehearsal.steps)}, numbered from 0 (sigma "
                f"{self._rehearsal.steps[step].step.sigma:.4g}), the network returned NaN or infinity; no latent is passed "
                f"on. {TRY_PRECISION}"
            )


def _tell(extra_args, iec):
    """Return the sampler's extra arguments with `iec` in the transformer options, for whatever else is on the MODEL."""
    model_options = dict(extra_args.get("model_options", {}))
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), KEY: iec}
    return {**extra_args, "model_options": model_options}


def check_sampler(name, settings):
    """Raise ValueError for a sampler, by its name in the host's list, that cannot be corrected as `settings` say."""
    if settings.is_off:
        return
    instead = "or correction_steps none."
    if "cfg_pp" in name:
        raise ValueError(
            f"sampler: {name} steps with the unguided prediction of its last evaluation, which a correction moves "
            f"elsewhere; choose a sampler without cfg_pp, {instead}"
        )
    if name in ("dpm_adaptive", "dpm_adaptive_function"):
        raise ValueError(
            "sampler: dpm_adaptive picks its steps by its own error estimate, so that no step can be named beforehand, and "
            f"the estimate takes a correction for an error; choose another sampler, {instead}"
        )
    if name == "ar_video":
        raise ValueError(
            f"sampler: ar_video keeps what each evaluation computed, so that a step cannot be evaluated again; choose another "
            f"sampler, {instead}"
        )


class CorrectedSampler(comfy.samplers.KSAMPLER):
    """A host SAMPLER whose steps are corrected. begin_report(): the RunReport that a run fills."""

    def __init__(self, sampler, settings, begin_report):
        super().__init__(sampler.sampler_function, sampler.extra_options, sampler.inpaint_options)
        self._sampler = sampler
        self._settings = settings
        self._begin_report = begin_report

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """As KSAMPLER.sample; the progress that `callback` is told counts evaluations."""
        report = self._begin_report()
        progress = EvaluationProgress(report)
        sampler = copy.copy(self._sampler)

        def corrected(model, x, sigmas, extra_args, callback, disable, **options):
            return self._run(report, progress, model, x, sigmas, extra_args, callback, disable, options)

        sampler.sampler_function = corrected
        return sampler.sample(model_wrap, sigmas, extra_args, progress.counting(callback), noise, *args, **kwargs)

    def _run(self, report, progress, model, x, sigmas, extra_args, callback, disable, options):
        """Rehearse the sampler function, then run it on the corrected denoiser."""
        function, schedule = self.sampler_function, sigmas.cpu()
        if len(schedule) < 2:  # no step: the host's samplers hand the latent on
            return self._run_uncorrected(report, model, x, sigmas, extra_args, callback, disable, options)
        seed = extra_args.get("seed")
        can_draw = seed is not None and can_draw_ahead(function, options)
        try:
            rehearsal = rehearse(function, model, x, schedule, extra_args, options, can_draw)
        except CannotRehearse as reason:
            if not self._settings.is_off:
                name = sampler_name(function) or type(function).__name__
                raise ValueError(
                    f"sampler: the steps of {name} cannot be told before it runs, because {reason}; choose a sampler of the "
                    "host's list, or correction_steps none."
                ) from reason
            return self._run_uncorrected(report, model, x, sigmas, extra_args, callback, disable, options)
        corrected = self._settings.corrected_steps(rehearsal.sigmas)
        ahead = None
        if any(rehearsal.steps[step].draws for step in corrected):
            ahead = NoiseAhead(function, x, sigmas, seed)
            options = {**options, **ahead.options}
        progress.begin(len(rehearsal.steps), len(rehearsal.evaluations) + self._settings.max_iterations * len(corrected))
        stopwatch = Stopwatch(x.device)
        denoiser = CorrectedDenoiser(model, rehearsal, self._settings, report, ahead, progress, stopwatch)

        def on_step(info):
            denoiser.on_step(info)
            if callback is not None:
                callback(info)

        samples = function(denoiser, x, sigmas, extra_args=extra_args, callback=on_step, disable=disable, **options)
        denoiser.finish(samples)
        return samples

    def _run_uncorrected(self, report, model, x, sigmas, extra_args, callback, disable, options):
        """Run a sampler function as the host would, where no step can be told; the report has none."""
        report.start(sigmas.tolist(), frozenset())
        report.steps = []
        stopwatch = Stopwatch(x.device)
        stopwatch.mark()
        denoiser = CountedDenoiser(model, report)
        samples = self.sampler_function(
            denoiser, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options
        )
        stopwatch.mark()
        report.keep(len(report.sigmas) - 1, samples)
        report.finish({}, stopwatch.seconds())
        if not samples.isfinite().all():
            raise RuntimeError(f"model: the network returned NaN or infinity; no latent is passed on. {TRY_PRECISION}")
        return samples


def with_correction(sampler, settings, begin_report):
    """Return a SAMPLER like a host SAMPLER, with its steps corrected; begin_report(): the RunReport that a run fills.

    Raises ValueError for a sampler that has no sampler function to wrap, that cannot be corrected, or that is already.
    """
    if isinstance(sampler, CorrectedSampler):
        raise ValueError(
            "sampler: IEC is applied twice to this sampling run; use only one of IECKSampler, IECApply and IECSampler."
        )
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"sampler: IEC wraps the samplers of KSamplerSelect and the like, and {type(sampler).__name__} is of another "
            "kind; choose one of those."
        )
    check_sampler(sampler_name(sampler.sampler_function), settings)
    return CorrectedSampler(sampler, settings, begin_report)


def apply_correction(model, settings, begin_report):
    """Return a clone of a MODEL that corrects whatever sampling run it is used in."""

    def outer_sample(executor, noise, latent_image, sampler, *args, **kwargs):
        return executor(noise, latent_image, with_correction(sampler, settings, begin_report), *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    return model
