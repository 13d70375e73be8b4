"""The place of each denoiser evaluation in its run, for all nodes of the pack that act on the MODEL.

The run's plan has the sigmas of the run's steps and knows which evaluation belongs to which step. For the host's own samplers a
table gives this, for a run with corrections a rehearsal, and for other samplers the order of evaluations and callbacks. The
place of an evaluation is a dict:

    step         the number of the step, from 0
    iteration    k in the k-th correction of the step, else 0
    sigma        the noise level of the latent, a float; None if it cannot be known without a read from the device
    position     the place of sigma on the schedule, in steps, a float; None in the same case
    evaluation   a number that no other evaluation has
    latent       the shape of the latent, () if it is not known
    schedule     the Schedule that has these steps

An IEC sampler puts this dict into the transformer options under the key `IEC`, where other packs' nodes may read it. For other
samplers the FollowedRun has it. `place` returns it, always with a position.
"""

import itertools
import math
from bisect import bisect

import comfy.samplers
from comfy.patcher_extension import WrappersMP

from .network_calls import IEC
from .noise import sampler_name
from .stock_samplers import evaluations_of

KEY = "iec_run_plan"
PICK_THEIR_OWN = ("dpm_fast_function", "dpm_adaptive_function")  # of the host: their steps differ from the schedule's
SAME = 1e-3  # sigmas whose relative difference is smaller are equal: a sampler may compute in half precision


class Departed(RuntimeError):
    """A sampler takes other steps than its plan says."""

    def __init__(self):
        super().__init__(
            "sampler: it takes other steps in this run than its schedule says, so IEC cannot follow them; choose one of "
            "ComfyUI's own samplers, or sample without IEC."
        )


class Schedule:
    """A run's sigmas, a list of floats, and positions on them."""

    def __init__(self, sigmas):
        self.sigmas = sigmas
        descending = self.sigmas[0] >= self.sigmas[-1]
        self._rising = [-sigma if descending else sigma for sigma in self.sigmas]
        self._sign = -1 if descending else 1
        self.is_one_way = all(here < then for here, then in itertools.pairwise(self._rising))

    @property
    def steps(self):
        """The number of steps."""
        return max(len(self.sigmas) - 1, 1)

    def position(self, sigma):
        """Return the position of a sigma on the schedule, in steps.

        It is a step's number at the start of the step, and linear in sigma between two steps.
        """
        value = self._sign * sigma
        index = min(max(bisect(self._rising, value + 1e-6 * abs(value)) - 1, 0), len(self._rising) - 1)
        here, then = self._rising[index], self._rising[min(index + 1, len(self._rising) - 1)]
        if then <= here:
            return float(index)
        share = (value - here) / (then - here)
        return float(index) if abs(share) < 1e-4 else index + min(max(share, 0.0), 1.0)

    def position_near(self, sigma, step):
        """Return the position of an evaluation that is at the start of this step, within it, or at one of the next two steps.

        The step is needed if a schedule goes up again, because then several steps have the same sigma.
        """
        if self.is_one_way:
            return self.position(sigma)
        ahead = self.sigmas[step : step + 3]
        for index, other in enumerate(ahead, step):
            if math.isclose(sigma, other, rel_tol=SAME):
                return float(index)
        if len(ahead) > 1 and min(ahead[:2]) < sigma < max(ahead[:2]):
            return step + (sigma - ahead[0]) / (ahead[1] - ahead[0])
        return float(step + 1)

    def has(self, sigma):
        """Return whether sigma is one of the schedule's sigmas."""
        return any(math.isclose(sigma, other, rel_tol=SAME) for other in self.sigmas)

    def step_at(self, position):
        """Return the number of the step that contains a position."""
        return min(int(position), self.steps - 1)


_numbers = itertools.count()


def _told(schedule, x, step, position, sigma, iteration=0):
    """Return the place of an evaluation of x, a dict as in the module's docstring."""
    return {
        "step": step, "iteration": iteration, "sigma": sigma, "position": position, "evaluation": next(_numbers),
        "latent": () if x is None else tuple(x.shape), "schedule": schedule,
    }  # fmt: skip


