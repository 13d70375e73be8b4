"""IEC in the host's sampling loop: all nodes use one hook, `with_correction`.

A sampler function of the host gets a callable `model(x, sigma, **extra_args)` that returns the denoised latent, with guidance
and the in-paint mask applied. The correction replaces this callable.
"""

import copy
import functools

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers

from ....iec_core.correction.automatic import nothing_because
from ....iec_core.run_report import Stopwatch
from ..caching.cache_run import expected_of_run, other_cache
from ..sampling.network_calls import IEC, NetworkCalls, network_of
from ..sampling.noise import NoiseAhead, can_draw_ahead, is_of_the_host, sampler_name
from ..sampling.rehearsal import AppliedTwice, BadSchedule, CannotRehearse, check_schedule, rehearsal_of
from ..sampling.run_plan import RunPlan
from .correctable import check_known_ends, check_sampler, refusal, resolved
from .denoiser import CorrectedDenoiser, CountedDenoiser, tell_lost_changes
from .progress_events import EvaluationProgress

RUN = "iec_run"  # key in a run's model options for its EvaluationProgress
APPLIED_TWICE = (
    "sampler: IEC is applied twice to this sampling run; use only one of KSampler (IEC), Apply IEC (model) and IEC Sampler "
    "(wrap)."
)


class CorrectedSampler(comfy.samplers.KSAMPLER):
    """A host SAMPLER whose steps are corrected.

    Steps are corrected whether `sample` or only the sampler function is called, because another pack's SAMPLER may contain this
    one and call only the function.
    """

    def __init__(self, sampler, settings, begin_report):
        function = CorrectedFunction(sampler.sampler_function, settings, begin_report)
        super().__init__(function, sampler.extra_options, sampler.inpaint_options)
        self._sampler = sampler
        self._is_off = settings.is_off

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """Sample like KSAMPLER.sample, but `callback` gets evaluations instead of steps as its progress."""
        _check_not_twice(extra_args)
        progress = EvaluationProgress()
        sampler = copy.copy(self._sampler)
        sampler.sampler_function, sampler.extra_options = self.sampler_function, self.extra_options
        sampler.inpaint_options = self.inpaint_options
        extra_args, callback = _with_progress(extra_args, progress), progress.counting(callback)
        samples = sampler.sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)
        if not progress.has_run and not self._is_off:
            raise ValueError(
                f"sampler: {type(sampler).__name__} does not use its sampler function, the only part that IEC corrects; "
                "choose a sampler of KSamplerSelect, or correction_steps none."
            )
        return samples


def _with_progress(extra_args, progress):
    return {**extra_args, "model_options": {**extra_args.get("model_options", {}), RUN: progress}}


def _check_not_twice(extra_args):
    """Raise AppliedTwice if this call is inside a corrected run: a corrected sampler contains another corrected sampler."""
    progress = extra_args.get("model_options", {}).get(RUN)
    if progress is not None and progress.is_running:
        raise AppliedTwice(APPLIED_TWICE)


