"""The grammar of `correction_steps`: which sampling steps are corrected.

Steps are numbered from 0 over the steps that the run takes, also where start_at_step, end_at_step or denoise shorten it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from ..errors import SettingsError

FORMS = "auto, all, none, full, ends:1/10, first:1/5, first:3, last:1/5, last:3 or steps:0,1,48,49"

# For each form that names a share: whether it takes steps at the start and at the end of a run, and its largest share.
ENDS = {"ends": (True, True), "first": (True, False), "last": (False, True)}
LARGEST_SHARE = {"ends": Fraction(1, 2), "first": Fraction(1), "last": Fraction(1)}


@dataclass(frozen=True)
class CorrectionSteps:
    """A parsed `correction_steps` text; `of(n)` gives its steps in a run of n steps."""

    text: str
    kind: str
    numbers: tuple[int, ...] = ()

    def of(self, total: int, full: Collection[int] | None = None) -> frozenset[int]:
        """Return the numbers of the corrected steps in a run of `total` steps.

        full: the steps that a cache evaluates in full; None without a cache. The text `full` selects these, and without a cache
        every step. `ends:a/b` selects the first and the last max(1, round(total * a / b)) steps, `first:a/b` only the first
        ones, `last:a/b` only the last ones; `ends:1/10` is the paper's +-1/10 (section 4.2). `auto` selects no step here:
        `automatic.choose` replaces it for each run. Raises SettingsError where the text names a step outside the run.
        """
        if self.kind == "full" and full is not None:
            return frozenset(full)
        if self.kind in ("all", "full"):
            return frozenset(range(total))
        if self.kind in ("none", "auto"):
            return frozenset()
        if self.kind in ENDS:
            count = self._count(total)
            at_start, at_end = ENDS[self.kind]
            return frozenset(i for i in range(total) if (at_start and i < count) or (at_end and i >= total - count))
        highest = max(self.numbers)
        if highest >= total:
            raise SettingsError(
                f"correction_steps: '{self.text}' names step {highest}, but the run has {total} steps, numbered from 0 "
                f"to {total - 1}; name only steps of the run."
            )
        return frozenset(self.numbers)

    def _count(self, total: int) -> int:
        """Return the number of corrected steps at one end of a run of `total` steps."""
        if self.is_share:
            return max(1, round(total * Fraction(*self.numbers)))
        if self.numbers[0] > total:
            count = f"asks for {self.numbers[0]} steps, but the run has {total}"
            raise SettingsError(f"correction_steps: '{self.text}' {count}; ask for at most {total}.")
        return self.numbers[0]

    @property
    def is_share(self) -> bool:
        """Whether the text names a share of the steps, such as first:1/5; a share fits runs of any length."""
        return self.kind in ENDS and len(self.numbers) == 2


def parse_correction_steps(text: str) -> CorrectionSteps:
    """Parse a `correction_steps` text. Raises SettingsError with a sentence that says what is accepted."""
    compact = re.sub(r"\s+", "", text).lower()
    if compact in ("auto", "all", "none", "full"):
        return CorrectionSteps(compact, compact)
    if match := re.fullmatch(r"(ends|first|last):(\d{1,9})/(\d{1,9})", compact):
        kind, over, under = match[1], int(match[2]), int(match[3])
        if under > 0 and 0 < Fraction(over, under) <= LARGEST_SHARE[kind]:
            return CorrectionSteps(compact, kind, (over, under))
        raise SettingsError(
            f"correction_steps: '{text}' needs a share above 0 and at most {LARGEST_SHARE[kind]}, such as {kind}:1/10."
        )
    if match := re.fullmatch(r"(first|last):(\d{1,9})", compact):
        if int(match[2]) > 0:
            return CorrectionSteps(compact, match[1], (int(match[2]),))
        raise SettingsError(f"correction_steps: '{text}' asks for 0 steps; write none, or a count of at least 1.")
    if match := re.fullmatch(r"steps:(\d{1,9}(?:,\d{1,9})*)", compact):
        return CorrectionSteps(compact, "steps", tuple(int(part) for part in match[1].split(",")))
    raise SettingsError(f"correction_steps: '{text}' is not a known form; write {FORMS}.")


def steps_within(text: str, total: int) -> str:
    """Return a `correction_steps` text without the steps that a run of `total` steps does not have; `none` for a text of an
    unknown form.
    """
    try:
        steps = parse_correction_steps(text)
    except SettingsError:
        return "none"
    if steps.kind in ("first", "last") and not steps.is_share:
        return f"{steps.kind}:{min(steps.numbers[0], total)}" if total else "none"
    if steps.kind == "steps":
        inside = [str(number) for number in steps.numbers if number < total]
        return f"steps:{','.join(inside)}" if inside else "none"
    return steps.text