class RunPlan:
    """The plan of a run whose evaluations are known in advance.

    sigmas: those at which the steps begin, and the end of the last step: n + 1 floats. evaluations: (number of its step,
    whether the step uses its prediction) for each of the sampler's own evaluations, in order. why_no_end: why no step's result
    is known from its own prediction, as a phrase after the sampler's name; None if some results are, or if this is not known.
    rehearsal: the run's Rehearsal; None for a plan by the table, which cannot correct any step.
    """

    def __init__(self, sigmas, evaluations, why_no_end=None, rehearsal=None):
        self.sigmas, self.evaluations = sigmas, evaluations
        self.why_no_end, self.rehearsal = why_no_end, rehearsal
        self.schedule = Schedule(sigmas)
        self._begun = 0  # number of evaluations that have begun

    @classmethod
    def of_stock(cls, function, options, sigmas):
        """Return the plan, by the table, of a sampler function with these options over n + 1 sigmas, floats.

        Return None if it is not a known sampler of the host.
        """
        known = evaluations_of(function, options, sigmas)
        if known is None:
            return None
        return cls(sigmas, known.of_steps(sigmas), known.why_no_end_is_known(sigmas))

    @property
    def steps(self):
        """The number of steps."""
        return len(self.sigmas) - 1

    @property
    def known_ends(self):
        """The `known_ends` of the Rehearsal; an empty frozenset without one."""
        return frozenset() if self.rehearsal is None else self.rehearsal.known_ends

    @property
    def noise(self):
        """The `noise` of the Rehearsal; "" without one."""
        return "" if self.rehearsal is None else self.rehearsal.noise

    def begin(self):
        """Begin the sampler's next evaluation. Return (number of its step, whether the step uses its prediction).

        Raises Departed if the plan has no further evaluation.
        """
        if self._begun == len(self.evaluations):
            raise Departed
        self._begun += 1
        return self.evaluations[self._begun - 1]

    def place(self, x):
        """Return the place of the sampler's evaluation of x [B, ...] that was begun last."""
        step, is_own = self.evaluations[self._begun - 1]
        if is_own:
            return _told(self.schedule, x, step, float(step), self.sigmas[step])
        if self.rehearsal is None:
            return _told(self.schedule, x, step, None, None)
        level = self.rehearsal.levels[self._begun - 1]
        position = self.schedule.position_near(level, step)
        return _told(self.schedule, x, self.schedule.step_at(position), position, level)

    def place_of_correction(self, x, step, iteration, sigma):
        """Return the place of a correction's evaluation of x [B, ...], whose noise level is sigma (a float)."""
        return _told(self.schedule, x, step, self.schedule.position_near(sigma, step), sigma, iteration)

    def called_back(self, number):
        """Check a sampler's callback with this step number against the plan. Raises Departed."""
        if self._begun == 0 or self.evaluations[self._begun - 1][0] != number:
            raise Departed

    def check_is_over(self):
        """Raise Departed if evaluations of the plan are missing."""
        if self._begun != len(self.evaluations):
            raise Departed


