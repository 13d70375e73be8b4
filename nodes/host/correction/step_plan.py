"""What a sampling run will do, told before it runs: which steps are corrected and cached, and what that costs."""

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
MOST_STEPS = 500  # that are drawn
# Noise levels of models, as far apart as those of the host's are: what a plan says is said of all of them, or of each.
MODELS = {"SD 1.5, SDXL": Levels(), "SD 3": FlowLevels(3.0), "Wan": FlowLevels(8.0), "Flux": FluxLevels()}
LEAST_DENOISE = 0.01  # the schedule of a run that denoises less has as many more steps


class NotKnown(ValueError):
    """A run may do well, but what it will do cannot be told beforehand."""


@dataclass(frozen=True)
class Sampling:
    """What the host's samplers are told: of KSampler; of KSamplerAdvanced start_step, last_step and force_full_denoise in
    place of denoise; of BasicScheduler, with is_custom, for SamplerCustom.
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
        """Raise ValueError for what a run would be refused for, and NotKnown for what is too long to be drawn."""
        known = comfy.samplers.KSampler
        wrong = unknown_choice(known.SAMPLERS, sampler_name=self.sampler_name)
        wrong = wrong or unknown_choice(known.SCHEDULERS, scheduler=self.scheduler)
        if wrong:
            raise ValueError(wrong)
        if not 1 <= self.steps <= MOST_STEPS:
            raise NotKnown(f"steps: 1 to {MOST_STEPS} are drawn, and these are {self.steps}.")
        if 0 < self.denoise < LEAST_DENOISE:
            raise NotKnown(f"denoise: below {LEAST_DENOISE} the steps are not drawn.")

    def sigmas(self, levels):
        """Return the sigmas of the run as the host makes them for a model's noise levels, n + 1 on the CPU."""
        name = "euler" if self.is_custom else self.sampler_name  # KSampler makes the schedules of some samplers otherwise
        sigmas = comfy.samplers.KSampler(NoModel(levels), self.steps, "cpu", name, self.scheduler, self.denoise).sigmas
        if self.last_step is not None and self.last_step < len(sigmas) - 1:
            sigmas = sigmas[: self.last_step + 1]
            if self.force_full_denoise:
                sigmas[-1] = 0
        return sigmas[self.start_step :]


def _full_steps(schedules, begins, **cache):
    """Return the steps that a cache evaluates in full, sorted; None where only the run tells. begins: where steps begin with
    SD 1.5's noise levels. schedules: {model: sigmas}; a part of the schedule (start_percent) has other steps with others, and
    a profile is of one schedule.
    """
    if "profile_name" in cache:
        return _full_steps_on(MODELS["SD 1.5, SDXL"], begins, **cache)
    full, *others = (_full_steps_on(levels, schedules[name].tolist(), **cache) for name, levels in MODELS.items())
    if any(other != full for other in others):
        return None
    return _full_steps_on(MODELS["SD 1.5, SDXL"], begins, **cache)


