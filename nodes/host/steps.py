"""Which step of a sampling run the host is in."""

import math
from bisect import bisect
from itertools import pairwise

from comfy.patcher_extension import WrappersMP

from .network_calls import IEC
from .noise import sampler_name

KEY = "iec_run_steps"
PICK_THEIR_OWN = ("dpm_fast_function", "dpm_adaptive_function")  # of the host; they call back for steps of their own
SAME = 1e-3  # two sigmas that differ by less, relatively, are one: a sampler may have it in half precision


class Schedule:
    """A run's sigmas, a list of floats, and where on them an evaluation is."""

    def __init__(self, sigmas):
        self.sigmas = sigmas
        descending = self.sigmas[0] >= self.sigmas[-1]
        self._rising = [-sigma if descending else sigma for sigma in self.sigmas]
        self._sign = -1 if descending else 1
        self.is_one_way = all(here < then for here, then in pairwise(self._rising))

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

    def locate(self, transformer_options):
        """Return (number of the step from 0, position) of the evaluation that the host's `transformer_options` belong to.

        An IEC sampler says both, which spares the device a read. Otherwise the sigma tells: an evaluation between two sigmas
        of the schedule belongs to the step that it is part of.
        """
        told = transformer_options.get(IEC)
        if told is not None:
            return told["step"], self.position_near(told["sigma"], told["step"])
        position = self.position(transformer_options["sigmas"].flatten()[0].item())
        return self.step_at(position), position


class RunSteps:
    """Which step a run is in, by the order of its evaluations where their sigmas do not tell: on a schedule that goes up again,
    or where the sampler shows the network another sigma than its own.

    The host calls back once a step, after the step's own evaluation. What follows until the next time are the step's further
    evaluations, and at last the next step's own: of as many as there were the time before.

    evaluation: the number of the sampler's evaluation, in which the network may be called several times. latent: the shape of
    what it is of, () where it is not known.
    """

    def __init__(self, sigmas, picks_its_steps=False):
        self.schedule = Schedule(sigmas.flatten().tolist())
        self.evaluation, self.latent = 0, ()
        self._picks_its_steps = picks_its_steps
        self._is_begun = False  # by the host
        self._is_told = False  # by an IEC sampler
        self._told = None  # what it told of the last evaluation
        self._sigma = self._place = None  # of the evaluation
        self._step = 0  # where the last evaluation was
        self._own = -1  # the step of the last own evaluation
        self._since = 0  # evaluations since the last callback
        self._usual = None  # how many there are from one to the next
        self._callback = None
        self._seen = None  # the sigma of the last of these
        self._ends_there = False  # whether that was the next step's, as Heun's second one is
        self._shown = 1.0  # what the network is shown of the step's sigma, as a factor
        self._is_honest = True

    def begin(self, x, sigma):
        """Begin the sampler's evaluation of x [B, ...] at sigma [B]."""
        self._is_begun, self.latent = True, tuple(x.shape)
        self._begin(sigma)

    def _begin(self, sigma):
        self.evaluation += 1
        self._since += 1
        self._sigma, self._place = sigma, None

    def called_back(self, number):
        """Take down that the host calls back for a step; number: the sampler's own, which may begin anew or count otherwise."""
        if self._is_told or (self._since == 0 and number == self._callback):
            return
        self._own += 1
        if self._own > 0 and self._since > 0:
            self._usual = self._since
        if self._own >= self.schedule.steps:
            self._picks_its_steps = True
        elif self._seen is not None:
            is_there, sigma = self.schedule.has(self._seen), self.schedule.sigmas[self._own]
            self._shown = 1.0 if is_there or min(self._seen, sigma) <= 0 else self._seen / sigma
            self._is_honest &= is_there
        self._callback, self._since, self._seen = number, 0, None

    def locate(self, transformer_options):
        """As Schedule.locate; None where no sigma is known."""
        told = transformer_options.get(IEC)
        if told is not None:
            self._follow(told)
            return self.schedule.locate(transformer_options)
        if self._is_begun and self._place is not None:
            return self._place
        sigma = transformer_options.get("sigmas", self._sigma)
        if sigma is None:
            return None
        sigma = sigma.flatten()[0].item()
        if not self._is_begun and sigma != self._seen:
            self._told = None
            self._begin(None)
        position = self._position(sigma)
        self._step = self.schedule.step_at(position)
        self._seen, self._place = sigma, (self._step, position)
        return self._place

    def _follow(self, told):
        """Take over what an IEC sampler tells. Its steps' numbers are of its own sigmas, which are others than the run's where
        a sampler such as dpm_fast spaces its steps itself.
        """
        self._is_told, self._own = True, told["step"]
        if told["sigmas"] != self.schedule.sigmas:
            self.schedule = Schedule(told["sigmas"])
        if not self._is_begun and told != self._told:
            self._seen = None
            self._begin(None)
        self._told = told

    def _position(self, sigma):
        schedule, following = self.schedule, self._own + 1
        is_plain = self._picks_its_steps or (schedule.is_one_way and self._is_honest)
        if is_plain and (self._picks_its_steps or schedule.has(sigma)):
            return schedule.position(sigma)
        if not self._is_told and self._since == (1 if self._own < 0 else self._usual):
            self._ends_there = self._seen == sigma
            return float(following)
        position = schedule.position(sigma) if is_plain else self._position_by_order(sigma / self._shown)
        if self._is_told or self._own < 0 or self._usual is not None:
            return position
        is_next = position >= following + 1 if is_plain else position > following - 0.2
        return float(following) if is_next and not schedule.has(sigma) else position

    def _position_by_order(self, sigma):
        """Return the position of a further evaluation of the step, or, with a sampler that does not call back, of the next."""
        if self._ends_there:
            return float(self._own + 1)
        return self.schedule.position_near(sigma, self._own if self._own >= 0 else self._step)


def follow_steps(model):
    """Have the runs of a MODEL keep their RunSteps in `transformer_options[KEY]`."""
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _sampler_sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)


def _sampler_sample(executor, guider, sigmas, extra_args, callback, *args, **kwargs):
    name = sampler_name(getattr(executor.class_obj, "sampler_function", None))
    steps = RunSteps(sigmas, name in PICK_THEIR_OWN)
    extra_args["model_options"]["transformer_options"][KEY] = steps

    def called_back(step, *more):
        steps.called_back(step)
        if callback is not None:
            callback(step, *more)

    return executor(guider, sigmas, extra_args, called_back, *args, **kwargs)


def _predict_noise(executor, x, timestep, model_options=None, *args, **kwargs):
    steps = (model_options or {}).get("transformer_options", {}).get(KEY)
    if steps is not None:
        steps.begin(x, timestep)
    return executor(x, timestep, model_options, *args, **kwargs)
