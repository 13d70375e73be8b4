"""Iterative Error Correction as a wrapper around a denoiser.

The paper (arXiv 2511.06250, section 3.2) turns a DDIM step x' = A_t x + B_t eps(x, t) into the damped iteration

    x'_{k+1} = (1 - lam) x'_k + lam (A_t x + B_t eps(x'_k, t)).

A sampler in k-diffusion coordinates steps x' = x + (sigma' - sigma) eps with eps = (x - denoised) / sigma. That is
affine in eps, so that blending results is blending predictions, eps <- (1 - lam) eps + lam eps_k, and the sampler can
be left as it is: it is handed the denoised image that belongs to the corrected eps.

Where x'_k is evaluated is the `evaluation_point`:

- `paper`: at the step's own timestep. The network has to see x'_k in its own input coordinates,
  c_in(sigma) x_in = c_in(sigma') x'_k, while its timestep stays that of sigma.
- `next`: at the timestep that x'_k belongs to, sigma', unscaled. With lam = 1/2 and K = 1 that is Heun's method, the
  trapezoidal rule with an explicit predictor, of second order in the step. Where sigma' = 0 there is nothing to evaluate.
"""

from dataclasses import dataclass

import torch

from .schedule import CorrectionSteps, parse_correction_steps

EVALUATION_POINTS = ("paper", "next")


@dataclass(frozen=True)
class CorrectionSettings:
    """The method's parameters; the defaults are the paper's.

    steps: which steps are corrected. lambda_: damping, in (0, 1]. max_iterations: K, 0 turns the correction off.
    tolerance: tau, the relative change of x' below which an item of the batch is taken as converged. evaluation_point:
    "paper" or "next", see above.
    """

    steps: CorrectionSteps
    lambda_: float = 0.5
    max_iterations: int = 1
    tolerance: float = 1e-5
    evaluation_point: str = "paper"

    @classmethod
    def parse(cls, correction_steps="all", lambda_=0.5, max_iterations=1, tolerance=1e-5, evaluation_point="paper"):
        """Check the values as a user gives them. Raises ValueError with a sentence that names the input."""
        if not 0 < lambda_ <= 1:
            raise ValueError(f"lambda_: {lambda_} is outside (0, 1]; the paper uses 0.5.")
        if max_iterations < 0:
            raise ValueError(f"max_iterations: {max_iterations} is negative; 0 turns the correction off.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance: {tolerance} is not a number of at least 0; the paper uses 1e-5.")
        if evaluation_point not in EVALUATION_POINTS:
            raise ValueError(f"evaluation_point: '{evaluation_point}' is neither of {' and '.join(EVALUATION_POINTS)}.")
        return cls(parse_correction_steps(correction_steps), lambda_, max_iterations, tolerance, evaluation_point)

    def summary(self):
        """Return what tells runs apart in a table: the steps, and the evaluation point where it is not the paper's."""
        is_plain = self.evaluation_point == "paper" or self.steps.kind == "none"
        return self.steps.text if is_plain else f"{self.steps.text} {self.evaluation_point}"

    def corrected_steps(self, sigmas):
        """Return the frozenset of the steps that are corrected over a schedule of n + 1 sigmas (floats)."""
        if self.max_iterations == 0:
            return frozenset()
        steps = self.steps.of(len(sigmas) - 1)
        if self.evaluation_point == "next":
            steps = frozenset(step for step in steps if sigmas[step + 1] > 0)
        return steps


def _per_item(value, like):
    """Reshape a scalar or [B] tensor so that it broadcasts over `like` [B, ...]."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def _norm(x):
    """Euclidean norm of every item of x [B, ...], as [B]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def corrected_denoised(evaluate, x, sigma, sigma_next, input_scale, settings):
    """Return the denoised image [B, ...] with which an affine sampler step from sigma to sigma_next is the IEC step.

    evaluate(x_in, sigma, iteration): the denoised prediction at x_in and the timestep of that sigma [B]; iteration 0 is the
    sampler's own evaluation, k the k-th correction. x: latent at sigma [B, ...]. sigma: tensor [B]; sigma_next: scalar.
    input_scale: c_in(sigma') / c_in(sigma), a scalar, which brings x' to the network's input coordinates at sigma.

    Items of a batch stop one by one, each as if it were alone. Nothing is read back from the device at K = 1.
    """
    denoised = evaluate(x, sigma, 0)
    if settings.max_iterations == 0:
        return denoised
    is_next = settings.evaluation_point == "next"
    place = sigma_next.expand_as(sigma) if is_next else sigma
    sigma = _per_item(sigma, x)
    step = sigma_next - sigma
    eps = (x - denoised) / sigma
    active = None
    for iteration in range(1, settings.max_iterations + 1):
        x_next = x + step * eps
        x_in = x_next if is_next else x_next * input_scale
        eps_k = (x_in - evaluate(x_in, place, iteration)) / _per_item(place, x)
        change = settings.lambda_ * (eps_k - eps)
        if active is not None:
            change = torch.where(_per_item(active, x), change, 0)
        eps = eps + change
        if iteration < settings.max_iterations:
            residual = _norm(step * change) / _norm(x_next)
            still = residual >= settings.tolerance
            active = still if active is None else active & still
            if not active.any():
                break
    return x - sigma * eps
