"""How much of a run's result a correction moves by its own error, and where that was measured to hurt.

At `paper` a step's result is evaluated at the timestep that the step begins at, where it does not belong: also a network
without any error is corrected. Where the host scales the network's input by the noise level that was measured to lead away
from the exact solution; on a flow model, whose input is not scaled, towards it, as `next` does. A sampler with history
multiplies whatever a correction changes.

How far the result is moved is estimated from the run's own residuals: a correction moves x' by lambda times the residual,
relative to x', and a relative change of the latent is carried through to the image. (It is, exactly, where the images are
normal with any variance s^2: what is left at the end of a change at sigma is s / sqrt(s^2 + sigma^2) of it, as of the latent
itself.) What the steps do is summed up as if it all pointed one way. docs/benchmarks.md, "What a correction does by itself",
has the estimate beside what was measured.
"""

import itertools
from dataclasses import dataclass

# From here on the paper's rule raised the error of a first-order sampler in most rows, and below in none; twice what 8 bits do.
LARGE_BIAS = 0.05
# Behind a cache that goes on for as many steps without a full one corrections helped, in spite of all.
WIDE_CACHE = 5
# Of what moves the result by less nothing is said.
LEAST_BIAS = 0.002


@dataclass(frozen=True)
class CorrectedRun:
    """What is known of a run that was sampled. evaluation_point: of its corrections. gains: by how much each step of the run
    multiplies a change of its prediction, 1 where the sampler has no history. evaluates_more_than_once: whether it does in a
    step. is_scaled: whether the network's input is scaled by the noise level. full: the steps that a cache of this pack
    evaluates in full, None without one. is_exact: whether the MODEL is known to have no error that a correction could be for.
    """

    evaluation_point: str
    gains: tuple[float, ...]
    evaluates_more_than_once: bool = False
    is_scaled: bool = True
    full: list | None = None
    is_exact: bool = False

    @property
    def leads_away(self):
        """Whether a correction of a network without error leads away from the exact solution."""
        return self.evaluation_point == "paper" and self.is_scaled

    @property
    def has_history(self):
        """Whether the sampler multiplies what a correction changes."""
        return any(abs(gain - 1) > 0.05 for gain in self.gains)

    @property
    def is_higher_order(self):
        """Whether the sampler is of higher order by itself."""
        return self.has_history or self.evaluates_more_than_once

    def net_gain(self, step):
        """Return by how much a change of a step's prediction is multiplied in this step and, against it, the next: a step with
        gain g subtracts (g - 1) times the prediction before.
        """
        return self.gains[step] - sum(gain - 1 for gain in self.gains[step + 1 : step + 2])

    @property
    def has_wide_cache(self):
        """Whether a cache goes on for WIDE_CACHE steps or more without a full one."""
        ends = [] if self.full is None else [*sorted(self.full), len(self.gains)]
        return any(then - here >= WIDE_CACHE for here, then in itertools.pairwise(ends))


def moved_by(step, gain=1.0):
    """Return by how much of itself the corrections of a StepReport moved its latent, a mean over the images: the sum over the
    iterations of lambda times residual, times the sampler's gain. 0 where nothing was moved.
    """
    images = zip(zip(*step.lambdas), zip(*step.residuals))
    shares = [sum((lambda_ or 0) * (residual or 0) for lambda_, residual in zip(*image)) for image in images]
    return abs(gain) * sum(shares) / len(shares) if shares else 0.0


def _moves(steps, run):
    """Return {step: the share of the result that its correction moves} for the corrected ones of a run's StepReports."""
    return {step.step: moved_by(step, run.net_gain(step.step)) for step in steps if step.corrected}


def moved_in_all(steps, run):
    """Return the share of the result that the corrections move, as it is estimated from a run's StepReports."""
    return sum(_moves(steps, run).values())


def bias_warning(steps, run):
    """Return a sentence, to go on after the run's label, where the corrections were measured to hurt, and None elsewhere.

    steps: the run's StepReports.
    """
    moves = _moves(steps, run)
    bias = sum(moves.values())
    reason = _why_harmful(run, moves, bias) if bias >= LEAST_BIAS else None
    if reason is None:
        return None
    moved = f"which moves the result by about {max(bias, 0.01):.0%}{_where(steps, moves)}"
    return f"{reason}, {moved}; correction_steps auto avoids that."


def _why_harmful(run, moves, bias):
    """Return why the corrections do harm, None where they were not measured to."""
    if run.evaluation_point == "ahead" or run.has_wide_cache:
        return None
    is_large = bias >= LARGE_BIAS
    # A sampler of higher order has a small error itself: a small bias raised it too, but not that of a flow model.
    at_any_size = run.is_scaled and run.full is None and (run.has_history or run.is_exact)
    by_order = run.is_higher_order and (run.is_scaled or run.has_history) and (is_large or at_any_size)
    if not by_order and not (run.leads_away and is_large):
        return None
    if run.is_exact:
        order = ", and the sampler is of higher order by itself" if by_order else ""
        return f"this MODEL is neither quantized nor cached{order}, so that a correction has nothing to take back"
    if by_order and run.has_history:
        step = max(moves, key=lambda step: abs(run.gains[step]))
        return (
            "this sampler extrapolates from its last predictions, and so multiplies what a correction changes (by "
            f"{abs(run.gains[step]):.1f} in step {step})"
        )
    if run.leads_away:
        return "a correction at evaluation_point paper has an error of its own"
    return "this sampler is of higher order by itself, and loses that by a correction"


def _where(steps, moves):
    """Return the words for the step that does most, if one does."""
    worst = max(moves, key=moves.get)
    if len(moves) == 1 or moves[worst] < sum(moves.values()) / 2:
        return ""
    return f", most of it in step {worst}" + (", which ends without noise" if steps[worst].sigma_next == 0 else "")
