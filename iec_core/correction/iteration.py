"""Iterative Error Correction as a wrapper around a denoiser.

The paper (arXiv 2511.06250, section 3.2) turns a DDIM step x' = A_t x + B_t eps(x, t) into the damped iteration

    x'_{k+1} = (1 - lam) x'_k + lam (A_t x + B_t eps(x'_k, t)).

In k-diffusion coordinates a sampler's step is affine in the denoised prediction D that it is taken with,

    x' = a x + b D + noise,        Euler: a = sigma' / sigma, b = 1 - a, no noise,

so that iterating on x' is iterating on D, and the sampler can be left as it is: it is handed the D that belongs to the
corrected x'. The map whose fixed point is sought is, with eps = (x - D) / sigma,

    G(D) = x - sigma eps_k,        eps_k = (x_in - D(x_in, place)) / place,        x_in from x' = a x + b D + noise.

The noise of a stochastic step is one draw, the same in every iterate.

Where x'_k is evaluated is the `evaluation_point`:

- `paper`: at the step's own timestep. The network has to see x'_k in its own input coordinates,
  c_in(sigma) x_in = c_in(sigma') x'_k, while its timestep stays that of sigma.
- `next`: at the timestep that x'_k belongs to, sigma', unscaled. With lam = 1/2 and K = 1 that is Heun's method, the
  trapezoidal rule with an explicit predictor, of second order in the step. Where sigma' = 0 there is nothing to evaluate.
- `ahead`: as `next`, and the prediction at the last x'_k is then the next step's own, in place of one at the corrected x'. A
  step so has one evaluation, as without a correction: predict, evaluate, correct, the PEC mode of an Adams-Moulton method
  (Lambert, Numerical Methods for Ordinary Differential Systems, 1991, section 4.3). It is the prediction that is kept; its
  eps, taken from the corrected x', is another one. In a step with noise G(D) = D(x'_k, sigma'), the mean of two predictions at
  lambda = 1/2: eps_k has the step's fresh noise in it, of which the average would take away a part.
"""

import math
import re
from dataclasses import dataclass, field, replace

import torch

from ..choices import unknown_choice
from ..vectors import dots, norms, widened
from .correction_steps import CorrectionSteps, parse_correction_steps

EVALUATION_POINTS = ("paper", "next", "ahead")
LAMBDA_MODES = ("fixed", "contractive", "anderson")


def parse_lambdas(text):
    """Return the dampings of a `lambdas` text, one a step, as a tuple; () of an empty one, which leaves them to lambda_. Raises
    ValueError, with a sentence, for anything else.
    """
    parts = re.split(r"\s*,\s*", text.strip()) if text.strip() else []
    lambdas = []
    for step, part in enumerate(parts):
        try:
            lambdas.append(float(part))
        except ValueError:
            raise ValueError(
                f"lambdas: '{part}' of step {step} is no number; write one for each step, such as 0.5, 0.5, 0.4, or nothing."
            ) from None
        if not 0 < lambdas[-1] <= 1:
            raise ValueError(f"lambdas: {part} of step {step} is outside (0, 1]; the paper uses 0.5.")
    return tuple(lambdas)


