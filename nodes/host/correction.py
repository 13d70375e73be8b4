"""IEC in the host's sampling loop: one hook, `with_correction`, serves every node.

A sampler function of the host gets a callable `model(x, sigma, **extra_args)` that returns the denoised latent, with
guidance and the in-paint mask applied. That callable is what is corrected.
"""

import copy
import functools
import logging

import comfy.patcher_extension
import comfy.samplers
import torch

from ...iec_core.automatic import Situation, choose, nothing_because
from ...iec_core.bias import CorrectedRun, bias_warning, moved_in_all
from ...iec_core.correction import corrected_denoised
from ...iec_core.report import Stopwatch, TraceReader
from .caching import full_steps, other_cache
from .events import EvaluationProgress
from .known_errors import is_exact
from .noise import NoiseAhead, can_draw_ahead, sampler_name
from .rehearsal import CannotRehearse, rehearse, rehearse_by_name

KEY = "iec"
SOME_SIGMAS = (8.0, 5.0, 3.0, 1.5, 0.5, 0.0)  # over which a sampler shows how it steps, whatever the run's will be
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
    """Corrects the steps in `corrected`, each at the evaluation that it is taken with; a sampler's further evaluations pass
    through. Nothing is read back from the device before `finish`.
    """

    def __init__(self, model, report, rehearsal, full, corrected, settings, noise, progress):
        super().__init__(model, report)
        self._rehearsal = rehearsal
        self._full = full
        self._corrected = corrected
        self._settings = settings
        self._noise = noise
        self._progress = progress
        self._stopwatch = None
        self._evaluation = self._begun = 0
        self._finite = []
        self._model_options = {}
        self._ahead = None  # what was evaluated in the step before for this one
        self._traces = TraceReader(report)
        report.start(rehearsal.sigmas, corrected)

    def __call__(self, x, sigma, **extra_args):
        if self._evaluation >= len(self._rehearsal.evaluations):
            raise _departed()
        self._model_options = extra_args.get("model_options", {})
        step, is_own = self._rehearsal.evaluations[self._evaluation]
        self._evaluation += 1
        if step == self._begun:
            self._begin(x.device)
        if is_own:
            self._report.keep(step, x)
        if step in self._corrected and is_own:
            return self._correct(step, x, sigma, extra_args)
        if is_own:
            return self._own(step, x, sigma, extra_args)
        return self._evaluate(step, x, sigma, extra_args)

    def _own(self, step, x, sigma, extra_args):
        """Return the step's own prediction, evaluated here, unless the step before did."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        return self._evaluate(step, x, sigma, _tell(extra_args, step, self._rehearsal.steps[step].step.sigma))

    def _correct(self, step, x, sigma, extra_args):
        rehearsed, of = self._rehearsal.steps[step], self._settings.step_of(step)

        def evaluate(x_in, at, iteration):
            if iteration == 0:
                return self._own(step, x, sigma, extra_args)
            told = _tell(extra_args, of, at, iteration - (of - step))
            return self._evaluate(step, x_in, torch.full_like(sigma, at), told, True)

        noise = self._noise.of(rehearsed.draws) if rehearsed.draws else None
        mask = None
        if extra_args.get("denoise_mask") is not None:
            mask = functools.partial(self._mask, x, sigma, extra_args)
        keep = functools.partial(self._keep, of) if of != step else None
        corrected, trace = corrected_denoised(evaluate, x, rehearsed.step, self._settings.at(step), noise, mask, keep)
        self._traces.add(step, trace)
        return corrected

    def _keep(self, step, prediction):
        """Keep a prediction that was evaluated ahead, for the step that it is of."""
        self._finite.append((step, prediction.isfinite().all()))
        self._ahead = prediction

    def _evaluate(self, step, x, sigma, extra_args, is_correction=False):
        self._report.steps[step].nfe += 1
        denoised = super().__call__(x, sigma, **extra_args)
        if not is_correction:  # a correction that is not finite falls back
            self._finite.append((step, denoised.isfinite().all()))
        self._progress.evaluated()
        return denoised

    def _mask(self, x, sigma, extra_args):
        """Return by how much each number of x may be corrected: outside the in-paint mask the prediction is the image to keep,
        and not the network's.
        """
        mask = extra_args["denoise_mask"]
        change = extra_args.get("model_options", {}).get("denoise_mask_function")
        if change is not None:  # as in the host's KSamplerX0Inpaint
            options = {"model": self._model.inner_model, "sigmas": self._model.sigmas}
            mask = change(sigma, mask, extra_options=options)
        return mask.to(x).expand_as(x)

    def _begin(self, device):
        self._stopwatch = self._stopwatch or Stopwatch(device)
        self._stopwatch.mark()
        self._progress.step(self._begun, self._traces.take())
        self._begun += 1

    def on_step(self, info):
        """Check a sampler's callback, with the number of its step, against the rehearsal."""
        if self._evaluation == 0 or self._rehearsal.evaluations[self._evaluation - 1][0] != info["i"]:
            raise _departed()

    def finish(self, samples):
        """Take down the run's final latent, and read back what happened.

        Raises RuntimeError where an evaluation that the sampler used, or its result, was not finite.
        """
        if self._evaluation != len(self._rehearsal.evaluations):
            raise _departed()
        self._begin(samples.device)  # the end of the last step
        self._report.keep(len(self._rehearsal.steps), samples)
        steps = [*(step for step, _ in self._finite), len(self._rehearsal.steps) - 1]
        flags = torch.stack([*(flag for _, flag in self._finite), samples.isfinite().all()]).tolist()
        seconds = self._stopwatch.seconds()
        self._traces.take(wait=True)
        self._report.finish(seconds)
        self._warn()
        if not all(flags):
            step = steps[flags.index(False)]
            raise RuntimeError(
                f"model: in step {step} of {len(self._rehearsal.steps)}, numbered from 0 (sigma "
                f"{self._rehearsal.steps[step].step.sigma:.4g}), the network returned NaN or infinity; no latent is passed "
                f"on. {TRY_PRECISION}"
            )
        self._progress.end()

    def _warn(self):
        """Add to the report what the corrections did by themselves, and a warning of too much; log its warnings."""
        if self._corrected:
            self._tell_bias()
        for warning in self._report.warnings:
            logging.warning(f"[ComfyUI-IEC] {warning}")

    def _tell_bias(self):
        rehearsed, network = self._rehearsal, getattr(self._model.inner_model.inner_model, "diffusion_model", None)
        run = CorrectedRun(
            self._settings.evaluation_point,
            tuple(step.gain for step in rehearsed.steps),
            rehearsed.evaluates_more_than_once,
            any(rehearsed.steps[step].step.input_scale != 1 for step in self._corrected),
            self._full,
            network is not None and is_exact(network, self._model_options),
        )
        self._report.moved = float(f"{moved_in_all(self._report.steps, run):.3g}")
        if warning := bias_warning(self._report.steps, run):
            self._report.warnings.append(f"{self._report.label}: {warning}")


