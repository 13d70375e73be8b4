"""Which samplers can be corrected, and what `auto` chooses for a run."""

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers

from ....iec_core.correction.automatic import Situation, choose
from ..sampling.rehearsal import CannotRehearse, plan_by_name

SOME_SIGMAS = (8.0, 5.0, 3.0, 1.5, 0.5, 0.0)  # over which a sampler shows how it steps, whatever the run's will be


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
