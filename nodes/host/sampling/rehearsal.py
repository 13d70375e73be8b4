"""Learn what a sampler function of the host will do over a schedule, by a rehearsal: one run of it on scalar numbers.

For every evaluation a correction must know which step it belongs to, whether the step uses its prediction, and where the step
leads. The samplers do not tell this, and reading a sigma back from the device at every evaluation would stall it. So the
sampler function is rehearsed on the CPU before the run, with a stand-in for the network. A sampler's step is affine in its
latent, its predictions and its noise. A rehearsal batch of unit vectors shows the coefficients, one per item:

    item 0: latent 1, predictions 0, noise 0
    item 1: latent 0, predictions 1, noise 0        history and further evaluations of a step count as the step's own
    item 2 + m: latent 0, predictions 0, draws m, m + n, m + 2 n, ... are 1; no step draws more than n times
    last item but one: latent 0, every other prediction 1, noise 0: shows the effect of one prediction without history
    last item: three times all of them together; an affine sampler maps it to three times the sum of their results

The draws of a step are read from x' - a x, which removes earlier noise, so one item can serve the draws of several steps.
"""

import functools
import inspect
import itertools
import math
import threading
import weakref
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ....iec_core.correction.iteration import Step
from .noise import can_draw_ahead, is_of_the_host
from .run_plan import RunPlan
from .stock_samplers import MORE_THAN_ONCE, WITH_HISTORY, evaluations_of

MOST_KEPT = 16  # the most rehearsals kept for a sampler function and a model's noise levels
STOCK_DRAWS = 4  # the most draws in a step of any sampler of the host


class CannotRehearse(ValueError):
    """The sampler's steps cannot be known before it runs."""


class BadSchedule(CannotRehearse):
    """The steps cannot be known because of the schedule, whatever the sampler."""


class AppliedTwice(ValueError):
    """The rehearsed sampler already corrects its steps."""


@dataclass(frozen=True)
class Draw:
    """A draw of noise: its number in the run, the two sigmas passed to the noise sampler, and its factor in the step."""

    number: int
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    factor: float


@dataclass(frozen=True)
class RehearsedStep:
    """A step and the draws of noise that enter its result.

    gain: the factor by which the step multiplies a change of its own prediction, relative to a step without history: for
    dpmpp_2m 1 + h / (2 h_last), about that for a longer history, and 1 for a sampler with several evaluations per step.
    is_exact: whether `step` and `draws`, with only this step's prediction, give the sampler's own latent after the step.
    evaluated_at: the sigma that the network gets. It differs from the latent's sigma if a sampler passes a wrong one on
    purpose, as Detail Daemon does. evaluated_next: the sigma that the network would get at the step's result.
    """

    step: Step
    draws: tuple[Draw, ...] = ()
    gain: float = 1.0
    is_exact: bool = False
    evaluated_at: float = 0.0
    evaluated_next: float = 0.0


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

    steps: the steps of the run. evaluations: for each evaluation of the denoiser, in order, (number of its step, whether the
    step uses its prediction). levels: the sigma that the denoiser gets in each evaluation.
    """

    steps: list[RehearsedStep]
    evaluations: list[tuple[int, bool]]
    levels: list[float]

    def plan(self):
        """Return the RunPlan for a run that goes like the rehearsal."""
        return RunPlan(self.sigmas, self.evaluations, self.why_no_end_is_known(), self)

    @property
    def sigmas(self):
        """The sigmas at which the steps begin, and the end of the last step: n + 1 floats."""
        return [rehearsed.step.sigma for rehearsed in self.steps] + [self.steps[-1].step.sigma_next]

    @property
    def known_ends(self):
        """The frozenset of steps whose result follows from their prediction and is where the sampler evaluates next."""
        return frozenset() if self.why_no_end_is_known() else self._ends_at_a_begin()

    def _ends_at_a_begin(self):
        pairs = enumerate(itertools.pairwise(self.steps))
        return frozenset(
            index for index, (one, then) in pairs if math.isclose(one.step.sigma_next, then.evaluated_at, rel_tol=1e-6)
        )

    @property
    def evaluates_more_than_once(self):
        """Whether any step takes several evaluations."""
        return len(self.evaluations) > len(self.steps)

    @property
    def has_history(self):
        """Whether any step also uses earlier predictions."""
        return any(abs(rehearsed.gain - 1) > 1e-3 for rehearsed in self.steps)

    @property
    def noise(self):
        """The noise that steps add: "" none, "ancestral" that of the model's own stochastic equation, "other" any other."""
        noisy = [rehearsed.step.is_ancestral for rehearsed in self.steps if rehearsed.draws]
        return "" if not noisy else "ancestral" if all(noisy) else "other"

    def why_no_end_is_known(self):
        """Return why no step's end is known in advance, as a phrase after the sampler's name; None if some ends are known."""
        if self.evaluates_more_than_once:
            return MORE_THAN_ONCE
        if len(self.steps) > 1 and not self._ends_at_a_begin():
            return "does not evaluate at the sigmas that its steps lead to"
        if self.has_history:
            return WITH_HISTORY
        if not all(rehearsed.is_exact for rehearsed in self.steps[:-1]):
            return "takes steps, or adds noise, that one prediction does not determine"
        return None


