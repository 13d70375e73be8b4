"""IEC in the host's sampling loop: one hook, `with_correction`, serves every node.

A sampler function of the host gets a callable `model(x, sigma, **extra_args)` that returns the denoised latent, with
guidance and the in-paint mask applied. That callable is what is corrected.
"""

import copy
import functools
import itertools
import logging
import math

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import torch

from ....iec_core.advice import TRY_PRECISION
from ....iec_core.correction.automatic import Situation, choose, nothing_because
from ....iec_core.correction.bias import CorrectedRun, bias_warning, moved_in_all
from ....iec_core.correction.iteration import corrected_denoised
from ....iec_core.report import Stopwatch, TraceReader
from ..caching.cache_run import full_steps, other_cache
from ..quantization.quantized_network import lost_changes
from ..sampling.network_calls import IEC, NetworkCalls, base_of, network_of, past_other_cache
from ..sampling.noise import NoiseAhead, can_draw_ahead, is_of_the_host, sampler_name
from ..sampling.rehearsal import AppliedTwice, BadSchedule, CannotRehearse, check_schedule, forget, plan_by_name, rehearsal_of
from ..sampling.run_plan import Departed, RunPlan, with_place
from .events import EvaluationProgress
from .known_errors import is_exact

SOME_SIGMAS = (8.0, 5.0, 3.0, 1.5, 0.5, 0.0)  # over which a sampler shows how it steps, whatever the run's will be
RUN = "iec_run"  # in a run's model options: its EvaluationProgress
APPLIED_TWICE = "sampler: IEC is applied twice to this sampling run; use only one of IECKSampler, IECApply and IECSampler."


class CountedDenoiser:
    """Stands before a sampler function in place of the host's denoiser, and counts. Unknown attributes are the host
    denoiser's, which samplers read.
    """

    def __init__(self, model, report, calls):
        self._model = model
        self._report = report
        self._calls = calls
        self.finite = Finiteness()

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, **extra_args):
        denoised = self._counted(self._model, x, sigma, extra_args)[0]
        self.finite.evaluated(None, x, denoised)
        return denoised

    def _counted(self, model, x, sigma, extra_args):
        """Return (the denoised prediction, how often the network was evaluated for it: once, or not at all)."""
        denoised = model(x, sigma, **extra_args)
        evaluations = int(self._calls.have_been())
        self._report.nfe += evaluations
        return denoised, evaluations


