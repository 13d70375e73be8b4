"""What the host's own samplers do, as data: how often each evaluates the denoiser in a step.

A test holds every line to a rehearsal of the sampler. Other packs' samplers, those that space their steps themselves
(dpm_fast, dpm_adaptive), and options that change how often a sampler evaluates are not here.
"""

from dataclasses import dataclass

from .noise import is_of_the_host, sampler_name


@dataclass(frozen=True)
class Evaluations:
    """How often a sampler evaluates in its steps.

    each: in a step. first: in the first one, where that is another number. last: in its last steps, in order, where the
    schedule ends at 0; always_so: on other schedules too. own: which of a step's evaluations the step is taken with, 0 the
    first, -1 the last; the host's callback comes after the first.
    """

    each: int = 1
    first: int | None = None
    last: tuple[int, ...] = ()
    always_so: bool = False
    own: int = 0

    def of_steps(self, sigmas):
        """Return (number of the step, whether the step is taken with it) of every evaluation over n + 1 sigmas, in order."""
        steps = len(sigmas) - 1
        counts = [self.each] * steps
        if self.first is not None:
            counts[:1] = [self.first] * min(steps, 1)
        if self.last and (self.always_so or sigmas[-1] == 0):
            ending = self.last[-steps:]
            counts[steps - len(ending) :] = ending
        return [(step, index == self.own % count) for step, count in enumerate(counts) for index in range(count)]


ONE = Evaluations()
TWO = Evaluations(2, last=(1,))
THREE = Evaluations(3, last=(1,))

# By the name of the sampler function, without its sample_.
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
    "lms": ONE,
    "dpmpp_2s_ancestral": TWO,
    "dpmpp_2s_ancestral_cfg_pp": TWO,
    "dpmpp_sde": TWO,
    "dpmpp_sde_gpu": TWO,
    "dpmpp_2m": ONE,
    "dpmpp_2m_cfg_pp": ONE,
    "dpmpp_2m_sde": ONE,
    "dpmpp_2m_sde_gpu": ONE,
    "dpmpp_2m_sde_heun": ONE,
    "dpmpp_2m_sde_heun_gpu": ONE,
    "dpmpp_3m_sde": ONE,
    "dpmpp_3m_sde_gpu": ONE,
    "ddpm": ONE,
    "lcm": ONE,
    "ipndm": ONE,
    "ipndm_v": ONE,
    "deis": ONE,
    "res_multistep": ONE,
    "res_multistep_cfg_pp": ONE,
    "res_multistep_ancestral": ONE,
    "res_multistep_ancestral_cfg_pp": ONE,
    "gradient_estimation": ONE,
    "gradient_estimation_cfg_pp": ONE,
    "er_sde": ONE,
    "seeds_2": TWO,
    "seeds_3": THREE,
    "sa_solver": ONE,
    "sa_solver_pece": Evaluations(2, first=1, own=-1),
    "unipc": ONE,
    "unipc_bh2": ONE,
}

# Options of the host's sampler functions that leave the number of evaluations as it is.
HARMLESS = {
    "cfg_pp", "corrector_order", "deis_mode", "ge_gamma", "max_order", "max_stage", "noise_sampler", "noise_scaler", "order",
    "predictor_order", "s_churn", "s_noise", "s_tmax", "s_tmin", "simple_order_2", "solver_type", "tau_func",
}  # fmt: skip
HARMLESS_OF_ONE = HARMLESS | {"eta"}  # a step of much noise may have no deterministic part, and so no second evaluation


def evaluations_of(function, options):
    """Return the Evaluations of a sampler function with these options, None where they are not known."""
    known = EVALUATIONS.get(sampler_name(function)) if is_of_the_host(function) else None
    harmless = HARMLESS_OF_ONE if known is ONE else HARMLESS
    return known if known is not None and harmless.issuperset(options) else None