@dataclass
class _Record:
    """What happened in a rehearsal, in order. Latents are numbers, [items] in float64.

    final: the sampler's result. draws_by_itself: whether the sampler drew noise without the noise sampler.
    """

    evaluations: list[tuple[float, torch.Tensor]] = field(default_factory=list)  # sigma, latent
    callbacks: list[tuple[int, int]] = field(default_factory=list)  # step, evaluations before
    draws: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)  # evaluations before, sigmas
    final: torch.Tensor | None = None
    draws_by_itself: bool = False

    def pattern(self):
        """Return what must be equal in all runs of a sampler whose steps do not depend on its latent."""
        draws = [(before, float(sigma), float(sigma_next)) for before, sigma, sigma_next in self.draws]
        return [sigma for sigma, _ in self.evaluations], self.callbacks, draws


class _StandIn:
    """Replaces the host's denoiser. Attributes that samplers read are those of the denoiser."""

    def __init__(self, model, record, predict, patches, look):
        self._model = model
        self._record = record
        self._predict = predict
        self._patches = patches
        self._look = look

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, model_options=None, **_):
        if _guidance_patches(model_options) != self._patches:
            raise CannotRehearse("it uses the unguided prediction of its last evaluation")
        self._look()
        self._record.evaluations.append((float(sigma.flatten()[0]), _numbers(x)))
        return self._predict(x, len(self._record.evaluations) - 1)


def _guidance_patches(model_options):
    """Return the number of functions that get the conditional and the unconditional prediction after guidance.

    A sampler that adds one (sampler_post_cfg_function) uses such a prediction.
    """
    return len((model_options or {}).get("sampler_post_cfg_function", []))


def _numbers(x):
    return x.detach().flatten(1)[:, 0].double()