class CorrectedDenoiser(CountedDenoiser):
    """Corrects the steps in `corrected`, each at the evaluation that it is taken with; a sampler's further evaluations pass
    through. Nothing is read back from the device before `finish`.
    """

    def __init__(self, model, report, calls, plan, full, corrected, settings, noise, progress):
        super().__init__(model, report, calls)
        self._plan = plan
        self._full = full
        self._corrected = corrected
        self._settings = settings
        self._noise = noise
        self._progress = progress
        self._stopwatch = None
        self._begun = 0  # steps
        self._model_options = {}
        self._ahead = None  # what was evaluated in the step before for this one
        self._traces = TraceReader(report)
        report.start(plan.sigmas, corrected)

    def __call__(self, x, sigma, **extra_args):
        self._model_options = extra_args.get("model_options", {})
        step, is_own = self._plan.begin()
        if step == self._begun:
            self._begin(x.device)
        if is_own:
            self._report.keep(step, x)
        if step in self._corrected and is_own:
            return self._correct(step, x, sigma, extra_args)
        return self._own(step, x, sigma, extra_args)

    def _own(self, step, x, sigma, extra_args):
        """Return the prediction for an evaluation of the sampler's, evaluated here, unless the step before did."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        return self._evaluate(step, x, sigma, _tell(extra_args, self._plan.place(x)))

    def _correct(self, step, x, sigma, extra_args):
        own, of = self._plan.rehearsal.steps[step], self._settings.step_of(step)
        is_paper = self._settings.evaluation_point == "paper"
        level = own.evaluated_at if is_paper else own.evaluated_next

        def evaluate(x_in, at, iteration):
            if iteration == 0:
                return self._own(step, x, sigma, extra_args)
            place = self._plan.place_of_correction(x_in, of, iteration - (of - step), at)
            told = _past_other_cache(_tell(extra_args, place))
            model = self._holding(own.step) if is_paper else self._model
            return self._evaluate(step, x_in, torch.full_like(sigma, level), told, model)

        noise = self._noise.of(own.draws) if own.draws else None
        mask = None
        if extra_args.get("denoise_mask") is not None:
            mask = functools.partial(self._mask, x, sigma, extra_args)
        keep = functools.partial(self._keep, of) if of != step else None
        corrected, trace = corrected_denoised(evaluate, x, own.step, self._settings.at(step), noise, mask, keep)
        self._traces.add(step, trace)
        return corrected

    def _keep(self, step, prediction):
        """Keep a prediction that was evaluated ahead, for the step that it is of."""
        self.finite.evaluated(step, None, prediction)
        self._ahead = prediction

    def _evaluate(self, step, x, sigma, extra_args, correcting=None):
        """Return the denoised prediction at x; correcting: the callable that has it, in a correction."""
        denoised, evaluations = self._counted(correcting or self._model, x, sigma, extra_args)
        self._report.steps[step].nfe += evaluations
        if correcting is None:  # a correction that is not finite falls back
            self.finite.evaluated(step, x, denoised)
        self._progress.evaluated()
        return denoised

    def _holding(self, step):
        """Return the host's denoiser for corrections at `paper`. What is evaluated is the step's result, and so outside the
        in-paint mask the image with as much noise as the result has, scaled alike; the host puts there that of its begin.
        """

        def denoise(x, sigma, **extra_args):
            model = self._model
            if extra_args.get("denoise_mask") is None or not hasattr(model, "latent_image"):
                return model(x, sigma, **extra_args)
            inside = self._mask(x, sigma, extra_args)
            held = model.inner_model.inner_model.scale_latent_inpaint(
                x=x, sigma=torch.full_like(sigma, step.sigma_next), noise=model.noise, latent_image=model.latent_image,
                denoise_mask=inside,
            )  # fmt: skip
            x = x * inside + step.input_scale * held * (1 - inside)
            denoised = model(x, sigma, **{**extra_args, "denoise_mask": None})
            return denoised * inside + model.latent_image * (1 - inside)

        return denoise

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
        """Check a sampler's callback against the plan."""
        self._plan.called_back(info["i"])

    def finish(self, samples):
        """Take down the run's final latent, and read back what happened."""
        self._plan.check_is_over()
        self._begin(samples.device)  # the end of the last step
        self._report.keep(self._plan.steps, samples)
        seconds = self._stopwatch.seconds()
        self._traces.take(wait=True)
        self._report.finish(seconds)
        self._warn()

    def _warn(self):
        """Add to the report what the corrections did by themselves, and a warning of too much, and log its warnings; add to it
        what the log has already.
        """
        if self._corrected:
            self._tell_bias()
        for warning in self._report.warnings:
            logging.warning(f"[ComfyUI-IEC] {warning}")
        _tell_lost_changes(self._report, self._model)

    def _tell_bias(self):
        rehearsed, network = self._plan.rehearsal, network_of(self._model)
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


def _tell_lost_changes(report, model):
    """Add to the report of a run what is lost of the patches on its quantized MODEL. The log has it, once for the patches."""
    if warning := lost_changes(base_of(model)):
        report.warnings.append(f"{report.label}: {warning}")


class Finiteness:
    """Whether the latents that a run evaluated, and the predictions there, were finite. Read back once, at the end."""

    def __init__(self):
        self._steps = []
        self._flags = []  # of each evaluation: [latent, prediction]

    def evaluated(self, step, x, denoised):
        """Note an evaluation of a step, None where it has no number; x: None where it is known to be finite."""
        prediction = denoised.isfinite().all()
        self._steps.append(step)
        self._flags.append(torch.stack([torch.ones_like(prediction) if x is None else x.isfinite().all(), prediction]))

    def check(self, samples, name, sigmas, cfg):
        """Raise RuntimeError, with a sentence of whose doing it is, where not all was finite. samples: the run's result. name:
        the sampler's. sigmas: where the steps begin and the last one's end. cfg: the guidance scale, None where there is none.
        """
        flags = torch.stack([*self._flags, samples.isfinite().all().expand(2)]).tolist()
        first = next((number for number, both in enumerate(flags) if not all(both)), None)
        if first is None:
            return
        is_prediction = first < len(self._steps) and flags[first][0]
        step = self._steps[first] if first < len(self._steps) else len(sigmas) - 2
        what, advice = _fault(is_prediction, first == 0, step, name, sigmas, cfg)
        raise RuntimeError(f"{what}; no latent is passed on. {advice}")


