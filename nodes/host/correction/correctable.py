"""Which samplers can be corrected, and what `auto` chooses for a run."""

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers

from ....iec_core.correction.automatic import Situation, choose
from ..sampling.rehearsal import CannotRehearse, plan_by_name

SOME_SIGMAS = (8.0, 5.0, 3.0, 1.5, 0.5, 0.0)  # an example, to see how a sampler steps before the run's schedule is known


def refusal(name):
    """Return why a sampler, by its name in the host's list, cannot be corrected; None if no reason is known."""
    if "cfg_pp" in name:
        return (
            f"{name} uses the unguided prediction of its last evaluation, and after a correction that evaluation was at "
            "another latent"
        )
    if name in ("dpm_adaptive", "dpm_adaptive_function"):
        return (
            "dpm_adaptive chooses its steps by its own error estimate, so the steps are not known in advance, and the estimate "
            "mistakes a correction for an error"
        )
    if name == "ar_video":
        return "ar_video stores what each evaluation computed, so a step cannot be evaluated again"
    return None


def resolved(settings, plan, full, other_cache=""):
    """Return (settings, sentence): what `auto` chooses for a run, and why. Without `auto` return the settings unchanged and "".

    plan: the RunPlan. full: the steps that this pack's cache evaluates in full, None if there is no cache. other_cache: the
    name of another cache, if there is one.
    """
    if not settings.is_auto:
        return settings, ""
    sigmas, iterations = tuple(plan.sigmas), settings.max_iterations
    choice = choose(Situation(sigmas, plan.known_ends, plan.why_no_end, plan.noise, full, other_cache, iterations))
    return settings.with_choice(choice), choice.why


def check_sampler(name, settings, of="sampler"):
    """Raise ValueError if a sampler, by its name in the host's list, cannot be corrected as `settings` say.

    of: the input that names the sampler, for the message.
    """
    if settings.is_off or settings.is_auto:
        return
    if reason := refusal(name):
        raise ValueError(f"{of}: {reason}; choose another sampler, or correction_steps none.")
    if settings.is_ahead and name in comfy.samplers.KSampler.SAMPLERS:
        try:
            check_known_ends(name, settings, plan_by_name(name, SOME_SIGMAS), of)
        except CannotRehearse:  # the run will raise an error that says why its steps cannot be corrected
            return


def check_known_ends(name, settings, plan, of="sampler"):
    """Raise ValueError if the settings correct steps `ahead`, but the sampler's RunPlan shows that none can be corrected so.

    of: the input that names the sampler, for the message.
    """
    reason = None if settings.is_off or not settings.is_ahead else plan.why_no_end
    if reason:
        raise ValueError(
            f"{of}: {name} {reason}, but evaluation_point ahead needs a sampler that uses one prediction per step; choose "
            "euler, ddim, euler_ancestral, ddpm or lcm, or evaluation_point next."
        )