def _spread(numbers, x):
    """Expand numbers [items] to the shape and dtype of x [items, ...]."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x).to(x, copy=True)


class _OwnDraws(TorchDispatchMode):
    """A mode in which a sampler's own random draws use a private generator.

    The global generator may be in use by a run in another thread, whose images must not depend on the rehearsal. is_silent:
    return zeros instead, to show what the sampler does without its noise. happened: whether there were such draws.
    """

    def __init__(self, is_silent):
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)
        self._is_silent = is_silent
        self.happened = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        self.happened = True
        if kwargs.get("generator") is None:
            takers = {"default": "generator", "low": "low_generator"}  # overloads that differ only in the generator argument
            if not any(argument.name == "generator" for argument in function._schema.arguments):
                function = getattr(function.overloadpacket, takers[function._overloadname])
            kwargs = {**kwargs, "generator": self._generator}
        drawn = function(*args, **kwargs)
        if self._is_silent and torch.is_tensor(drawn) and drawn.is_floating_point():
            drawn.zero_()
        return drawn


def _play(function, model, like, sigmas, extra_args, options, look, latent, predict, noise, is_silent):
    """Run the sampler function on a batch of numbers, and return the _Record.

    latent: [items]. predict(x, number): returns the denoised prediction at x in the evaluation with this number. noise(number):
    returns [items] for the draw with this number. like: the run's latent, for its dimensions and dtype. look(): called in every
    evaluation. is_silent: whether the sampler's own draws are 0.
    """
    record = _Record()

    def on_step(info):
        record.callbacks.append((info["i"], len(record.evaluations)))

    def draw(sigma, sigma_next):
        record.draws.append((len(record.evaluations), torch.as_tensor(sigma), torch.as_tensor(sigma_next)))
        return _spread(noise(len(record.draws) - 1), x)

    size = (len(latent), *[min(length, 2) for length in like.shape[1:]])
    x = _spread(latent, torch.empty(size, dtype=torch.promote_types(like.dtype, torch.float32)))
    if "noise_sampler" in inspect.signature(function).parameters:
        options = {**options, "noise_sampler": draw}
    with _OwnDraws(is_silent) as own:
        final = function(
            _StandIn(model, record, predict, _guidance_patches(extra_args.get("model_options")), look), x, sigmas.clone(),
            extra_args=dict(extra_args), callback=on_step, disable=True, **options,
        )  # fmt: skip
    record.final, record.draws_by_itself = _numbers(final), own.happened
    return record


def _own_evaluations(record, begins):
    """Return for each step the number of its own evaluation: the one whose prediction the step uses.

    A sampler calls back right after the first evaluation of a step, which is usually the step's own. If further evaluations at
    the same sigma follow (predict, evaluate, correct, evaluate), the last of them is the step's own.
    """
    own = []
    for number, end in zip(begins, [*begins[1:], len(record.evaluations)]):
        while number + 1 < end and record.evaluations[number + 1][0] == record.evaluations[number][0]:
            number += 1
        own.append(number)
    return own


def _factors(record, own, index):
    """Return (a, b, [(draw, factor)], gain, is_affine) of a step x' = a x + b D + sum of factor * noise.

    is_affine: whether the step has this form.
    """
    x = record.evaluations[own[index]][1]
    is_last = index + 1 == len(own)
    x_next = record.final if is_last else record.evaluations[own[index + 1]][1]
    a = (x_next[0] / x[0]).item() if x[0] != 0 else 0.0
    within = range(own[index] + 1, len(record.evaluations) + 1 if is_last else own[index + 1] + 1)
    draws = [number for number, (before, *_) in enumerate(record.draws) if before in within]
    moved = x_next - a * x
    is_affine = math.isclose(moved[-1], 3 * moved[:-1].sum(), rel_tol=1e-4, abs_tol=1e-4)
    b, alone = moved[1].item(), moved[-2].item()
    shows_history = is_affine and len(own) == len(record.evaluations)
    gain = (1 - alone / b if index % 2 else alone / b) if b and shows_history else 1.0
    noises = len(x) - 4
    return a, b, [(number, moved[2 + number % noises].item()) for number in draws], gain, is_affine


def _are_close(values, others):
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) for one, other in zip(values, others))


def _leads(a, b, sigma, sigma_next):
    """Return whether x' = a x + b D is the Euler step between these sigmas."""
    euler = Step.euler(sigma, sigma_next)
    return _are_close((a, b), (euler.x_factor, euler.denoised_factor))


def _preserves_the_image(a, b, sigma, sigma_next):
    """Return whether x' = a x + b D maps D + sigma noise to D + sigma' noise, or (1 - sigma) D + ... to (1 - sigma') D + ...

    It does not if a sampler adds its own noise before it evaluates, because the rehearsed numbers then contain that noise.
    """
    return math.isclose(a + b, 1, abs_tol=1e-4) or math.isclose((1 - sigma) * a + b, 1 - sigma_next, abs_tol=1e-4)


def _step(record, own, index, starts, schedule, sampling, can_draw):
    """Return the RehearsedStep with the number `index`.

    starts: the sigmas at which the steps are evaluated. schedule: the run's sigmas if the sampler takes one step from each
    sigma to the next, else None. sampling: the host's model sampling.
    """
    a, b, factors, gain, is_affine = _factors(record, own, index)
    sigma, then = starts[index], starts[index + 1] if index + 1 < len(starts) else None
    sigma_next = schedule[index + 1] if schedule else a * sigma if then is None else then
    is_noisy = any(factor for _, factor in factors)

    def scale(here, there):
        return input_scale(sampling, there) / input_scale(sampling, here)

    if factors and can_draw and is_affine and _preserves_the_image(a, b, sigma, sigma_next):
        draws = tuple(Draw(number, *record.draws[number][1:], factor) for number, factor in factors if factor)
        step = Step(sigma, sigma_next, a, b, scale(sigma, sigma_next))
        return RehearsedStep(step, draws, gain, True, sigma, sigma_next)
    is_plain = is_affine and not is_noisy and not record.draws_by_itself
    lies = schedule is not None and not math.isclose(sigma, schedule[index], rel_tol=1e-3)
    if lies and is_plain and _leads(a, b, schedule[index], sigma_next):
        at_next = sigma_next if then is None else then
        step = Step.euler(schedule[index], sigma_next, scale(sigma, at_next))
        return RehearsedStep(step, (), gain, True, sigma, at_next)
    is_euler = _leads(a, b, sigma, sigma_next)
    has_one_prediction = len(own) == len(record.evaluations) and math.isclose(gain, 1, abs_tol=1e-3)
    if is_plain and not is_euler and has_one_prediction and b:
        return RehearsedStep(Step(sigma, sigma_next, a, b, scale(sigma, sigma_next)), (), gain, False, sigma, sigma_next)
    if lies and not is_euler:
        raise CannotRehearse("it evaluates latents at noise levels other than their own")
    step = Step.euler(sigma, sigma_next, scale(sigma, sigma_next))
    return RehearsedStep(step, (), gain, is_plain and is_euler, sigma, sigma_next)


