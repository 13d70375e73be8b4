"""Where in its run an evaluation of the denoiser is: told once, by the run's plan, to whatever is on the MODEL.

A plan has the sigmas of the run's steps and knows which evaluation belongs to which step: of the host's own samplers by a
table, of a run with corrections by a rehearsal, and of other samplers by the order in which evaluations and callbacks come.
What an evaluation is told:

    step         the number of the step, from 0
    iteration    k in the k-th correction of the step, else 0
    sigma        the noise level of the latent, a float; None where it is not known without a read from the device
    position     where on the schedule that is, in steps, a float; None likewise
    evaluation   a number that no other evaluation has
    latent       the shape of the latent, () where it is not known
    schedule     the Schedule whose steps these are

An IEC sampler tells it in the transformer options, under the key `IEC`, where other packs' nodes may read it; of other samplers
the run keeps it. `place` returns it, with its position.
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
PICK_THEIR_OWN = ("dpm_fast_function", "dpm_adaptive_function")  # of the host; they call back for steps of their own
SAME = 1e-3  # two sigmas that differ by less, relatively, are one: a sampler may have it in half precision


class Departed(RuntimeError):
    """A sampler takes other steps than its plan says."""

    def __init__(self):
        super().__init__(
            "sampler: it takes other steps in this run than its schedule says, so that they cannot be told; choose a sampler "
            "of the host's list, or sample without IEC."
        )


class Schedule:
    """A run's sigmas, a list of floats, and where on them an evaluation is."""

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
        """Return where on the schedule this sigma is, in steps: a step's number where it begins, and between two of them on
        the line.
        """
        value = self._sign * sigma
        index = min(max(bisect(self._rising, value + 1e-6 * abs(value)) - 1, 0), len(self._rising) - 1)
        here, then = self._rising[index], self._rising[min(index + 1, len(self._rising) - 1)]
        if then <= here:
            return float(index)
        share = (value - here) / (then - here)
        return float(index) if abs(share) < 1e-4 else index + min(max(share, 0.0), 1.0)

    def position_near(self, sigma, step):
        """Return the position of an evaluation that begins this step, is within it, or leads to one of the next two: where a
        schedule goes up again, its sigmas are those of other steps too.
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
        """Tell whether it is one of the sigmas."""
        return any(math.isclose(sigma, other, rel_tol=SAME) for other in self.sigmas)

    def step_at(self, position):
        """Return the number of the step that a position is part of."""
        return min(int(position), self.steps - 1)


_numbers = itertools.count()


def _told(schedule, x, step, position, sigma, iteration=0):
    """Return what an evaluation of x is told of its place."""
    return {
        "step": step, "iteration": iteration, "sigma": sigma, "position": position, "evaluation": next(_numbers),
        "latent": () if x is None else tuple(x.shape), "schedule": schedule,
    }  # fmt: skip


class RunPlan:
    """The plan of a run whose evaluations are known before.

    sigmas: those at which the steps begin, and the last one's end: n + 1 floats. evaluations: of the sampler's own, in order,
    (number of its step, whether the step is taken with it). why_no_end: the reason why the result of no step is known with its
    own prediction, to go on after the sampler's name; None where some are, or nothing is known of it. rehearsal: the run's
    Rehearsal, None for a plan by the table, by which no step can be corrected.
    """

    def __init__(self, sigmas, evaluations, why_no_end=None, rehearsal=None):
        self.sigmas, self.evaluations = sigmas, evaluations
        self.why_no_end, self.rehearsal = why_no_end, rehearsal
        self.schedule = Schedule(sigmas)
        self._begun = 0  # evaluations

    @classmethod
    def of_stock(cls, function, options, sigmas):
        """Return the plan of a sampler function with these options over n + 1 sigmas, floats; None where it is not one of the
        host's that are known.
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
        """As of the Rehearsal."""
        return frozenset() if self.rehearsal is None else self.rehearsal.known_ends

    @property
    def noise(self):
        """As of the Rehearsal."""
        return "" if self.rehearsal is None else self.rehearsal.noise

    def begin(self):
        """Begin the sampler's next evaluation; return (number of its step, whether the step is taken with it). Raises Departed
        where there is none.
        """
        if self._begun == len(self.evaluations):
            raise Departed
        self._begun += 1
        return self.evaluations[self._begun - 1]

    def place(self, x):
        """Return what the sampler's evaluation that was begun last, of x [B, ...], is told."""
        step, is_own = self.evaluations[self._begun - 1]
        if is_own:
            return _told(self.schedule, x, step, float(step), self.sigmas[step])
        if self.rehearsal is None:
            return _told(self.schedule, x, step, None, None)
        level = self.rehearsal.levels[self._begun - 1]
        position = self.schedule.position_near(level, step)
        return _told(self.schedule, x, self.schedule.step_at(position), position, level)

    def place_of_correction(self, x, step, iteration, sigma):
        """Return what an evaluation for a step's correction, of x [B, ...] with the noise of sigma (a float), is told."""
        return _told(self.schedule, x, step, self.schedule.position_near(sigma, step), sigma, iteration)

    def called_back(self, number):
        """Check a sampler's callback, with the number of its step. Raises Departed."""
        if self._begun == 0 or self.evaluations[self._begun - 1][0] != number:
            raise Departed

    def check_is_over(self):
        """Raise Departed where evaluations are still to come."""
        if self._begun != len(self.evaluations):
            raise Departed