class FollowedRun:
    """Determines the place of each evaluation while a run goes on.

    It uses the run's plan if there is one. Without a plan it finds the step by sigma. If sigma is ambiguous, it uses the order
    of evaluations: on a schedule that goes up again, or if the sampler passes the network another sigma than its own.

    The host calls back once per step, after the step's own evaluation. The evaluations up to the next callback are the step's
    further evaluations, followed by the next step's own evaluation. Their number is expected to be the same each time.
    """

    def __init__(self, sigmas, plan=None, picks_its_steps=False):
        """sigmas: n + 1 floats. plan: a RunPlan. picks_its_steps: whether the steps differ from those of the schedule."""
        self.schedule = Schedule(sigmas) if plan is None else plan.schedule
        self.told = None  # the place of the last evaluation that the host's wrappers saw begin
        self._untold = None  # (sigma, place) of an evaluation that they did not see
        self._plan = plan
        self._picks_its_steps = picks_its_steps
        self._step = 0  # the step of the last evaluation
        self._own = -1  # the step of the last callback, and so of the last own evaluation
        self._since = 0  # evaluations since the last callback
        self._usual = None  # the number of evaluations from one callback to the next
        self._callback = None
        self._seen = None  # the sigma of the last evaluation since the callback
        self._ends_there = False  # whether `_seen` is the next step's sigma, as in Heun's second evaluation
        self._shown = 1.0  # the sigma passed to the network, as a factor of the step's sigma
        self._is_honest = True

    def begin(self, x, sigma):
        """Begin the sampler's evaluation of x [B, ...] at sigma, a tensor whose numbers are all equal."""
        self.told = self._next(x, sigma)

    def untold(self, sigma):
        """Return the place of an evaluation at sigma that the host's wrappers did not see.

        A guider that calls the network in its own way makes such evaluations. Consecutive calls at the same sigma count as one
        evaluation.
        """
        value = sigma.flatten()[0].item()
        if self._untold is None or self._untold[0] != value:
            self._untold = value, self._next(None, sigma)
        return self._untold[1]

    def _next(self, x, sigma):
        self._since += 1
        if self._keeps_to_plan(self._begin_by_plan):
            return self._plan.place(x)
        sigma = sigma.flatten()[0].item()
        position = self._position(sigma)
        self._step, self._seen = self.schedule.step_at(position), sigma
        return _told(self.schedule, x, self._step, position, sigma)

    def _begin_by_plan(self):
        step, _ = self._plan.begin()
        if step > self._own + 1:  # the step before had no callback: a guider may be called several times for one evaluation
            raise Departed

    def _keeps_to_plan(self, check):
        """Return whether the run has a plan and still follows it. check(): raises Departed if the run does not follow it."""
        if self._plan is not None:
            try:
                check()
            except Departed:
                self._plan = None
        return self._plan is not None

    def called_back(self, number, total=None):
        """Record a callback of the host for a step.

        number: the sampler's number of the step, which may restart or count differently. total: the number of steps, if the
        callback gives it.
        """
        if self._since == 0 and number == self._callback:
            return
        if total not in (None, self.schedule.steps):
            self._plan = None
        self._keeps_to_plan(lambda: self._plan.called_back(number))
        self._own += 1
        if self._own > 0 and self._since > 0:
            self._usual = self._since
        if self._own >= self.schedule.steps:
            self._picks_its_steps = True
        elif self._seen is not None:
            is_there, sigma = self.schedule.has(self._seen), self.schedule.sigmas[self._own]
            self._shown = 1.0 if is_there or min(self._seen, sigma) <= 0 else self._seen / sigma
            self._is_honest &= is_there
        self._callback, self._since, self._seen, self._untold = number, 0, None, None

    def _position(self, sigma):
        schedule, following = self.schedule, self._own + 1
        is_plain = self._picks_its_steps or (schedule.is_one_way and self._is_honest)
        if is_plain and (self._picks_its_steps or schedule.has(sigma)):
            return schedule.position(sigma)
        if self._since == (1 if self._own < 0 else self._usual):
            self._ends_there = self._seen == sigma
            return float(following)
        position = schedule.position(sigma) if is_plain else self._position_by_order(sigma / self._shown)
        if self._own < 0 or self._usual is not None:
            return position
        is_next = position >= following + 1 if is_plain else position > following - 0.2
        return float(following) if is_next and not schedule.has(sigma) else position

    def _position_by_order(self, sigma):
        """Return the position of a further evaluation of the step, or of the next step if the sampler does not call back."""
        if self._ends_there:
            return float(self._own + 1)
        return self.schedule.position_near(sigma, self._own if self._own >= 0 else self._step)


def with_place(model_options, told):
    """Return model options that contain the place of an evaluation, `told`."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), IEC: told}}


def place(transformer_options):
    """Return the place, with its position, of the evaluation that these `transformer_options` of the host belong to.

    Return None if the place is not known.
    """
    told, run, sigma = (transformer_options.get(name) for name in (IEC, KEY, "sigmas"))
    if told is None and run is not None:
        told = run.untold(sigma) if run.told is None and sigma is not None else run.told
    if told is None or told["position"] is not None:
        return told
    if sigma is None:
        return None
    schedule, sigma = told["schedule"], sigma.flatten()[0].item()
    position = schedule.position_near(sigma, told["step"])
    return {**told, "sigma": sigma, "position": position, "step": schedule.step_at(position)}


def follow_run(model):
    """Add wrappers to a MODEL, so that `place` also works in runs without an IEC sampler."""
    if not model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _sampler_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)


def _sampler_sample(executor, guider, sigmas, extra_args, callback, *args, **kwargs):
    run, options = _followed(executor.class_obj, sigmas.flatten().tolist()), extra_args["model_options"]["transformer_options"]
    options[KEY] = run
    options.pop(IEC, None)  # left from an outer run that contains this run

    def called_back(step, *more):  # more: the denoised prediction, the latent, the number of steps
        run.called_back(step, *more[2:3])
        if callback is not None:
            callback(step, *more)

    return executor(guider, sigmas, extra_args, called_back, *args, **kwargs)


def _followed(sampler, sigmas):
    """Return the FollowedRun of a SAMPLER. It gets no plan if another pack's `sample` may use other sigmas."""
    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    is_plain = type(sampler).sample.__module__ == comfy.samplers.__name__
    plan = RunPlan.of_stock(function, options, sigmas) if is_plain else None
    return FollowedRun(sigmas, plan, sampler_name(function) in PICK_THEIR_OWN)


def _predict_noise(executor, x, timestep, model_options=None, *args, **kwargs):
    options = (model_options or {}).get("transformer_options", {})
    if KEY in options and IEC not in options:
        options[KEY].begin(x, timestep)
    return executor(x, timestep, model_options, *args, **kwargs)