@dataclass(frozen=True)
class CorrectionSettings:
    """The method's parameters; the defaults are the paper's.

    steps: which steps are corrected. lambda_: damping, in (0, 1]. max_iterations: K, 0 turns the correction off.
    tolerance: tau, the relative change of x' below which an item of the batch is taken as converged. evaluation_point:
    one of EVALUATION_POINTS, see above. lambda_mode: "fixed"; "contractive", in which lambda_ is the largest damping and each
    iteration takes what its own residuals allow (`contractive_lambda`); "anderson", acceleration of depth 1 from the second
    iteration on (`anderson_lambda`). lambdas: lambda_ of each step of the run, where there are any.
    """

    steps: CorrectionSteps
    lambda_: float = 0.5
    max_iterations: int = 1
    tolerance: float = 1e-5
    evaluation_point: str = "paper"
    lambda_mode: str = "fixed"
    lambdas: tuple[float, ...] = ()

    @classmethod
    def parse(
        cls, correction_steps="all", lambda_=0.5, max_iterations=1, tolerance=1e-5, evaluation_point="paper",
        lambda_mode="fixed", lambdas="",
    ):  # fmt: skip
        """Check the values as a user gives them. Raises ValueError with a sentence that names the input."""
        if not 0 < lambda_ <= 1:
            raise ValueError(f"lambda_: {lambda_} is outside (0, 1]; the paper uses 0.5.")
        if max_iterations < 0:
            raise ValueError(f"max_iterations: {max_iterations} is negative; 0 turns the correction off.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance: {tolerance} is not a number of at least 0; the paper uses 1e-5.")
        wrong = unknown_choice(EVALUATION_POINTS, evaluation_point=evaluation_point)
        wrong = wrong or unknown_choice(LAMBDA_MODES, lambda_mode=lambda_mode)
        if wrong:
            raise ValueError(wrong)
        steps = parse_correction_steps(correction_steps)
        return cls(steps, lambda_, max_iterations, tolerance, evaluation_point, lambda_mode, parse_lambdas(lambdas))

    def check_lambdas(self, total):
        """Raise ValueError where `lambdas` are not as many as a run has steps."""
        if self.lambdas and len(self.lambdas) != total:
            raise ValueError(
                f"lambdas: the number of values is {len(self.lambdas)} and the run has {total} steps; write one for each step, "
                "or nothing."
            )

    def at(self, step):
        """Return the settings with the lambda_ of a step."""
        return replace(self, lambda_=self.lambdas[step], lambdas=()) if self.lambdas else self

    @property
    def is_auto(self):
        """Whether the steps and the evaluation point are chosen for each run."""
        return self.steps.kind == "auto" and self.max_iterations > 0

    def with_choice(self, choice):
        """Return the settings with an `automatic.Choice`."""
        return replace(self, steps=choice.steps, evaluation_point=choice.evaluation_point or self.evaluation_point)

    @property
    def is_off(self):
        """Whether no step can be corrected."""
        return self.steps.kind == "none" or self.max_iterations == 0

    def summary(self):
        """Return what tells runs apart in a table: the steps, and what is not the paper's."""
        if self.is_off:
            return "none"
        paper = CorrectionSettings(self.steps)
        words = [self.steps.text]
        words += [self.evaluation_point] if self.evaluation_point != paper.evaluation_point and not self.is_auto else []
        words += [self.lambda_mode] if self.lambda_mode != paper.lambda_mode else []
        words += [f"lambda {self.lambda_:g}"] if self.lambda_ != paper.lambda_ and not self.lambdas else []
        words += ["lambdas"] if self.lambdas else []
        words += [f"K {self.max_iterations}"] if self.max_iterations != paper.max_iterations else []
        return " ".join(words)

    def corrected_steps(self, sigmas, full=None, known_ends=frozenset()):
        """Return the frozenset of the steps that are corrected over a schedule of n + 1 sigmas (floats); full: the steps that
        a cache evaluates in full, None without a cache. known_ends: the steps at whose result, known beforehand, the sampler
        evaluates next; no others are corrected `ahead`. Raises ValueError where the settings are of another number of steps.
        """
        self.check_lambdas(len(sigmas) - 1)
        if self.max_iterations == 0:
            return frozenset()
        steps = self.steps.of(len(sigmas) - 1, full)
        if self.evaluation_point == "next":
            steps = frozenset(step for step in steps if sigmas[step + 1] > 0)
        if self.evaluation_point == "ahead":
            steps &= known_ends
        return steps

    @property
    def is_ahead(self):
        """Whether a corrected step's first evaluation is the next step's own."""
        return self.evaluation_point == "ahead" and self.max_iterations > 0

    @property
    def added_evaluations(self):
        """The evaluations, at most, that a corrected step adds to the run."""
        return self.max_iterations - self.is_ahead

    def step_of(self, step):
        """Return the number of the step whose evaluations the corrections of a step are."""
        return step + self.is_ahead


