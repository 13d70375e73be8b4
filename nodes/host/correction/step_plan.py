"""Predict what a sampling run will do: which steps are corrected and cached, and how many evaluations that costs."""

from dataclasses import dataclass, replace

import comfy.samplers

from ....iec_core.caching.cachequant import CacheProfile, CorrectedFeatures
from ....iec_core.caching.feature_cache import parse_cache_schedule
from ....iec_core.choices import unknown_choice
from ....iec_core.correction.automatic import nothing_because
from ....iec_core.correction.correction_steps import parse_correction_steps
from ....iec_core.correction.iteration import CorrectionSettings
from ..caching.cache_run import CacheSettings
from ..profiles import PROFILES
from ..sampling.rehearsal import CannotRehearse, FlowLevels, FluxLevels, Levels, NoModel, plan_by_name
from .correctable import check_sampler, refusal, resolved

ALL = parse_correction_steps("all")
MOST_STEPS = 500  # the frontend draws no more
# Noise levels that cover the range of the host's models. A plan holds for all of these, or says what differs between them.
MODELS = {"SD 1.5, SDXL": Levels(), "SD 3": FlowLevels(3.0), "Wan": FlowLevels(8.0), "Flux": FluxLevels()}
LEAST_DENOISE = 0.01  # with less, the host computes a schedule of more than 100 times as many steps


class NotKnown(ValueError):
    """The steps of a run are not known before it runs. The run itself may succeed."""


@dataclass(frozen=True)
class Sampling:
    """The settings of a sampling node of the host.

    KSampler uses denoise. KSamplerAdvanced uses start_step, last_step and force_full_denoise instead. is_custom: the settings
    are those of BasicScheduler, for SamplerCustom.
    """

    steps: int
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    start_step: int = 0
    last_step: int | None = None
    force_full_denoise: bool = False
    is_custom: bool = False

    def check(self):
        """Raise ValueError for settings that a run would refuse, and NotKnown for a run that is too long to draw."""
        known = comfy.samplers.KSampler
        wrong = unknown_choice(known.SAMPLERS, sampler_name=self.sampler_name)
        wrong = wrong or unknown_choice(known.SCHEDULERS, scheduler=self.scheduler)
        if wrong:
            raise ValueError(wrong)
        if not 1 <= self.steps <= MOST_STEPS:
            raise NotKnown(f"steps: 1 to {MOST_STEPS} steps are drawn, but the run has {self.steps}.")
        if 0 < self.denoise < LEAST_DENOISE:
            raise NotKnown(f"denoise: below {LEAST_DENOISE} the steps are not drawn.")

    def sigmas(self, levels):
        """Return the n + 1 sigmas of the run, on the CPU, as the host computes them for a model's noise levels."""
        name = "euler" if self.is_custom else self.sampler_name  # KSampler computes other schedules for some samplers
        sigmas = comfy.samplers.KSampler(NoModel(levels), self.steps, "cpu", name, self.scheduler, self.denoise).sigmas
        if self.last_step is not None and self.last_step < len(sigmas) - 1:
            sigmas = sigmas[: self.last_step + 1]
            if self.force_full_denoise:
                sigmas[-1] = 0
        return sigmas[self.start_step :]


def _full_steps(schedules, begins, profile_name=None, **cache):
    """Return the steps that a cache evaluates in full, {model: sorted list}; None if only the run can tell.

    schedules: {model: sigmas}. begins: the sigmas at which steps begin with SD 1.5's noise levels. cache: as for `step_plan`.
    """
    if profile_name is not None:
        full = _full_steps_of_profile(profile_name, begins)
        return None if full is None else dict.fromkeys(schedules, full)
    if cache.get("speed"):  # how many there are depends on the network
        return None
    full = {name: _full_steps_on(MODELS[name], sigmas.tolist(), **cache) for name, sigmas in schedules.items()}
    full["SD 1.5, SDXL"] = _full_steps_on(MODELS["SD 1.5, SDXL"], begins, **cache)
    has_other_steps = len(begins) != len(schedules["SD 1.5, SDXL"])  # some samplers pick their own
    return None if has_other_steps and len(set(map(tuple, full.values()))) > 1 else full


def _full_steps_of_profile(profile_name, sigmas):
    profile = PROFILES.read("profile_name", profile_name, CacheProfile.load)
    try:
        return sorted(CorrectedFeatures(profile).full_steps(sigmas))
    except ValueError:  # the profile is for another schedule, or for a model with other noise levels
        return None


