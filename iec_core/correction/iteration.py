"""Iterative Error Correction: as the paper has it (`iec_step`), and as a wrapper around a denoiser (`corrected_denoised`).

The paper (arXiv 2511.06250, section 3.2) turns a DDIM step x' = A x + B eps(x, t) into the damped fixed-point iteration

    x'_{k+1} = (1 - lam) x'_k + lam (A x + B eps(x'_k, t)).

A k-diffusion sampler works with the denoised prediction D instead of eps. Its step is affine in D,

    x' = a x + b D + noise,        Euler: a = sigma' / sigma, b = 1 - a, no noise,

so an iteration on x' is an iteration on D. `corrected_denoised` iterates on D and returns the D that leads to the corrected x'.
The sampler uses this D for its own step and needs no change. The iteration searches for the fixed point of the map

    G(D) = x - sigma eps_k,        eps_k = (x_in - D(x_in, place)) / place,        x_in from x' = a x + b D + noise,

in which D(x_in, place) is the network's prediction at x_in and at the noise level `place`. A stochastic step draws its noise
once: every iterate has the same noise.

The `evaluation_point` says where x'_k is evaluated:

- `paper`: at the step's own noise level sigma. The network must see x'_k scaled for the noise level sigma' of x'_k, so
  c_in(sigma) x_in = c_in(sigma') x'_k.
- `next`: at sigma', the noise level of x'_k; x_in is x'_k. With lam = 1/2 and K = 1 this is Heun's method: the trapezoidal rule
  with an explicit predictor, of second order in the step. At sigma' = 0 there is nothing to evaluate.
- `ahead`: as `next`, and the prediction at the last x'_k is reused as the next step's own prediction. So a step costs one
  evaluation, as without correction: predict, evaluate, correct, which is the PEC mode of an Adams-Moulton method (Lambert,
  Numerical Methods for Ordinary Differential Systems, 1991, section 4.3). The denoised prediction is kept, not eps: eps would
  change, because it depends on the corrected x'. In a step with noise the map is G(D) = D(x'_k, sigma'), so at lam = 1/2 and
  K = 1 the corrected D is the mean of two predictions. (eps_k contains the step's fresh noise, and the average would remove a
  part of that noise.)
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..choices import unknown_choice
from ..errors import SettingsError
from ..vectors import dots, norms, widened
from .correction_steps import CorrectionSteps, parse_correction_steps

if TYPE_CHECKING:
    from .automatic import Choice

EVALUATION_POINTS = ("paper", "next", "ahead")
LAMBDA_MODES = ("fixed", "contractive", "anderson")

Latent = Callable[[], torch.Tensor]  # gives a tensor [B, ...], the same one at each call


def iec_step(
    eps: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, a: float, b: float, lambda_: float = 0.5, iterations: int = 1
) -> torch.Tensor:
    """Return x' [B, ...], one step x' = a x + b eps(x) with the paper's correction (arXiv 2511.06250, section 3.2).

    eps: the noise prediction at the step's timestep, from [B, ...] to [B, ...]; it is called 1 + iterations times. x: [B, ...].
    a, b: of DDIM, a = sqrt(abar' / abar) and b = sqrt(1 - abar') - a sqrt(1 - abar), for the cumulative products abar of the
    step's timestep and abar' of the next. lambda_: the damping, in (0, 1]. iterations: K; 0 is the plain step.
    `corrected_denoised` is the general form: other samplers, stopping, fallback, masks.
    """
    x_next = a * x + b * eps(x)
    for _ in range(iterations):
        x_next = (1 - lambda_) * x_next + lambda_ * (a * x + b * eps(x_next))
    return x_next


def parse_lambdas(text: str) -> tuple[float, ...]:
    """Return the dampings of a `lambdas` text, one per step. An empty text gives (): lambda_ then holds for all steps.

    Raises SettingsError if the text is neither empty nor a list of numbers above 0 and at most 1.
    """
    parts = re.split(r"\s*,\s*", text.strip()) if text.strip() else []
    lambdas: list[float] = []
    for step, part in enumerate(parts):
        try:
            lambdas.append(float(part))
        except ValueError:
            raise SettingsError(
                f"lambdas: '{part}' of step {step} is not a number; write one number per step, such as 0.5, 0.5, 0.4, or leave "
                "it empty."
            ) from None
        if not 0 < lambdas[-1] <= 1:
            raise SettingsError(
                f"lambdas: {part} of step {step} is out of range; write one above 0 and at most 1, such as 0.5."
            )
    return tuple(lambdas)


@dataclass(frozen=True)
class CorrectionSettings:
    """The method's parameters; the defaults are the paper's.

    steps: which steps are corrected. lambda_: damping, in (0, 1]. max_iterations: K; 0 turns the correction off.
    tolerance: tau; an item of the batch counts as converged when the relative change of x' is smaller. evaluation_point:
    one of EVALUATION_POINTS (see the module). lambda_mode: "fixed"; "contractive", where each iteration computes its damping
    from its own residuals and lambda_ is the largest one allowed (`contractive_lambda`); "anderson", acceleration of depth 1
    from the second iteration on (`anderson_lambda`). lambdas: one lambda_ per step of the run, or ().
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
        cls,
        correction_steps: str = "all",
        lambda_: float = 0.5,
        max_iterations: int = 1,
        tolerance: float = 1e-5,
        evaluation_point: str = "paper",
        lambda_mode: str = "fixed",
        lambdas: str = "",
    ) -> "CorrectionSettings":
        """Check a user's values. Raises SettingsError with a sentence that names the input."""
        if not 0 < lambda_ <= 1:
            raise SettingsError(f"lambda_: {lambda_} is out of range; write one above 0 and at most 1, such as 0.5.")
        if max_iterations < 0:
            raise SettingsError(f"max_iterations: {max_iterations} is negative; 0 turns the correction off.")
        if not tolerance >= 0:
            raise SettingsError(f"tolerance: {tolerance} is not a number of at least 0; the paper uses 1e-5.")
        wrong = unknown_choice(EVALUATION_POINTS, evaluation_point=evaluation_point)
        wrong = wrong or unknown_choice(LAMBDA_MODES, lambda_mode=lambda_mode)
        if wrong:
            raise SettingsError(wrong)
        steps = parse_correction_steps(correction_steps)
        return cls(steps, lambda_, max_iterations, tolerance, evaluation_point, lambda_mode, parse_lambdas(lambdas))

    def check_lambdas(self, total: int) -> None:
        """Raise SettingsError unless `lambdas` is empty or has one value for each of the run's `total` steps."""
        if self.lambdas and len(self.lambdas) != total:
            raise SettingsError(
                f"lambdas: the number of values is {len(self.lambdas)}, but the run has {total} steps; write one number per "
                "step, or leave it empty."
            )

    def at(self, step: int) -> "CorrectionSettings":
        """Return the settings with the lambda_ of a step."""
        return replace(self, lambda_=self.lambdas[step], lambdas=()) if self.lambdas else self

    @property
    def is_auto(self) -> bool:
        """Whether the steps and the evaluation point are chosen for each run."""
        return self.steps.kind == "auto" and self.max_iterations > 0

    def with_choice(self, choice: "Choice") -> "CorrectionSettings":
        """Return the settings with what `auto` chose for a run."""
        return replace(self, steps=choice.steps, evaluation_point=choice.evaluation_point or self.evaluation_point)

    @property
    def is_off(self) -> bool:
        """Whether no step can be corrected."""
        return self.steps.kind == "none" or self.max_iterations == 0

    def summary(self) -> str:
        """Return a short label of the correction for tables: the steps, and the values that differ from the paper's.

        The label never names the tolerance, and with `auto` it does not name evaluation_point.
        """
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

    def corrected_steps(
        self, sigmas: Sequence[float], full: Collection[int] | None = None, known_ends: frozenset[int] = frozenset()
    ) -> frozenset[int]:
        """Return the numbers of the corrected steps over a schedule of n + 1 sigmas.

        full: the steps that a cache evaluates in full; None without a cache. known_ends: the steps whose result is known
        beforehand and is the place of the sampler's next evaluation; only these can be corrected `ahead`. Raises SettingsError
        where the settings are for another number of steps.
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
    def is_ahead(self) -> bool:
        """Whether a corrected step's first corrective evaluation takes the place of the next step's own evaluation."""
        return self.evaluation_point == "ahead" and self.max_iterations > 0

    @property
    def added_evaluations(self) -> int:
        """The largest number of evaluations that a corrected step adds to the run."""
        return self.max_iterations - self.is_ahead

    def step_of(self, step: int) -> int:
        """Return the number of the step to which a step's corrective evaluations count."""
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
    def euler(cls, sigma: float, sigma_next: float, input_scale: float = 1.0) -> "Step":
        """Return the Euler step of the probability-flow equation, which is DDIM's step."""
        return cls(sigma, sigma_next, sigma_next / sigma, 1 - sigma_next / sigma, input_scale)

    @property
    def is_ancestral(self) -> bool:
        """Whether the step's mean is DDPM's posterior mean: the step of the model's own stochastic equation."""
        share = (self.sigma_next / self.sigma) ** 2
        pairs = ((self.x_factor, share), (self.denoised_factor, 1 - share))
        return all(math.isclose(factor, expected, abs_tol=1e-4) for factor, expected in pairs)

    @property
    def is_euler(self) -> bool:
        """Whether this is the step that `euler` returns."""
        return self == Step.euler(self.sigma, self.sigma_next, self.input_scale)