@dataclass(frozen=True)
class Step:
    """One step of a sampler, x' = x_factor * x + denoised_factor * D + noise, from sigma to sigma_next (floats).

    input_scale: c_in(sigma_next) / c_in(sigma), which brings x' to the network's input coordinates at sigma.
    """

    sigma: float
    sigma_next: float
    x_factor: float
    denoised_factor: float
    input_scale: float = 1.0

    @classmethod
    def euler(cls, sigma, sigma_next, input_scale=1.0):
        """Return the Euler step of the probability-flow equation: DDIM's."""
        return cls(sigma, sigma_next, sigma_next / sigma, 1 - sigma_next / sigma, input_scale)

    @property
    def is_ancestral(self):
        """Whether this is the mean of the step of the model's own stochastic equation for the prediction: DDPM's posterior."""
        share = (self.sigma_next / self.sigma) ** 2
        return all(math.isclose(*pair, abs_tol=1e-4) for pair in ((self.x_factor, share), (self.denoised_factor, 1 - share)))

    @property
    def is_euler(self):
        """Whether this is the step that `euler` returns."""
        return self == Step.euler(self.sigma, self.sigma_next, self.input_scale)


@dataclass
class StepTrace:
    """What the iteration of one corrected step did: for each iteration a tensor [B], left on the device.

    residuals: ||T(x'_k) - x'_k|| / ||x'_k||, for T(y) the step's result with the prediction at y. contraction: how much the
    damped map (1 - lam) I + lam T shrank the last move of the iterate, an estimate from below of its Lipschitz constant; the
    first takes the latent that the step starts from for x'_{-1}. NaN where an item was not iterated on, or did not move.
    lambdas: the damping that was used, 0 where an item was not moved. fell_back: bool [B], items whose residual grew or was not
    finite, and which kept their best iterate.
    """

    residuals: list[torch.Tensor] = field(default_factory=list)
    contraction: list[torch.Tensor] = field(default_factory=list)
    lambdas: list[torch.Tensor] = field(default_factory=list)
    fell_back: torch.Tensor | None = None


def _per_item(value, like):
    """Reshape a [B] tensor so that it broadcasts over `like` [B, ...], whose dtype a factor has to leave as it is."""
    value = value if value.dtype == torch.bool else value.to(like)
    return value.reshape(-1, *[1] * (like.ndim - 1))


def contractive_lambda(slope, lipschitz, largest):
    """Return the damping [B], at most `largest`, that contracts the most along the direction u last measured.

    For J the Jacobian of T, ||((1 - lam) I + lam J) u||^2 = 1 - 2 lam (1 - s) + lam^2 (1 - 2 s + L^2), where s = <u, J u> is
    the slope and L = ||J u||: least at `_least_lambda`, and below 1 for every smaller lam. With s >= 1 no positive damping
    contracts, and 0 is returned.
    """
    best = _least_lambda(slope, lipschitz)
    return torch.where(slope < 1, best, 0).clamp(max=largest)  # NaN slopes, of an item that did not move, get 0 too


def anderson_lambda(slope, lipschitz, largest):
    """Return the damping [B] with which x' + lam (T(x') - x') is a step of Anderson acceleration of depth 1; `largest` for an
    item that did not move.

    Depth 1 mixes the last two points and residuals r by the gamma that makes ||r - gamma (r - r_last)|| least, and moves on
    from the mixture by a factor beta of its residual. With beta = lam_last, the damping of the last move lam_last r_last, the
    old point drops out: what is left is r times lam_last (1 - gamma), Aitken's dynamic relaxation (Irons and Tuck 1969).
    That is the least of `contractive_lambda`'s quadratic, unbounded. Nothing but the last move need be kept for it.
    """
    best = _least_lambda(slope, lipschitz)
    return torch.where(best.isfinite(), best, largest)


def _least_lambda(slope, lipschitz):
    return (1 - slope) / (1 - 2 * slope + lipschitz**2)