def _departed():
    return RuntimeError(
        "sampler: it takes other steps in this run than its schedule says, so that they cannot be told; choose a sampler of "
        "the host's list, or sample without IEC."
    )


def _tell(extra_args, step, sigma, iteration=0):
    """Return the sampler's extra arguments with step, iteration and sigma (a float) in the transformer options, for whatever
    else is on the MODEL.
    """
    model_options = dict(extra_args.get("model_options", {}))
    iec = {"step": step, "iteration": iteration, "sigma": sigma}
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), KEY: iec}
    return {**extra_args, "model_options": model_options}


def refusal(name):
    """Return why a sampler, by its name in the host's list, cannot be corrected; None where nothing is known against it."""
    if "cfg_pp" in name:
        return f"{name} steps with the unguided prediction of its last evaluation, which a correction moves elsewhere"
    if name in ("dpm_adaptive", "dpm_adaptive_function"):
        return (
            "dpm_adaptive picks its steps by its own error estimate, so that no step can be named beforehand, and the estimate "
            "takes a correction for an error"
        )
    if name == "ar_video":
        return "ar_video keeps what each evaluation computed, so that a step cannot be evaluated again"
    return None


def resolved(settings, rehearsal, full, other_cache=""):
    """Return (settings, sentence): what `auto` chooses for a run, and why; the settings themselves, and "", without it.

    full: the steps that a cache of this pack evaluates in full, None without one. other_cache: another's name.
    """
    if not settings.is_auto:
        return settings, ""
    noisy = [rehearsed.step.is_ancestral for rehearsed in rehearsal.steps if rehearsed.draws]
    noise = "" if not noisy else "ancestral" if all(noisy) else "other"
    why_none = rehearsal.why_no_end_is_known()
    choice = choose(Situation(tuple(rehearsal.sigmas), rehearsal.known_ends, why_none, noise, full, other_cache))
    return settings.with_choice(choice), choice.why