class CorrectedFunction:
    """A sampler function of the host with corrected steps. begin_report(): returns the RunReport that a run fills."""

    def __init__(self, function, settings, begin_report):
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._settings = settings
        self._begin_report = begin_report

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        extra_args = extra_args or {}
        _check_not_twice(extra_args)
        progress = extra_args.get("model_options", {}).get(RUN) or EvaluationProgress(has_bar=False)
        extra_args = _with_progress(extra_args, progress)
        progress.is_running = progress.has_run = True
        try:
            return self._run(self._begin_report(), progress, model, x, sigmas, extra_args, callback, disable, options)
        finally:
            progress.is_running = False

    def _run(self, report, progress, model, x, sigmas, extra_args, callback, disable, options):
        """Plan the run, then run the sampler function on the corrected denoiser."""
        function, schedule, seed = self._function, sigmas.cpu(), extra_args.get("seed")
        can_draw = seed is not None and can_draw_ahead(function, options)
        look = comfy.model_management.throw_exception_if_processing_interrupted
        plan, report.choice = self._plan(
            lambda: rehearsal_of(function, model, x, schedule, extra_args, options, can_draw, look), schedule, options
        )
        calls = NetworkCalls()
        extra_args = calls.watch(extra_args, network_of(model))
        if plan is None:
            return self._run_uncorrected(report, calls, model, x, sigmas, extra_args, callback, disable, options)
        cached = expected_of_run(extra_args, plan.sigmas)
        full = cached and cached.full
        settings, report.choice = resolved(self._settings, plan, full, other_cache(extra_args["model_options"]))
        check_known_ends(self._name, settings, plan)
        corrected, ahead = settings.corrected_steps(plan.sigmas, full, plan.known_ends), None
        if any(plan.rehearsal.steps[step].draws for step in corrected):
            ahead = NoiseAhead(function, x, sigmas, seed)
            options = {**options, **ahead.options}
        total = len(plan.evaluations) + settings.added_evaluations * len(corrected)
        progress.begin(report, corrected, full, plan.steps, total)
        denoiser = CorrectedDenoiser(model, report, calls, plan, full, corrected, settings, ahead, progress)
        if cached is not None:
            report.note_cache(cached.full, cached.cost, cached.errors)

        def on_step(info):
            denoiser.on_step(info)
            if callback is not None:
                callback(info)

        samples = function(denoiser, x, sigmas, extra_args=extra_args, callback=on_step, disable=disable, **options)
        denoiser.finish(samples)
        denoiser.finite.check(samples, self._name, plan.sigmas, _guidance_of(model))
        progress.end()
        return samples

    @property
    def _name(self):
        return sampler_name(self._function) or type(self._function).__name__

    def _plan(self, rehearsal, sigmas, options):
        """Return (RunPlan, ""), or (None, reason) if the run has no plan and needs none.

        A run has no plan if it has no step, or if its steps are not known and none must be corrected. reason: why `auto`
        corrects nothing, otherwise "". rehearsal(): returns the Rehearsal over these sigmas. If nothing can be corrected,
        it is called only for a sampler of the host whose evaluations the table in `stock_samplers` does not give, because it
        takes a moment, and another pack's sampler function may do more than sampling.

        Raises ValueError if steps must be corrected but are not known.
        """
        settings, reason = self._settings, refusal(self._name)
        if len(sigmas) < 2 or (settings.is_off and (reason or not is_of_the_host(self._function))):
            return None, ""
        if settings.is_auto and reason:
            return None, nothing_because(reason)
        try:
            check_schedule(sigmas)
            plan = RunPlan.of_stock(self._function, options, sigmas.tolist())
            if plan is not None and (settings.is_off or (settings.is_auto and plan.why_no_end)):
                return plan, ""
            return rehearsal().plan(), ""
        except CannotRehearse as reason:
            if settings.is_off:
                return None, ""
            is_schedule = isinstance(reason, BadSchedule)
            if settings.is_auto:
                known = reason if is_schedule else f"the steps of {self._name} are not known in advance, because {reason}"
                return None, nothing_because(known)
            if is_schedule:
                raise ValueError(f"sigmas: {reason}; choose another schedule, or correction_steps none.") from reason
            raise ValueError(
                f"sampler: the steps of {self._name} cannot be corrected, because {reason}; choose one of ComfyUI's own "
                "samplers, or correction_steps none."
            ) from reason

    def _run_uncorrected(self, report, calls, model, x, sigmas, extra_args, callback, disable, options):
        """Run a sampler function like the host, for a run whose steps are not known. Its report has no steps."""
        report.start(sigmas.tolist(), frozenset())
        report.steps = []
        stopwatch = Stopwatch(x.device)
        stopwatch.mark()
        denoiser = CountedDenoiser(model, report, calls)
        samples = self._function(denoiser, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        stopwatch.mark()
        report.keep(len(report.sigmas) - 1, samples)
        report.finish(stopwatch.seconds())
        tell_lost_changes(report, model)
        denoiser.finite.check(samples, self._name, sigmas.tolist(), _guidance_of(model))
        return samples


def _guidance_of(model):
    """Return the guidance scale of a denoiser's guider, None if it has none."""
    scale = getattr(getattr(model, "inner_model", None), "cfg", None)
    return scale if isinstance(scale, (int, float)) else None


def with_correction(sampler, settings, begin_report):
    """Return a SAMPLER like a host SAMPLER, with corrected steps. begin_report(): returns the RunReport that a run fills.

    Raises ValueError if the sampler has no sampler function to wrap, cannot be corrected, or is corrected already.
    """
    if isinstance(getattr(sampler, "sampler_function", None), CorrectedFunction):
        raise AppliedTwice(APPLIED_TWICE)
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"sampler: IEC wraps only samplers like those of KSamplerSelect, and {type(sampler).__name__} is of another kind; "
            "choose one of those."
        )
    check_sampler(sampler_name(sampler.sampler_function), settings)
    return CorrectedSampler(sampler, settings, begin_report)


def apply_correction(model, settings, begin_report):
    """Return a clone of a MODEL that corrects every sampling run in which it is used."""

    def outer_sample(executor, noise, latent_image, sampler, *args, **kwargs):
        return executor(noise, latent_image, with_correction(sampler, settings, begin_report), *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, IEC, outer_sample)
    return model