class FollowedRun:
    """A run that is followed as it goes on. It keeps to its plan where it has one. Without one its steps are known by sigma,
    and by the order of evaluations where sigmas do not tell: on a schedule that goes up again, or where the sampler shows the
    network another sigma than its own.

    The host calls back once a step, after the step's own evaluation. What follows until the next time are the step's further
    evaluations, and at last the next step's own: of as many as there were the time before.
    """

    def __init__(self, sigmas, plan=None, picks_its_steps=False):
        """sigmas: n + 1 floats. plan: a RunPlan. picks_its_steps: whether the steps are others than the schedule's."""
        self.schedule = Schedule(sigmas) if plan is None else plan.schedule
        self.told = None  # of the evaluation that the host's wrappers saw begin last
        self._untold = None  # (sigma, what it was told) of an evaluation that they did not
        self._plan = plan
        self._picks_its_steps = picks_its_steps
        self._step = 0  # where the last evaluation was
        self._own = -1  # the step of the last own evaluation
        self._since = 0  # evaluations since the last callback
        self._usual = None  # how many there are from one to the next
        self._callback = None
        self._seen = None  # the sigma of the last evaluation since the callback
        self._ends_there = False  # whether that was the next step's, as Heun's second one is
        self._shown = 1.0  # what the network is shown of the step's sigma, as a factor
        self._is_honest = True

    def begin(self, x, sigma):
        """Begin the sampler's evaluation of x [B, ...] at sigma, a tensor whose numbers are alike."""
        self.told = self._next(x, sigma)

    def untold(self, sigma):
        """Return what an evaluation at sigma is told that the host's wrappers did not see, as of a guider that calls the
        network in its own way. Several calls in a row at the same sigma are one evaluation.
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
        if step > self._own + 1:  # with no callback for the step before: a guider may be asked several times in an evaluation
            raise Departed

    def _keeps_to_plan(self, check):
        """Return whether there is a plan that the run keeps to; check(): raises Departed where it does not."""
        if self._plan is not None:
            try:
                check()
            except Departed:
                self._plan = None
        return self._plan is not None

    def called_back(self, number, total=None):
        """Take down that the host calls back for a step. number: the sampler's own, which may begin anew or count otherwise.
        total: of how many steps, if that is told.
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
        """Return the position of a further evaluation of the step, or, with a sampler that does not call back, of the next."""
        if self._ends_there:
            return float(self._own + 1)
        return self.schedule.position_near(sigma, self._own if self._own >= 0 else self._step)


def with_place(model_options, told):
    """Return model options in which an evaluation is told its place."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), IEC: told}}


def place(transformer_options):
    """Return what the evaluation that the host's `transformer_options` belong to is told of its place, with its position; None
    where it is told nothing.
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
    """Have the evaluations in the runs of a MODEL told their place, where an IEC sampler does not tell it."""
    if not model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _sampler_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)


def _sampler_sample(executor, guider, sigmas, extra_args, callback, *args, **kwargs):
    run, options = _followed(executor.class_obj, sigmas.flatten().tolist()), extra_args["model_options"]["transformer_options"]
    options[KEY] = run
    options.pop(IEC, None)  # of a run that this one is inside of

    def called_back(step, *more):  # the denoised prediction, the latent, the number of steps
        run.called_back(step, *more[2:3])
        if callback is not None:
            callback(step, *more)

    return executor(guider, sigmas, extra_args, called_back, *args, **kwargs)


def _followed(sampler, sigmas):
    """Return the FollowedRun of a SAMPLER. One of another pack that samples in its own way may do so over other sigmas."""
    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    is_plain = type(sampler).sample.__module__ == comfy.samplers.__name__
    plan = RunPlan.of_stock(function, options, sigmas) if is_plain else None
    return FollowedRun(sigmas, plan, sampler_name(function) in PICK_THEIR_OWN)


def _predict_noise(executor, x, timestep, model_options=None, *args, **kwargs):
    options = (model_options or {}).get("transformer_options", {})
    if KEY in options and IEC not in options:
        options[KEY].begin(x, timestep)
    return executor(x, timestep, model_options, *args, **kwargs)
