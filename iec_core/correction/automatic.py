"""Chooses the corrected steps and the evaluation point of `correction_steps: auto`.

It corrects only where docs/results.md, or docs/benchmarks.md for samplers that add noise, measured a lower error to the exact
solution.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from .correction_steps import CorrectionSteps

# Shorter runs mostly use models distilled to a few steps. The steps of such models do not solve an equation, so shorter runs
# are not corrected.
LEAST_STEPS = 10
# Steps in which sigma falls by more than this factor are not corrected. Such a step starts where the latent holds almost
# nothing of the image (zero terminal SNR), or is the last but one of a schedule such as normal. A correction there is large: it
# moves the step's result by half of the fall of sigma times the change of eps.
LARGEST_RATIO = 4


@dataclass(frozen=True)
class Situation:
    """What `auto` uses of a sampling run, all known before the run begins.

    sigmas: n + 1 floats, the start of each step and the end of the last. known_ends: the steps that can be corrected `ahead`
    (see `CorrectionSettings.corrected_steps`). why_none: the reason why there are none, which continues "the sampler …"; None
    where there are some. noise: "" where no step adds noise; "ancestral" where every step with noise is the step of the model's
    own stochastic equation, as in euler_ancestral and ddpm; else "other". full: the steps that this pack's cache evaluates in
    full; None without a cache. other_cache: the name of another pack's cache, "" without one. max_iterations: the largest
    number of corrections per step, at least 1.
    """

    sigmas: tuple[float, ...]
    known_ends: frozenset[int] = frozenset()
    why_none: str | None = None
    noise: str = ""
    full: Collection[int] | None = None
    other_cache: str = ""
    max_iterations: int = 1

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Choice:
    """The corrected steps, their evaluation_point (None without steps), and the reason, one sentence."""

    steps: CorrectionSteps
    evaluation_point: str | None
    why: str


def choose(situation: Situation) -> Choice:
    """Return the Choice for a Situation."""
    reason = _why_nothing(situation)
    if reason:
        return Choice(CorrectionSteps("none", "none"), None, nothing_because(reason))
    steps = [step for step in sorted(situation.known_ends) if _is_within(situation.sigmas, step)]
    if situation.full is None:
        why = "each with the next step's own evaluation"
    else:
        steps = [step for step in steps if step + 1 in situation.full]
        why = "those right before a step that the cache evaluates in full, each with that evaluation"
    if not steps:
        return Choice(
            CorrectionSteps("none", "none"),
            None,
            nothing_because("the run has no step where a correction was measured to help"),
        )
    text = f"steps:{','.join(map(str, steps))}"
    added = situation.max_iterations - 1
    cost = f" and at most {added} more" if added else ", at no extra cost"
    sentence = f"auto corrects {len(steps)} of {situation.steps} steps, {why}{cost}."
    return Choice(CorrectionSteps(text, "steps", tuple(steps)), "ahead", sentence)


def _is_within(sigmas: tuple[float, ...], step: int) -> bool:
    return sigmas[step] <= LARGEST_RATIO * sigmas[step + 1]


def _why_nothing(situation: Situation) -> str | None:
    """Return the reason why no step of the run is corrected; None where steps may be corrected."""
    if situation.why_none:
        return f"the sampler {situation.why_none}"
    if situation.noise == "other":
        return "the sampler adds noise in another way than euler_ancestral and ddpm"
    if situation.other_cache:
        return f"{situation.other_cache} is on the MODEL, and which evaluations it caches is not known"
    if situation.steps < LEAST_STEPS:
        return f"runs of fewer than {LEAST_STEPS} steps are not corrected, as a precaution for models distilled to few steps"
    if any(then > here for here, then in itertools.pairwise(situation.sigmas)):
        return "sigma rises within the schedule"
    return None


def nothing_because(reason: str) -> str:
    """Return the sentence for a run without corrected steps."""
    return f"auto corrects nothing: {reason}."
