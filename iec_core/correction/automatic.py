"""What `correction_steps: auto` corrects, and where: the choices that were measured to lower the error, and no others.

The measurements are in docs/results.md. Errors are those to the exact solution.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from .correction_steps import CorrectionSteps

# Runs of fewer steps are mostly those of models distilled to their own few steps, which follow no equation's solution: they are
# left alone.
LEAST_STEPS = 10
# A step to a sigma lower by more than this factor begins where next to nothing of the image is in the latent (zero terminal
# SNR), or is the last but one of schedules such as normal. A correction takes half of it times a change of the prediction.
LARGEST_RATIO = 4


@dataclass(frozen=True)
class Situation:
    """What is known of a sampling run before it begins, as far as `auto` goes by it.

    sigmas: where the steps begin, and the last one's end, n + 1 floats. known_ends: the steps that can be corrected `ahead`, as
    `CorrectionSettings.corrected_steps` has them. why_none: why there are none, to go on after "the sampler"; None where there
    are. noise: "" where steps add none; "ancestral" where all that do take the step of the model's own stochastic equation, as
    euler_ancestral and ddpm; "other". full: the steps that a cache of this pack evaluates in full; None without one.
    other_cache: the name of another pack's cache, "" without one.
    """

    sigmas: tuple[float, ...]
    known_ends: frozenset[int] = frozenset()
    why_none: str | None = None
    noise: str = ""
    full: Collection[int] | None = None
    other_cache: str = ""

    @property
    def steps(self):
        """The number of steps."""
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Choice:
    """What is corrected: steps, at evaluation_point (None where there are none), and why, a sentence."""

    steps: CorrectionSteps
    evaluation_point: str | None
    why: str


def choose(situation):
    """Return the Choice for a Situation."""
    reason = _why_nothing(situation)
    if reason:
        return Choice(CorrectionSteps("none", "none"), None, nothing_because(reason))
    steps = [step for step in sorted(situation.known_ends) if _is_within(situation.sigmas, step)]
    if situation.full is None:
        why = "each by the next step's own evaluation, which costs nothing"
    else:
        steps = [step for step in steps if step + 1 in situation.full]
        why = "those before the steps that the cache evaluates in full, by these evaluations, which costs nothing"
    if not steps:
        return Choice(
            CorrectionSteps("none", "none"), None, nothing_because("the run has no step that it was measured to help")
        )
    text = f"steps:{','.join(map(str, steps))}"
    sentence = f"auto corrects {len(steps)} of {situation.steps} steps, {why}."
    return Choice(CorrectionSteps(text, "steps", tuple(steps)), "ahead", sentence)


def _is_within(sigmas, step):
    return sigmas[step] <= LARGEST_RATIO * sigmas[step + 1]


def _why_nothing(situation):
    """Return why no step of the run is corrected, None where some may be."""
    if situation.why_none:
        return f"the sampler {situation.why_none}"
    if situation.noise == "other":
        return "the sampler adds noise in another way than euler_ancestral and ddpm"
    if situation.other_cache:
        return f"{situation.other_cache} is on the MODEL, whose cached evaluations are not known"
    if situation.steps < LEAST_STEPS:
        return f"runs of fewer than {LEAST_STEPS} steps are left alone, for the sake of models distilled to so few"
    if any(then > here for here, then in itertools.pairwise(situation.sigmas)):
        return "the schedule goes up"
    return None


def nothing_because(reason):
    """Return the sentence for a run in which nothing is corrected."""
    return f"auto corrects nothing: {reason}."