def _full_steps_on(levels, sigmas, interval=1, schedule="uniform", start_percent=0.0, end_percent=1.0, profile_name=None):
    if profile_name is not None:
        profile = PROFILES.read("profile_name", profile_name, CacheProfile.load)
        try:
            return sorted(CorrectedFeatures(profile).full_steps(sigmas))
        except ValueError:  # of another schedule, or of this one on a model with other noise levels
            return None
    start, end = (float(levels.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return sorted(CacheSettings(max(interval, 1), 0, parse_cache_schedule(schedule), start, end).full_steps(sigmas))


def step_plan(correction, sampling, cache=None, correction_pass="refresh", is_cache_open=False):
    """Return what a run will do, whatever the model's noise levels are, as far as those of `MODELS` tell.

    correction: inputs of `CorrectionSettings.parse`. sampling: of `Sampling`. cache: interval, schedule, start_percent,
    end_percent of IECDeepCache, or profile_name. correction_pass: the cache's. is_cache_open: whether there may be a cache that
    only the run knows.

    The answer: correction, as reports name it; choice, what `auto` chooses and why, "" without it; evaluation_point, its choice
    too; steps; corrected, a list of their numbers; open, those that are corrected with the noise levels of some models and not
    of others; correctable, those of the steps that can be; full, those that the cache evaluates in full, or None;
    full_corrections, how many corrections are evaluated in full; evaluations without corrections, and nfe with them, an upper
    bound where iterations can converge early. Raises ValueError, with a sentence, for what a run would be refused for, and
    NotKnown for what only the run can tell.
    """
    settings, sampling = CorrectionSettings.parse(**correction), Sampling(**sampling)
    about = {"correction": settings.summary(), "choice": "", "evaluation_point": settings.evaluation_point}
    sampling.check()
    check_sampler(sampling.sampler_name, settings, "sampler_name")
    schedules = {name: sampling.sigmas(levels) for name, levels in MODELS.items()}
    sigmas = schedules["SD 1.5, SDXL"]
    if any(len(other) != len(sigmas) for other in schedules.values()):
        raise NotKnown("scheduler: how many steps it makes of so many depends on the model, and is known when it runs.")
    if len(sigmas) < 2:
        nothing = {"corrected": [], "correctable": [], "full": None, "open": []}
        return {**about, "steps": 0, **nothing, "full_corrections": 0, "evaluations": 0, "nfe": 0}
    plan = _plan(settings, sampling.sampler_name, sigmas)
    begins, evaluations = plan.sigmas, len(plan.evaluations)
    full = None if cache is None else _full_steps(schedules, begins, **cache)
    goes_by_cache = settings.steps.kind == "full" or (settings.is_auto and plan.known_ends)
    if goes_by_cache and full is None and (is_cache_open or cache is not None):
        raise NotKnown("correction_steps: which steps a cache evaluates in full is known when it runs.")
    if settings.is_auto and plan.known_ends:
        settings, corrected, maybe, about["choice"] = _chosen(settings, sampling.sampler_name, schedules, full)
    else:
        settings, about["choice"] = resolved(settings, plan, full)
        corrected, maybe = settings.corrected_steps(begins, full, plan.known_ends), frozenset()
    about["evaluation_point"] = settings.evaluation_point
    at = {settings.step_of(step) for step in corrected}
    in_full = at if full is None else at.intersection(full if correction_pass != "reuse" else ())
    return {
        **about,
        "steps": len(begins) - 1,
        "corrected": sorted(corrected),
        "open": sorted(maybe),
        "correctable": sorted(replace(settings, steps=ALL).corrected_steps(begins, None, plan.known_ends)),
        "full": full,
        "full_corrections": settings.added_evaluations * len(in_full),
        "evaluations": evaluations,
        "nfe": evaluations + settings.added_evaluations * len(corrected),
    }


def _chosen(settings, sampler_name, schedules, full):
    """Return what `auto` chooses on the noise levels of every model of `schedules`, {name: sigmas}: (settings, the steps that
    are corrected on all, those that are on some, a sentence; where they differ, one for each).
    """
    chosen, steps, sentences = [], [], {}
    for name, sigmas in schedules.items():
        plan = _plan(settings, sampler_name, sigmas, MODELS[name])
        choice, why = resolved(settings, plan, full)
        chosen.append(choice)
        steps.append(choice.corrected_steps(plan.sigmas, full, plan.known_ends))
        sentences.setdefault(why, []).append(name)
    corrected, some = frozenset.intersection(*steps), frozenset.union(*steps)
    sentence, *others = sentences
    if others:
        each = " ".join(f"As in {', '.join(names)}: {why}" for why, names in sentences.items())
        sentence = f"What auto corrects depends on the model's noise levels, and is known when it runs. {each}"
    return max(chosen, key=lambda one: one.is_ahead), corrected, some - corrected, sentence


def _plan(settings, sampler_name, sigmas, levels=None):
    try:
        may_be_by_table = (settings.is_auto or settings.is_off) and refusal(sampler_name) is None
        return plan_by_name(sampler_name, tuple(sigmas.tolist()), levels, may_be_by_table)
    except CannotRehearse as reason:
        known = refusal(sampler_name) if settings.is_auto else None
        sentence = f"sampler_name: its steps are not known before it runs, because {reason}."
        raise NotKnown(nothing_because(known) if known else sentence) from reason