def check_schedule(sigmas):
    """Raise BadSchedule for sigmas that no sampler can follow: they are not finite, or continue after 0."""
    sigmas = sigmas.tolist()
    if not all(map(math.isfinite, sigmas)):
        raise BadSchedule("the schedule contains NaN or infinity")
    if 0 in sigmas[:-1]:
        step = sigmas.index(0)
        raise BadSchedule(f"the schedule continues after its first 0, in step {step}, numbered from 0, where no noise is left")


def _nothing():
    pass


def rehearse(function, model, like, sigmas, extra_args, options, can_draw, look=_nothing):
    """Return the Rehearsal of a sampler function of the host over `sigmas` (n + 1, on the CPU).

    model: the host's denoiser, which is not evaluated. like: the latent of the run. extra_args, options: as the host passes
    them to the function. can_draw: whether the run can draw a step's noise ahead. look(): called in every evaluation; if it
    raises the host's InterruptProcessingException, that exception is passed on.

    A step whose noise cannot be drawn ahead is treated as a first-order (Euler) step of the probability-flow equation. A
    deterministic step is treated in the same way, unless its own prediction alone determines it and its coefficients are not
    Euler's.

    Raises CannotRehearse if the function fails on the stand-in, chooses its steps by its latent, or does not take them one
    after the other; BadSchedule if no sampler can take these steps.
    """
    check_schedule(sigmas)
    try:
        sampling = model.inner_model.inner_model.model_sampling
    except AttributeError as error:  # another pack's denoiser around the host's
        raise CannotRehearse("the denoiser that it gets does not expose its model") from error

    def play(latent, predict, noise, is_silent=False):
        try:
            return _play(function, model, like, sigmas, extra_args, options, look, latent, predict, noise, is_silent)
        except (CannotRehearse, AppliedTwice, comfy.model_management.InterruptProcessingException):
            raise
        except Exception as error:
            raise CannotRehearse(f"it fails in a trial run on numbers ({type(error).__name__}: {error})") from error

    first, noises = None, STOCK_DRAWS
    if evaluations_of(function, options, sigmas.tolist()) is None:
        # Nonlinear predictions and a large latent: a sampler that depends on its latent acts differently than on unit vectors.
        first = play(torch.tensor([20.0, -15.0]), lambda x, _: torch.sin(3 * x), lambda _: torch.zeros(2))
        _check_callbacks(first)
        noises = _most_draws(first)
    record = _on_unit_vectors(play, noises)
    if first is not None and record.pattern() != first.pattern():
        raise CannotRehearse("it chooses its steps while it runs")
    _check_callbacks(record)
    begins = [before - 1 for _, before in record.callbacks]
    own = _own_evaluations(record, begins)
    levels = [sigma for sigma, _ in record.evaluations]
    starts = [levels[number] for number in own]
    if 0 in starts:
        raise CannotRehearse("one of its steps begins at sigma 0")
    schedule = sigmas.tolist() if len(own) == len(sigmas) - 1 else None
    steps = [_step(record, own, index, starts, schedule, sampling, can_draw) for index in range(len(own))]
    evaluations = [(max(bisect(begins, number) - 1, 0), number in own) for number in range(len(levels))]
    return Rehearsal(steps, evaluations, levels)


def _on_unit_vectors(play, noises):
    """Return the _Record of a play on unit vectors, for the coefficients. noises: at least as many as a step draws."""
    units = torch.eye(2 + noises, 4 + noises)
    units[:, -1] = 3
    alternating = torch.zeros(units.shape[1])
    alternating[-2:] = torch.tensor([1.0, 3.0])
    return play(
        units[0],
        lambda x, number: _spread(units[1] + (number + 1) % 2 * alternating, x),
        lambda number: units[2 + number % noises],
        is_silent=True,
    )


def _check_callbacks(record):
    if not record.callbacks or [step for step, _ in record.callbacks] != list(range(len(record.callbacks))):
        raise CannotRehearse("it does not take its steps one after the other")
    if record.callbacks[0][1] != 1:
        raise CannotRehearse("it does not report a step right after its first evaluation")