def check_sampler(name, settings, of="sampler"):
    """Raise ValueError for a sampler, by its name in the host's list, that cannot be corrected as `settings` say; of: the
    input that names it.
    """
    if settings.is_off or settings.is_auto:
        return
    if reason := refusal(name):
        raise ValueError(f"{of}: {reason}; choose another sampler, or correction_steps none.")
    if settings.is_ahead and name in comfy.samplers.KSampler.SAMPLERS:
        try:
            check_known_ends(name, settings, rehearse_by_name(name, SOME_SIGMAS), of)
        except CannotRehearse:  # the run says so
            return


def check_known_ends(name, settings, rehearsal, of="sampler"):
    """Raise ValueError where steps are to be corrected `ahead` and the sampler of this name has none that can be, by its
    Rehearsal; of: the input that names it.
    """
    reason = None if settings.is_off or not settings.is_ahead else rehearsal.why_no_end_is_known()
    if reason:
        raise ValueError(
            f"{of}: {name} {reason}, and evaluation_point ahead is for samplers that step with one prediction (euler, ddim, "
            "euler_ancestral, ddpm, lcm); choose one of those, or evaluation_point next."
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
        function, schedule, seed = self.sampler_function, sigmas.cpu(), extra_args.get("seed")
        can_draw = seed is not None and can_draw_ahead(function, options)
        rehearsal, report.choice = self._rehearse(
            lambda: rehearse(function, model, x, schedule, extra_args, options, can_draw), len(schedule) - 1
        )
        if rehearsal is None:
            return self._run_uncorrected(report, model, x, sigmas, extra_args, callback, disable, options)
        full = full_steps(extra_args, rehearsal.sigmas)
        settings, report.choice = resolved(self._settings, rehearsal, full, other_cache(extra_args))
        check_known_ends(self._name, settings, rehearsal)
        corrected = settings.corrected_steps(rehearsal.sigmas, full, rehearsal.known_ends)
        ahead = None
        if any(rehearsal.steps[step].draws for step in corrected):
            ahead = NoiseAhead(function, x, sigmas, seed)
            options = {**options, **ahead.options}
        total = len(rehearsal.evaluations) + settings.added_evaluations * len(corrected)
        progress.begin(corrected, full, len(rehearsal.steps), total)
        denoiser = CorrectedDenoiser(model, report, rehearsal, full, corrected, settings, ahead, progress)

        def on_step(info):
            denoiser.on_step(info)
            if callback is not None:
                callback(info)

        samples = function(denoiser, x, sigmas, extra_args=extra_args, callback=on_step, disable=disable, **options)
        denoiser.finish(samples)
        return samples

    @property
    def _name(self):
        return sampler_name(self.sampler_function) or type(self.sampler_function).__name__

    def _rehearse(self, rehearsed, steps):
        """Return (the Rehearsal, ""), or (None, a sentence if `auto` corrects nothing) where there is no step, or none that can
        be told and none that has to be. rehearsed(): the Rehearsal of so many steps.

        Raises ValueError where steps are to be corrected that cannot be told.
        """
        settings, reason = self._settings, refusal(self._name)
        if steps < 1 or (settings.is_off and reason):
            return None, ""
        if settings.is_auto and reason:
            return None, nothing_because(reason)
        try:
            return rehearsed(), ""
        except CannotRehearse as reason:
            if settings.is_off:
                return None, ""
            if settings.is_auto:
                return None, nothing_because(f"the steps of {self._name} are not known before, because {reason}")
            raise ValueError(
                f"sampler: the steps of {self._name} cannot be corrected, because {reason}; choose a sampler of the host's "
                "list, or correction_steps none."
            ) from reason

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
        report.finish(stopwatch.seconds())
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
