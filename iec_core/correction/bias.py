"""The bias of a correction: how far it moves the result of a network without error, and when that was measured to hurt.

At `paper` a step's result is evaluated at the timestep where the step begins, which is not the result's own. So the correction
also changes the result of a network without any error. Where the host scales the network's input by the noise level, this was
measured to lead away from the exact solution. On a flow model, whose input is not scaled, it leads towards the solution, as
`next` does. A sampler with history multiplies every change that a correction makes.

The size of the move is estimated from the run's own residuals: a correction moves x' by lambda times the residual, relative to
x', and a relative change of the latent is assumed to reach the image. (This is exact for normally distributed images of any
variance s^2: a change at sigma and the latent itself both shrink to the share s / sqrt(s^2 + sigma^2) by the end.) The moves of
all steps are added as if they had the same direction. docs/benchmarks.md, "What a correction does by itself", compares the
estimate with measurements.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..run_report import StepReport

# From this share on, corrections at evaluation_point `paper` raised the error of a first-order sampler in most measured runs;
# below it they raised it in none. It is twice the change that 8-bit quantization makes.
LARGE_BIAS = 0.05
# With a cache that goes this many steps from one full evaluation to the next, corrections helped in spite of their bias.
WIDE_CACHE = 5
# Below this share there is no warning.
LEAST_BIAS = 0.002


@dataclass(frozen=True)
class CorrectedRun:
    """What is known of a finished run.

    evaluation_point: of its corrections. gains: one factor per step, by which the step multiplies a change of its prediction;
    1 where the sampler has no history. evaluates_more_than_once: whether the sampler evaluates several times in a step.
    is_scaled: whether the network's input is scaled by the noise level. full: the steps that this pack's cache evaluates in
    full; None without a cache. is_exact: whether the MODEL is known to be neither quantized nor cached.
    """

    evaluation_point: str
    gains: tuple[float, ...]
    evaluates_more_than_once: bool = False
    is_scaled: bool = True
    full: Collection[int] | None = None
    is_exact: bool = False

    @property
    def leads_away(self) -> bool:
        """Whether a correction of a network without error leads away from the exact solution."""
        return self.evaluation_point == "paper" and self.is_scaled

    @property
    def has_history(self) -> bool:
        """Whether the sampler multiplies what a correction changes."""
        return any(abs(gain - 1) > 0.05 for gain in self.gains)

    @property
    def is_higher_order(self) -> bool:
        """Whether the sampler is of higher order by itself."""
        return self.has_history or self.evaluates_more_than_once

    def net_gain(self, step: int) -> float:
        """Return the factor by which this step and the next one together multiply a change of this step's prediction.

        A step with gain g subtracts (g - 1) times the previous prediction, which takes a part of the change back.
        """
        return self.gains[step] - sum(gain - 1 for gain in self.gains[step + 1 : step + 2])

    @property
    def has_wide_cache(self) -> bool:
        """Whether in half of the steps or more a cache goes WIDE_CACHE steps or more from one full evaluation to the next."""
        ends = [] if self.full is None else [*sorted(self.full), len(self.gains)]
        lengths = [then - here for here, then in itertools.pairwise(ends)]
        return 2 * sum(length for length in lengths if length >= WIDE_CACHE) >= len(self.gains) > 0


def moved_by(step: StepReport, gain: float = 1.0) -> float:
    """Return the relative change of a step's latent by its corrections, a mean over the images; 0 where nothing was moved.

    It is the sum over the iterations of lambda times residual, times the sampler's gain.
    """
    images = zip(zip(*step.lambdas), zip(*step.residuals))
    shares = [sum((lambda_ or 0) * (residual or 0) for lambda_, residual in zip(*image)) for image in images]
    return abs(gain) * sum(shares) / len(shares) if shares else 0.0


def _moves(steps: Sequence[StepReport], run: CorrectedRun) -> dict[int, float]:
    """Return {step: the share of the result that its correction moves} for the corrected steps of a run."""
    return {step.step: moved_by(step, run.net_gain(step.step)) for step in steps if step.corrected}


def moved_in_all(steps: Sequence[StepReport], run: CorrectedRun) -> float:
    """Return the estimated share of the result that all corrections of a run move together."""
    return sum(_moves(steps, run).values())


def bias_warning(steps: Sequence[StepReport], run: CorrectedRun) -> str | None:
    """Return a sentence that follows the run's label, if corrections like those of this run were measured to hurt; otherwise
    None.
    """
    moves = _moves(steps, run)
    bias = sum(moves.values())
    reason = _why_harmful(run, moves, bias) if bias >= LEAST_BIAS else None
    if reason is None:
        return None
    moved = f"the corrections moved the result by about {max(bias, 0.01):.0%}{_where(steps, moves)}"
    return f"{reason}; {moved}. correction_steps auto avoids this."


def _why_harmful(run: CorrectedRun, moves: dict[int, float], bias: float) -> str | None:
    """Return the reason why the corrections do harm; None where they were not measured to."""
    if run.evaluation_point == "ahead" or run.has_wide_cache:
        return None
    is_large = bias >= LARGE_BIAS
    # A sampler of higher order has a small error by itself, so even a small bias raised that error. On flow models it did not.
    at_any_size = run.is_scaled and run.full is None and (run.has_history or run.is_exact)
    by_order = run.is_higher_order and (run.is_scaled or run.has_history) and (is_large or at_any_size)
    if not by_order and not (run.leads_away and is_large):
        return None
    if run.is_exact:
        order = ", and the sampler is already of higher order" if by_order else ""
        return f"this MODEL is neither quantized nor cached{order}, so a correction has no error to remove"
    if by_order and run.has_history:
        step = max(moves, key=lambda step: abs(run.gains[step]))
        return (
            "this sampler extrapolates from its last predictions, and so multiplies the change that a correction makes (by "
            f"{abs(run.gains[step]):.1f} in step {step})"
        )
    if run.leads_away:
        return "a correction at evaluation_point paper adds an error of its own"
    return "this sampler is already of higher order, and a correction takes that away"


def _where(steps: Sequence[StepReport], moves: dict[int, float]) -> str:
    """Return the words that name the step with most of the move, if several steps moved and one has at least half; else ""."""
    worst = max(moves, key=lambda step: moves[step])
    if len(moves) == 1 or moves[worst] < sum(moves.values()) / 2:
        return ""
    return f", most of it in step {worst}" + (", which ends at zero noise" if steps[worst].sigma_next == 0 else "")