def _full_steps_on(levels, sigmas, interval=1, schedule="auto", start_percent=0.0, end_percent=1.0, speed=0.0):
    schedule = parse_cache_schedule(schedule)
    start, end = (float(levels.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return sorted(CacheSettings(max(interval, 1), 0, schedule, start, end, levels=levels, speed=speed).full_steps(sigmas))


def _goes_by_model(profile_name=None, schedule="auto", start_percent=0.0, end_percent=1.0, **_):
    """Return whether the steps in full depend on the model's noise levels. The inputs are as for `step_plan`."""
    is_auto = parse_cache_schedule(schedule).kind == "auto"
    return profile_name is None and (is_auto or start_percent > 0 or end_percent < 1)


def step_plan(correction, sampling, cache=None, correction_pass="refresh", is_cache_open=False):
    """Return what a run will do for most models, judged by the noise levels of `MODELS`.

    correction: inputs of `CorrectionSettings.parse`. sampling: fields of `Sampling`. cache: interval, schedule, start_percent,
    end_percent and speed of IECDeepCache, or profile_name. correction_pass: that of the cache. is_cache_open: whether there may
    be a cache that is known only in the run.

    Return a dict: correction, as reports name it; choice, what `auto` chooses and why, "" without `auto`; evaluation_point,
    also as chosen by `auto`; steps, their number; corrected, numbers of the corrected steps; open, steps that are corrected
    with the noise levels of some models but not of others; correctable, steps that can be corrected; full, steps that the cache
    evaluates in full, or None; full_open, steps that it evaluates in full with the noise levels of some models but not of
    others; full_by_model, whether the steps in full depend on the model, so that those of one with other noise levels than
    `MODELS` can differ; full_corrections, how many corrections are evaluated in full, at most; evaluations, their number
    without corrections; nfe, their number with corrections, an upper bound if iterations can converge early.

    Raises ValueError, with a sentence, for settings that a run would refuse, and NotKnown for what only the run can tell.
    """
    settings, sampling = CorrectionSettings.parse(**correction), Sampling(**sampling)
    about = {"correction": settings.summary(), "choice": "", "evaluation_point": settings.evaluation_point}
    sampling.check()
    check_sampler(sampling.sampler_name, settings, "sampler_name")
    schedules = {name: sampling.sigmas(levels) for name, levels in MODELS.items()}
    sigmas = schedules["SD 1.5, SDXL"]
    if any(len(other) != len(sigmas) for other in schedules.values()):
        raise NotKnown("scheduler: how many steps it makes depends on the model, and is known when it runs.")
    if len(sigmas) < 2:
        nothing = {"corrected": [], "correctable": [], "full": None, "full_open": [], "full_by_model": False, "open": []}
        return {**about, "steps": 0, **nothing, "full_corrections": 0, "evaluations": 0, "nfe": 0}
    plan = _plan(settings, sampling.sampler_name, sigmas)
    begins, evaluations = plan.sigmas, len(plan.evaluations)
    full = None if cache is None else _full_steps(schedules, begins, **cache)
    goes_by_cache = settings.steps.kind == "full" or (settings.is_auto and plan.known_ends)
    if goes_by_cache and full is None and (is_cache_open or cache is not None):
        raise NotKnown("correction_steps: which steps a cache evaluates in full is known when it runs.")
    full_of = full or dict.fromkeys(schedules)
    settings, steps, about["choice"] = _chosen(settings, sampling.sampler_name, schedules, full_of, plan)
    corrected, maybe = _in_all_and_some(steps.values())
    about["evaluation_point"] = settings.evaluation_point
    full_in_all, full_open = (None, frozenset()) if full is None else _in_all_and_some(full.values())
    in_full = max(_corrections_in_full(settings, steps[name], full_of[name], correction_pass) for name in schedules)
    return {
        **about,
        "steps": len(begins) - 1,
        "corrected": sorted(corrected),
        "open": sorted(maybe),
        "correctable": sorted(replace(settings, steps=ALL).corrected_steps(begins, None, plan.known_ends)),
        "full": None if full_in_all is None else sorted(full_in_all),
        "full_open": sorted(full_open),
        "full_by_model": full is not None and _goes_by_model(**cache),
        "full_corrections": in_full,
        "evaluations": evaluations,
        "nfe": evaluations + settings.added_evaluations * max(map(len, steps.values())),
    }


def _in_all_and_some(lists):
    """Return (the steps that are in all of several lists, those that are only in some), two frozensets."""
    sets = [frozenset(one) for one in lists]
    in_all = frozenset.intersection(*sets)
    return in_all, frozenset.union(*sets) - in_all


def _corrections_in_full(settings, corrected, full, correction_pass):
    """Return how many corrections are evaluated in full. full: the steps that a cache evaluates in full, None without one."""
    at = {settings.step_of(step) for step in corrected}
    in_full = at if full is None else at.intersection(full if correction_pass != "reuse" else ())
    return settings.added_evaluations * len(in_full)


def _chosen(settings, sampler_name, schedules, full, plan):
    """Return what is corrected with the noise levels of all models: (settings, {name of a model: steps}, sentence).

    schedules: {name of a model: sigmas}. full: {name of a model: steps that a cache evaluates in full, or None}. plan: for the
    noise levels of SD 1.5. settings: with what `auto` chooses. sentence: the reason, "" without `auto`; if it differs between
    models, one reason per group of models.
    """
    if not (settings.is_auto and plan.known_ends):
        choice, why = resolved(settings, plan, full["SD 1.5, SDXL"])
        return choice, {name: choice.corrected_steps(plan.sigmas, full[name], plan.known_ends) for name in schedules}, why
    chosen, steps, sentences = [], {}, {}
    for name, sigmas in schedules.items():
        plan = _plan(settings, sampler_name, sigmas, MODELS[name])
        choice, why = resolved(settings, plan, full[name])
        chosen.append(choice)
        steps[name] = choice.corrected_steps(plan.sigmas, full[name], plan.known_ends)
        sentences.setdefault(why, []).append(name)
    sentence, *others = sentences
    if others:
        each = " ".join(f"With the noise levels of {', '.join(names)}: {why}" for why, names in sentences.items())
        sentence = f"What auto corrects depends on the model's noise levels, and is known when it runs. {each}"
    return max(chosen, key=lambda one: one.is_ahead), steps, sentence


def _plan(settings, sampler_name, sigmas, levels=None):
    try:
        may_be_by_table = (settings.is_auto or settings.is_off) and refusal(sampler_name) is None
        return plan_by_name(sampler_name, tuple(sigmas.tolist()), levels, may_be_by_table)
    except CannotRehearse as reason:
        known = refusal(sampler_name) if settings.is_auto else None
        sentence = f"sampler_name: its steps are not known in advance, because {reason}."
        raise NotKnown(nothing_because(known) if known else sentence) from reason