def _fault(is_prediction, is_first, step, name, sigmas, cfg):
    """Return (what led to NaN or infinity, what to do). is_prediction: whether it is a prediction, from a finite latent.
    is_first: whether it is the run's first evaluation.
    """
    where = "" if step is None else f" in step {step} of {len(sigmas) - 1}, numbered from 0 (sigma {sigmas[step]:.4g}),"
    equal = [number for number, (here, then) in enumerate(itertools.pairwise(sigmas)) if here == then]
    try:
        check_schedule(torch.tensor(sigmas))
    except BadSchedule as reason:
        return f"sigmas: {reason}, and {name} comes to NaN or infinity, as without IEC", "Choose another schedule."
    if is_prediction and cfg is not None and not math.isfinite(cfg):
        return f"cfg: {cfg} is no finite number, and so no guided prediction is", "Choose one of 0 to 100."
    if is_prediction:
        return f"model:{where} the network returned NaN or infinity", TRY_PRECISION
    if is_first:
        return "latent_image: the latent that sampling begins with has NaN or infinity in it", "Choose another."
    if equal:
        sigma = f"{sigmas[equal[0]]:.4g}"
        return (
            f"sigmas: step {equal[0]}, numbered from 0, leads from {sigma} to {sigma}, over which {name} comes to NaN or "
            "infinity, as without IEC",
            "Leave out one of the two, or choose another sampler.",
        )
    return (
        f"sampler:{where} {name} came to NaN or infinity by its own doing, from finite predictions of the network",
        "Choose another sampler, or another schedule.",
    )


def _tell(extra_args, told):
    """Return a sampler's extra arguments with what the evaluation is told of its place."""
    return {**extra_args, "model_options": with_place(extra_args.get("model_options", {}), told)}


def _past_other_cache(extra_args):
    """Return a sampler's extra arguments with which another cache lets the network answer."""
    model_options = extra_args["model_options"]
    options = past_other_cache(model_options["transformer_options"])
    return {**extra_args, "model_options": {**model_options, "transformer_options": options}}


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


def resolved(settings, plan, full, other_cache=""):
    """Return (settings, sentence): what `auto` chooses for a run, and why; the settings themselves, and "", without it.

    plan: the RunPlan. full: the steps that a cache of this pack evaluates in full, None without one. other_cache: another's
    name.
    """
    if not settings.is_auto:
        return settings, ""
    choice = choose(Situation(tuple(plan.sigmas), plan.known_ends, plan.why_no_end, plan.noise, full, other_cache))
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
            check_known_ends(name, settings, plan_by_name(name, SOME_SIGMAS), of)
        except CannotRehearse:  # the run says so
            return


def check_known_ends(name, settings, plan, of="sampler"):
    """Raise ValueError where steps are to be corrected `ahead` and the sampler of this name has none that can be, by its
    RunPlan; of: the input that names it.
    """
    reason = None if settings.is_off or not settings.is_ahead else plan.why_no_end
    if reason:
        raise ValueError(
            f"{of}: {name} {reason}, and evaluation_point ahead is for samplers that step with one prediction (euler, ddim, "
            "euler_ancestral, ddpm, lcm); choose one of those, or evaluation_point next."
        )