@dataclass
class StepTrace:
    """What the iteration of one corrected step did: a tensor [B] per iteration, left on the device.

    residuals: ||T(x'_k) - x'_k|| / ||x'_k||, where T(y) is the step's result with the prediction at y. contraction: the factor
    by which the damped map (1 - lam) I + lam T shrank the iterate's last move, an estimate from below of the map's Lipschitz
    constant; the first iteration takes the step's initial latent for x'_{-1}. NaN for an item that was no longer iterated on or
    did not move. lambdas: the damping used, 0 for an item that was not moved. fell_back: bool [B], items whose residual grew
    or was not finite, and which kept their best iterate.
    """

    residuals: list[torch.Tensor] = field(default_factory=list)
    contraction: list[torch.Tensor] = field(default_factory=list)
    lambdas: list[torch.Tensor] = field(default_factory=list)
    fell_back: torch.Tensor | None = None


def _per_item(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape a [B] tensor so that it broadcasts over `like` [B, ...]; numbers get the dtype of `like`."""
    value = value if value.dtype == torch.bool else value.to(like)
    return value.reshape(-1, *[1] * (like.ndim - 1))


def contractive_lambda(slope: torch.Tensor, lipschitz: torch.Tensor, largest: float) -> torch.Tensor:
    """Return the damping [B], at most `largest`, that contracts most along u, the direction of the last move.

    For J the Jacobian of T, ||((1 - lam) I + lam J) u||^2 = 1 - 2 lam (1 - s) + lam^2 (1 - 2 s + L^2), where s = <u, J u> is
    the slope and L = ||J u||. The minimum is at `_least_lambda`, and every smaller positive lam contracts too. With s >= 1 no
    positive damping contracts, and the result is 0.
    """
    best = _least_lambda(slope, lipschitz)
    return torch.where(slope < 1, best, 0).clamp(max=largest)  # also 0 for a NaN slope, of an item that did not move


def anderson_lambda(slope: torch.Tensor, lipschitz: torch.Tensor, largest: float) -> torch.Tensor:
    """Return the damping [B] with which x' + lam (T(x') - x') is a step of Anderson acceleration of depth 1; `largest` for an
    item that did not move.

    Depth 1 mixes the last two points and their residuals r by the gamma that minimizes ||r - gamma (r - r_last)||, then moves
    from the mixture by beta times the mixed residual. The last move was lam_last r_last, so with beta = lam_last the old point
    cancels and the move is r times lam_last (1 - gamma): Aitken's dynamic relaxation (Irons and Tuck 1969). This is the minimum
    of `contractive_lambda`'s quadratic without a bound, and only the last move must be kept.
    """
    best = _least_lambda(slope, lipschitz)
    return torch.where(best.isfinite(), best, largest)


def _least_lambda(slope: torch.Tensor, lipschitz: torch.Tensor) -> torch.Tensor:
    return (1 - slope) / (1 - 2 * slope + lipschitz**2)


def damped_contraction(slope: torch.Tensor, lipschitz: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
    """Return ||((1 - lam) I + lam J) u|| [B] for a unit vector u with <u, J u> = slope and ||J u|| = lipschitz."""
    square = 1 - 2 * lambda_ * (1 - slope) + lambda_**2 * (1 - 2 * slope + lipschitz**2)
    return square.clamp(min=0).sqrt()


class _Iteration:
    """The iterate D_k of one step's fixed-point iteration, and its moves. Each item of the batch has its own state, [B].

    kept: the iterate that the item falls back to: D_{k-1} while the item is active, and its final one afterwards.
    """

    def __init__(self, denoised: torch.Tensor, settings: CorrectionSettings) -> None:
        self.kept = denoised
        self._settings = settings
        self._active = torch.ones(denoised.shape[0], dtype=torch.bool, device=denoised.device)
        # The residual's norm and the damping of the last iteration.
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._fell_back = torch.zeros_like(self._active)
        self.trace = StepTrace(fell_back=self._fell_back)

    def among_active(self, denoised: torch.Tensor) -> torch.Tensor:
        """Return D_k: `denoised` for the active items, the kept iterate for the others."""
        return torch.where(_per_item(self._active, denoised), denoised, self.kept)

    def last_prediction(self, prediction: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Return the network's prediction at the iterate that each item keeps.

        prediction: at D_k. before: what this returned for D_{k-1}; None at D_0.
        """
        return prediction if before is None else torch.where(_per_item(self._active, prediction), prediction, before)

    def advance(
        self,
        denoised: torch.Tensor,
        residual: torch.Tensor,
        moved: torch.Tensor,
        rounding: torch.Tensor,
        relative: torch.Tensor,
    ) -> torch.Tensor:
        """Return D_{k+1}: D_k moved by lam times its residual G(D_k) - D_k.

        denoised: D_k. moved: the iterate's change since the network's last evaluation. rounding: [B], residuals of a smaller
        norm are rounding errors. relative: [B], the factor from a change of D to a relative change of x'.
        """
        moved_norm, norm = norms(moved), norms(residual)
        moved = widened(moved)
        image = residual if self._last is None else moved + residual - moved / _per_item(self._last[1], moved)
        lipschitz, slope = norms(image) / moved_norm, dots(image, moved) / moved_norm**2  # image: G(D_k) - G(D_{k-1})
        del image
        lambda_ = self._lambda(slope, lipschitz)
        contraction = damped_contraction(slope, lipschitz, lambda_).where(self._active, torch.nan)
        # The first iteration has no earlier residual: only the estimated contraction can say that it would grow.
        shrinks = ~(contraction > 1) if self._last is None else norm <= self._last[0]
        fails = self._active & ~(norm.isfinite() & (shrinks | (norm <= rounding)))
        self._fell_back |= fails
        self._active = self._active & ~fails
        self.trace.residuals.append(norm * relative)
        self.trace.contraction.append(contraction)
        self.trace.lambdas.append(self._active * lambda_)
        self._last = norm, lambda_
        return self.among_active(denoised + _per_item(lambda_, residual) * residual)

    def _lambda(self, slope: torch.Tensor, lipschitz: torch.Tensor) -> torch.Tensor:
        """Return the damping [B] of this iteration."""
        largest, mode = self._settings.lambda_, self._settings.lambda_mode
        if mode == "contractive":
            return contractive_lambda(slope, lipschitz, largest)
        if mode == "anderson" and self._last is not None:
            return anderson_lambda(slope, lipschitz, largest)
        return torch.full_like(slope, largest)

    def settle(self, denoised: torch.Tensor, advanced: torch.Tensor, relative: torch.Tensor) -> bool:
        """End the items that did not move, or moved by less than the tolerance; return whether any item continues.

        denoised: D_k, kept for the items that continue. advanced: D_{k+1}, kept for those that end.
        """
        change = norms(advanced - denoised) * relative
        self._active = self._active & (change > 0) & (change >= self._settings.tolerance)
        self.kept = torch.where(_per_item(self._active, denoised), denoised, advanced)
        return bool(self._active.any())


