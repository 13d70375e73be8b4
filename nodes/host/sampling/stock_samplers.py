"""A table of the host's own samplers: how often each evaluates the denoiser per step, and whether it uses earlier predictions.

Tests compare every line with the sampler itself and with its rehearsal. The table does not cover other packs' samplers,
samplers that space their steps themselves (dpm_fast, dpm_adaptive), and options and schedules that change how often a sampler
evaluates.
"""

import itertools
from dataclasses import dataclass

from .noise import is_of_the_host, sampler_name

# Reasons why no step's result is known from its own prediction, as phrases after the sampler's name.
MORE_THAN_ONCE = "evaluates more than once per step"
WITH_HISTORY = "also uses predictions of earlier steps"
SHOWS_HISTORY = 4  # every sampler with history has used its history within this many steps


@dataclass(frozen=True)
class Evaluations:
    """How often a sampler evaluates in its steps.

    each: evaluations per step. first: those of the first step, if different. last: those of the last steps, in order, if the
    schedule ends at 0. always_so: whether `last` holds for other schedules too. own: the index of the evaluation whose
    prediction a step uses, 0 the first, -1 the last; the host's callback comes after the first. has_history: whether steps also
    use earlier predictions.
    """

    each: int = 1
    first: int | None = None
    last: tuple[int, ...] = ()
    always_so: bool = False
    own: int = 0
    has_history: bool = False

    def of_steps(self, sigmas):
        """Return (number of its step, whether the step uses its prediction) of each evaluation over n + 1 sigmas, in order."""
        steps = max(len(sigmas) - 1, 0)
        counts = [self.each] * steps
        if self.first is not None:
            counts[:1] = [self.first] * min(steps, 1)
        if self.last and (self.always_so or sigmas[-1] == 0):
            ending = self.last[max(len(self.last) - steps, 0) :]
            counts[steps - len(ending) :] = ending
        return [(step, index == self.own % count) for step, count in enumerate(counts) for index in range(count)]

    def why_no_end_is_known(self, sigmas):
        """Return why no step's result over n + 1 sigmas is known from its prediction; None if only a rehearsal can tell."""
        steps = len(sigmas) - 1
        if len(self.of_steps(sigmas)) > steps:
            return MORE_THAN_ONCE
        return WITH_HISTORY if self.has_history and steps >= SHOWS_HISTORY else None


ONE = Evaluations()
HISTORY = Evaluations(has_history=True)
TWO = Evaluations(2, last=(1,))
THREE = Evaluations(3, last=(1,))

# {name of the sampler function, without sample_: its Evaluations}
EVALUATIONS = {
    "euler": ONE,
    "euler_cfg_pp": ONE,
    "euler_ancestral": ONE,
    "euler_ancestral_cfg_pp": ONE,
    "heun": TWO,
    "heunpp2": Evaluations(3, last=(2, 1), always_so=True),
    "exp_heun_2_x0": TWO,
    "exp_heun_2_x0_sde": TWO,
    "dpm_2": TWO,
    "dpm_2_ancestral": TWO,
    "lms": HISTORY,
    "dpmpp_2s_ancestral": TWO,
    "dpmpp_2s_ancestral_cfg_pp": TWO,
    "dpmpp_sde": TWO,
    "dpmpp_sde_gpu": TWO,
    "dpmpp_2m": HISTORY,
    "dpmpp_2m_cfg_pp": HISTORY,
    "dpmpp_2m_sde": HISTORY,
    "dpmpp_2m_sde_gpu": HISTORY,
    "dpmpp_2m_sde_heun": HISTORY,
    "dpmpp_2m_sde_heun_gpu": HISTORY,
    "dpmpp_3m_sde": HISTORY,
    "dpmpp_3m_sde_gpu": HISTORY,
    "ddpm": ONE,
    "lcm": ONE,
    "ipndm": HISTORY,
    "ipndm_v": HISTORY,
    "deis": HISTORY,
    "res_multistep": HISTORY,
    "res_multistep_cfg_pp": HISTORY,
    "res_multistep_ancestral": HISTORY,
    "res_multistep_ancestral_cfg_pp": HISTORY,
    "gradient_estimation": HISTORY,
    "gradient_estimation_cfg_pp": HISTORY,
    "er_sde": HISTORY,
    "seeds_2": TWO,
    "seeds_3": THREE,
    "sa_solver": HISTORY,
    "sa_solver_pece": Evaluations(2, first=1, own=-1),
    "unipc": HISTORY,
    "unipc_bh2": HISTORY,
}

# Options of the host's sampler functions that do not change the number of evaluations. `eta` is harmless only for samplers with
# one evaluation per step: with another eta a step may have so much noise that nothing is left for a second evaluation.
HARMLESS = {
    "cfg_pp", "corrector_order", "deis_mode", "ge_gamma", "max_order", "max_stage", "noise_sampler", "noise_scaler", "order",
    "predictor_order", "s_churn", "s_noise", "s_tmax", "s_tmin", "simple_order_2", "solver_type", "tau_func",
}  # fmt: skip
HARMLESS_OF_ONE = HARMLESS | {"eta"}
# If sigma rises, or falls by more than this factor, ancestral samplers also lose their second evaluation, by rounding. If sigma
# stays the same, heunpp2 treats a step as the last step.
LARGEST_RATIO = 1000


def evaluations_of(function, options, sigmas=()):
    """Return the Evaluations of a sampler function with these options over n + 1 sigmas, floats; None if not known."""
    known = EVALUATIONS.get(sampler_name(function)) if is_of_the_host(function) else None
    if known in (None, ONE, HISTORY):
        return known if HARMLESS_OF_ONE.issuperset(options) else None
    falls = all(here > then and (then == 0 or here < LARGEST_RATIO * then) for here, then in itertools.pairwise(sigmas))
    return known if falls and HARMLESS.issuperset(options) else None