class CorrectedSampler(comfy.samplers.KSAMPLER):
    """A host SAMPLER whose steps are corrected, whether it is its `sample` that is called or its sampler function, as another
    pack's SAMPLER does that has one inside.
    """

    def __init__(self, sampler, settings, begin_report):
        function = CorrectedFunction(sampler.sampler_function, settings, begin_report)
        super().__init__(function, sampler.extra_options, sampler.inpaint_options)
        self._sampler = sampler
        self._is_off = settings.is_off

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """As KSAMPLER.sample; the progress that `callback` is told counts evaluations."""
        _check_not_twice(extra_args)
        progress = EvaluationProgress()
        sampler = copy.copy(self._sampler)
        sampler.sampler_function, sampler.extra_options = self.sampler_function, self.extra_options
        sampler.inpaint_options = self.inpaint_options
        extra_args, callback = _with_progress(extra_args, progress), progress.counting(callback)
        samples = sampler.sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)
        if not progress.has_run and not self._is_off:
            raise ValueError(
                f"sampler: {type(sampler).__name__} does not sample by its sampler function, which is what IEC corrects; "
                "choose a sampler of KSamplerSelect, or correction_steps none."
            )
        return samples


def _with_progress(extra_args, progress):
    return {**extra_args, "model_options": {**extra_args.get("model_options", {}), RUN: progress}}


def _check_not_twice(extra_args):
    """Raise AppliedTwice in a corrected run, whose sampler has another corrected one inside."""
    progress = extra_args.get("model_options", {}).get(RUN)
    if progress is not None and progress.is_running:
        raise AppliedTwice(APPLIED_TWICE)


class CorrectedFunction:
    """A sampler function of the host with its steps corrected. begin_report(): the RunReport that a run fills."""

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
        except Departed:
            forget(self._function)
            raise
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
        full = full_steps(extra_args, plan.sigmas)
        settings, report.choice = resolved(self._settings, plan, full, other_cache(extra_args["model_options"]))
        check_known_ends(self._name, settings, plan)
        corrected, ahead = settings.corrected_steps(plan.sigmas, full, plan.known_ends), None
        if any(plan.rehearsal.steps[step].draws for step in corrected):
            ahead = NoiseAhead(function, x, sigmas, seed)
            options = {**options, **ahead.options}
        total = len(plan.evaluations) + settings.added_evaluations * len(corrected)
        progress.begin(report, corrected, full, plan.steps, total)
        denoiser = CorrectedDenoiser(model, report, calls, plan, full, corrected, settings, ahead, progress)

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
        """Return (RunPlan, ""), or (None, a sentence if `auto` corrects nothing) where there is no step, or none that can be
        told and none that has to be. rehearsal(): the Rehearsal over these sigmas, which is not asked for where nothing can be
        corrected: it takes a moment, and another pack's sampler function may do more than to sample.

        Raises ValueError where steps are to be corrected that cannot be told.
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
                known = reason if is_schedule else f"the steps of {self._name} are not known before, because {reason}"
                return None, nothing_because(known)
            if is_schedule:
                raise ValueError(f"sigmas: {reason}; choose another schedule, or correction_steps none.") from reason
            raise ValueError(
                f"sampler: the steps of {self._name} cannot be corrected, because {reason}; choose a sampler of the host's "
                "list, or correction_steps none."
            ) from reason

    def _run_uncorrected(self, report, calls, model, x, sigmas, extra_args, callback, disable, options):
        """Run a sampler function as the host would, where no step can be told; the report has none."""
        report.start(sigmas.tolist(), frozenset())
        report.steps = []
        stopwatch = Stopwatch(x.device)
        stopwatch.mark()
        denoiser = CountedDenoiser(model, report, calls)
        samples = self._function(denoiser, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)
        stopwatch.mark()
        report.keep(len(report.sigmas) - 1, samples)
        report.finish(stopwatch.seconds())
        _tell_lost_changes(report, model)
        denoiser.finite.check(samples, self._name, sigmas.tolist(), _guidance_of(model))
        return samples


def _guidance_of(model):
    """Return the guidance scale of the guider that a denoiser is of, None where it has none."""
    scale = getattr(getattr(model, "inner_model", None), "cfg", None)
    return scale if isinstance(scale, (int, float)) else None


def with_correction(sampler, settings, begin_report):
    """Return a SAMPLER like a host SAMPLER, with its steps corrected; begin_report(): the RunReport that a run fills.

    Raises ValueError for a sampler that has no sampler function to wrap, that cannot be corrected, or that is already.
    """
    if isinstance(getattr(sampler, "sampler_function", None), CorrectedFunction):
        raise AppliedTwice(APPLIED_TWICE)
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
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, IEC, outer_sample)
    return model