class _Place:
    """Where a prediction D is tried: maps D to the network's input x_in = scale (a x + b D + noise), and back."""

    def __init__(self, x: torch.Tensor, step: Step, settings: CorrectionSettings, noise: Latent | None) -> None:
        self._x, self._step, self._noise = x, step, noise
        is_own = settings.evaluation_point == "paper"
        self.sigma = step.sigma if is_own else step.sigma_next
        self.scale = step.input_scale if is_own else 1.0
        self._is_mean_of_predictions = settings.evaluation_point == "ahead" and noise is not None
        # An evaluation ahead replaces one of the sampler's own, so its latent must be bit for bit what the sampler computes.
        self._is_sampler_euler = settings.evaluation_point == "ahead" and noise is None and step.is_euler

    def _start(self) -> torch.Tensor:
        start = self._step.x_factor * self._x
        return start if self._noise is None else start + self._noise()

    def of(self, denoised: torch.Tensor) -> torch.Tensor:
        """Return x_in [B, ...] for a D."""
        if self._is_sampler_euler:
            sigma = self._x.new_full((), self._step.sigma)  # with a Python number a GPU multiplies by its reciprocal
            return self._x + (self._x - denoised) / sigma * (self._step.sigma_next - self._step.sigma)
        return torch.add(self._start(), denoised, alpha=self._step.denoised_factor).mul_(self.scale)

    def denoised(self, x_in: torch.Tensor) -> torch.Tensor:
        """Return the D that leads to x_in, up to the rounding of x_in."""
        return (x_in / self.scale - self._start()).div_(self._step.denoised_factor)

    def target(self, x_in: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Return G(D), for the network's prediction `denoised` at x_in."""
        if self._is_mean_of_predictions:
            return denoised
        return self._x - (x_in - denoised) * (self._step.sigma / self.sigma)


def corrected_denoised(
    evaluate: Callable[[torch.Tensor, float, int], torch.Tensor],
    x: torch.Tensor,
    step: Step,
    settings: CorrectionSettings,
    noise: Latent | None = None,
    mask: Latent | None = None,
    keep: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, StepTrace]:
    """Return (denoised [B, ...], StepTrace): the prediction with which the sampler's step is the IEC step.

    evaluate(x_in, sigma, iteration): returns the denoised prediction at x_in and at the timestep of sigma (a float); iteration
    0 is the sampler's own evaluation, k the k-th correction. x: latent at step.sigma [B, ...]. noise(): the step's noise term,
    the same at each call; None for a deterministic step. mask(): [B, ...] in [0, 1], the share of the correction that each
    element gets, the same at each call; None for all of it. keep(prediction): called once, at the end, with the network's
    prediction [B, ...] at the last iterate (for an item that fell back: at the iterate that it kept). `ahead` reuses this
    prediction in the next step.

    Items of a batch converge and fall back independently. An iterate is judged by its residual; the last update is not judged,
    because it is not evaluated again. K = 1 reads nothing from the device; K >= 2 reads one flag per iteration. While the
    network runs, two latents are held besides x: the network's input, and D_0 or D_{k-1}, which is the iterate to fall back to.
    To save a third one, D_k is recomputed from the input, which calls `noise` and `mask` again.
    """
    denoised = evaluate(x, step.sigma, 0)
    if settings.max_iterations == 0:
        return denoised, StepTrace()
    place = _Place(x, step, settings, noise)
    reach = place.scale * step.denoised_factor  # the change of x_in per change of D
    x_in = place.of(denoised)
    iteration = _Iteration(denoised, settings)
    rounding = norms(x) * (10 * torch.finfo(x.dtype).eps) / min(1.0, abs(reach))
    kept = None
    number = 0
    del denoised
    while True:
        number += 1
        prediction = evaluate(x_in, place.sigma, number)
        target = place.target(x_in, prediction)
        inside = None if mask is None else mask()
        if number == 1:
            denoised, moved = iteration.kept, widened(x_in - x) / reach
        else:
            denoised = iteration.among_active(place.denoised(x_in))
            if inside is not None:
                denoised = torch.where(inside > 0, denoised, iteration.kept)
            moved = denoised - iteration.kept
        residual = target - denoised
        if inside is not None:
            residual, moved = residual * inside, moved * (inside > 0)
        relative = abs(reach) / norms(x_in)
        advanced = iteration.advance(denoised, residual, moved, rounding, relative)
        if keep is not None:
            kept = iteration.last_prediction(prediction, kept)
        del prediction, target, residual, moved, inside
        is_last = number == settings.max_iterations or reach == 0  # with reach 0 every D leads to the same x_in
        if is_last or not iteration.settle(denoised, advanced, relative):
            if keep is not None and kept is not None:
                keep(kept)
            return advanced, iteration.trace
        x_in = x_in + reach * (advanced - denoised)
        del denoised, advanced