def _most_draws(record):
    """Return the largest number of noise draws in a step, at least 1."""
    own = _own_evaluations(record, [before - 1 for _, before in record.callbacks])
    draws = Counter(bisect(own, before - 1) for before, *_ in record.draws)
    return max(draws.values(), default=1)


_kept = weakref.WeakKeyDictionary()  # {sampler function: {model sampling: {key: Rehearsal}}}
_keeping = threading.Lock()


def rehearsal_of(function, model, like, sigmas, extra_args, options, can_draw, look=_nothing):
    """Return the Rehearsal like `rehearse`, but reuse that of an earlier run if possible.

    The earlier run must have had the same sampler of the host, options, sigmas, noise levels and kind of latent. Rehearsals of
    other packs' functions are not reused, because such a function may act differently in each run.
    """
    kept, key = _kept_for(function, model, like, sigmas, options, can_draw)
    with _keeping:
        found = kept.get(key)
    if found is None:
        found = rehearse(function, model, like, sigmas, extra_args, options, can_draw, look)
        with _keeping:
            kept[key] = found
            while len(kept) > MOST_KEPT:
                del kept[next(iter(kept))]
    return found


def _kept_for(function, model, like, sigmas, options, can_draw):
    """Return ({key: Rehearsal}, key) for a run, ({}, None) if its rehearsal must not be kept."""
    sampling = getattr(getattr(getattr(model, "inner_model", None), "inner_model", None), "model_sampling", None)
    is_plain = all(isinstance(value, (bool, int, float, str, type(None))) for value in options.values())
    if not is_of_the_host(function) or sampling is None or not is_plain:
        return {}, None
    # The host creates the function of dpm_fast again for each run, but the function contains nothing of the run.
    function = function.__code__ if function.__closure__ is None else function
    sides = tuple(min(length, 2) for length in like.shape[1:])
    key = (tuple(sigmas.tolist()), sides, like.dtype, sigmas.dtype, frozenset(options.items()), can_draw)
    with _keeping:
        return _kept.setdefault(function, weakref.WeakKeyDictionary()).setdefault(sampling, {}), key


def input_scale(sampling, sigma):
    """Return the host's c_in(sigma) for any parameterization of the model."""
    return sampling.calculate_input(torch.tensor([sigma], dtype=torch.float64), torch.ones(1, dtype=torch.float64)).item()


class Levels(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """The noise levels of SD 1.5, used for a model that is not loaded yet."""


class FlowLevels(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The noise levels of SD 3 or, with another shift, of other flow models."""

    def __init__(self, shift=3.0):
        super().__init__()
        self.set_parameters(shift=shift)


class FluxLevels(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    """The noise levels of Flux."""


class NoModel:
    """Replaces a MODEL that is not loaded yet, wherever the host and its samplers look up the noise levels."""

    def __init__(self, levels=None):
        self.model_sampling = levels or Levels()
        self.inner_model = self.model_patcher = self

    def get_model_object(self, _):
        return self.model_sampling


def plan_by_name(sampler_name, sigmas, levels=None, may_be_by_table=False):
    """Return the RunPlan of a sampler of the host's list over `sigmas`, a tuple of n + 1 floats.

    levels: the noise levels, by default `Levels`. may_be_by_table: whether a plan by the table is enough for a sampler if the
    table says that no step's end is known. Raises CannotRehearse like `rehearse`.
    """
    if may_be_by_table:
        check_schedule(torch.tensor(sigmas))
        sampler = comfy.samplers.sampler_object(sampler_name)
        plan = RunPlan.of_stock(sampler.sampler_function, sampler.extra_options, list(sigmas))
        if plan is not None and plan.why_no_end:
            return plan
    return rehearse_by_name(sampler_name, sigmas, levels).plan()


@functools.lru_cache(maxsize=64)
def rehearse_by_name(sampler_name, sigmas, levels=None):
    """Return the Rehearsal of a sampler of the host's list over `sigmas`, a tuple of n + 1 floats.

    levels: the noise levels, by default `Levels`. Raises CannotRehearse like `rehearse`.
    """
    sampler, like = comfy.samplers.sampler_object(sampler_name), torch.zeros(1, 1, 1, 1)
    function, options = sampler.sampler_function, sampler.extra_options
    return rehearse(function, NoModel(levels), like, torch.tensor(sigmas), {}, options, can_draw_ahead(function, options))