def damped_contraction(slope, lipschitz, lambda_):
    """Return ||((1 - lam) I + lam J) u|| [B] for a unit vector u with <u, J u> = slope and ||J u|| = lipschitz."""
    square = 1 - 2 * lambda_ * (1 - slope) + lambda_**2 * (1 - 2 * slope + lipschitz**2)
    return square.clamp(min=0).sqrt()


class _Iteration:
    """The iterate D_k of one step's fixed-point iteration, and how it moves. All state is per item of the batch, [B].

    kept: the iterate that an active item falls back to, D_{k-1}, and that an item which is no longer active ends with.
    """

    def __init__(self, denoised, settings):
        self.kept = denoised
        self._settings = settings
        self._active = torch.ones(denoised.shape[0], dtype=torch.bool, device=denoised.device)
        self._norm = self._last_lambda = None  # of the last iteration
        self.trace = StepTrace(fell_back=torch.zeros_like(self._active))

    def among_active(self, denoised):
        """Return D_k from what is `denoised` for the active items."""
        return torch.where(_per_item(self._active, denoised), denoised, self.kept)

    def last_prediction(self, prediction, before):
        """Return the network's prediction at the last iterate that was not left for a better one, from that at D_k and those
        `before` it, None at D_0.
        """
        return prediction if before is None else torch.where(_per_item(self._active, prediction), prediction, before)

    def advance(self, denoised, residual, moved, rounding, relative):
        """Move on from D_k, `denoised`, by its residual G(D_k) - D_k, and return D_{k+1}.

        moved: how the iterate came to D_k from where the network was evaluated before. rounding: [B], a norm of the residual
        that is none. relative: [B], what makes a change of D relative to x'.
        """
        is_first = self._norm is None
        moved_norm, norm = norms(moved), norms(residual)
        moved = widened(moved)
        image = residual if is_first else moved + residual - moved / _per_item(self._last_lambda, moved)  # G(D_k) - G(D_{k-1})
        lipschitz, slope = norms(image) / moved_norm, dots(image, moved) / moved_norm**2
        del image
        lambda_ = self._lambda(slope, lipschitz, is_first)
        contraction = damped_contraction(slope, lipschitz, lambda_).where(self._active, torch.nan)
        shrinks = ~(contraction > 1) if is_first else norm <= self._norm  # before the second, the estimate is all there is
        fails = self._active & ~(norm.isfinite() & (shrinks | (norm <= rounding)))
        self.trace.fell_back |= fails
        self._active = self._active & ~fails
        self.trace.residuals.append(norm * relative)
        self.trace.contraction.append(contraction)
        self.trace.lambdas.append(self._active * lambda_)
        self._norm, self._last_lambda = norm, lambda_
        return self.among_active(denoised + _per_item(lambda_, residual) * residual)

    def _lambda(self, slope, lipschitz, is_first):
        """Return the damping [B]."""
        largest, mode = self._settings.lambda_, self._settings.lambda_mode
        if mode == "contractive":
            return contractive_lambda(slope, lipschitz, largest)
        if mode == "anderson" and not is_first:
            return anderson_lambda(slope, lipschitz, largest)
        return torch.full_like(slope, largest)

    def settle(self, denoised, advanced, relative):
        """Keep D_k, `denoised`, for the items that go on to D_{k+1}, `advanced`, and D_{k+1} for those that did not move, or by
        less than the tolerance; return whether any goes on.
        """
        change = norms(advanced - denoised) * relative
        self._active = self._active & (change > 0) & (change >= self._settings.tolerance)
        self.kept = torch.where(_per_item(self._active, denoised), denoised, advanced)
        return bool(self._active.any())


class _Place:
    """Where a step's prediction D is tried: x_in = scale (a x + b D + noise), and back."""

    def __init__(self, x, step, settings, noise):
        self._x, self._step, self._noise = x, step, noise
        is_own = settings.evaluation_point == "paper"
        self.sigma = step.sigma if is_own else step.sigma_next
        self.scale = step.input_scale if is_own else 1.0
        self._is_mean_of_predictions = settings.evaluation_point == "ahead" and noise is not None
        # What is evaluated ahead stands for an evaluation of the sampler's own, at the latent that its arithmetic gives.
        self._is_sampler_euler = settings.evaluation_point == "ahead" and noise is None and step.is_euler

    def _start(self):
        start = self._step.x_factor * self._x
        return start if self._noise is None else start + self._noise()

    def of(self, denoised):
        """Return x_in [B, ...]."""
        if self._is_sampler_euler:
            sigma = self._x.new_full((), self._step.sigma)  # a GPU would multiply by a number's reciprocal
            return self._x + (self._x - denoised) / sigma * (self._step.sigma_next - self._step.sigma)
        return torch.add(self._start(), denoised, alpha=self._step.denoised_factor).mul_(self.scale)

    def denoised(self, x_in):
        """Return the D that x_in belongs to. The step with it ends where x_in says, to the rounding of x_in."""
        return (x_in / self.scale - self._start()).div_(self._step.denoised_factor)

    def target(self, x_in, denoised):
        """Return G(D), for the prediction `denoised` at x_in."""
        if self._is_mean_of_predictions:
            return denoised
        return self._x - (x_in - denoised) * (self._step.sigma / self.sigma)


def corrected_denoised(evaluate, x, step, settings, noise=None, mask=None, keep=None):
    """Return (denoised [B, ...], StepTrace) with which the sampler's step is the IEC step.

    evaluate(x_in, sigma, iteration): the denoised prediction at x_in and the timestep of that sigma (a float); iteration 0
    is the sampler's own evaluation, k the k-th correction. x: latent at step.sigma [B, ...]. noise(): the noise term of the
    step, each time the same; None for a deterministic step. mask(): [B, ...], in [0, 1], by how much each number is to be
    corrected, each time the same; None for all. keep(prediction): takes, at the end, the network's last prediction [B, ...], of
    an item that fell back that at the iterate which it ends at; for `ahead`, whose next step has it for its own.

    Items of a batch converge, and fall back, one by one, each as if it were alone. An iterate is judged by its residual; the
    last update, which is not evaluated again, is not judged. Nothing is read back from the device at K = 1, and one flag an
    iteration at K >= 2. While the network is evaluated, two latents are held beside x: its input, and at the first
    iteration D_0, afterwards D_{k-1}, by which the best iterate is kept. D_k is had from the input, for which `noise` and
    `mask` are asked again.
    """
    denoised = evaluate(x, step.sigma, 0)
    if settings.max_iterations == 0:
        return denoised, StepTrace()
    place = _Place(x, step, settings, noise)
    reach = place.scale * step.denoised_factor  # by how much x_in moves with D
    x_in = place.of(denoised)
    iteration = _Iteration(denoised, settings)
    rounding = norms(x) * (10 * torch.finfo(x.dtype).eps) / min(1.0, abs(reach))
    kept = None
    del denoised
    for number in range(1, settings.max_iterations + 1):
        prediction = evaluate(x_in, place.sigma, number)
        target = place.target(x_in, prediction)
        inside = None if mask is None else mask()
        if number == 1:
            denoised, moved = iteration.kept, widened(x_in - x) / reach
        else:
            denoised = iteration.among_active(place.denoised(x_in))
            if mask is not None:
                denoised = torch.where(inside > 0, denoised, iteration.kept)
            moved = denoised - iteration.kept
        residual = target - denoised
        if mask is not None:
            residual, moved = residual * inside, moved * (inside > 0)
        relative = abs(reach) / norms(x_in)
        advanced = iteration.advance(denoised, residual, moved, rounding, relative)
        if keep is not None:
            kept = iteration.last_prediction(prediction, kept)
        del prediction, target, residual, moved, inside
        is_last = number == settings.max_iterations or reach == 0  # with no reach every D leads to the same x_in
        if is_last or not iteration.settle(denoised, advanced, relative):
            if keep is not None:
                keep(kept)
            return advanced, iteration.trace
        x_in = x_in + reach * (advanced - denoised)
        del denoised, advanced
