"""Which sampling steps are corrected: the grammar of `correction_steps`, and the evaluations that a choice costs.

A step is numbered from 0 among the steps that a run really takes, whatever its start, end or denoise setting.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

FORMS = "all, none, full, ends:1/10, first:3, last:3 or steps:0,1,48,49"


@dataclass(frozen=True)
class CorrectionSteps:
    """A parsed `correction_steps` text; `of(n)` gives its steps in a run of n steps."""

    text: str
    kind: str
    numbers: tuple[int, ...] = ()

    def of(self, total, full=None):
        """Return the frozenset of corrected step numbers in a run of `total` steps.

        full: the steps that a cache evaluates in full, None without a cache; those are what `full` is, and without a cache
        every step is one. `ends:a/b` is the first and the last max(1, round(total * a / b)) steps: `ends:1/10` is the paper's
        +-1/10 (section 4.2). Raises ValueError where the text names a step that the run does not have.
        """
        if self.kind == "full" and full is not None:
            return frozenset(full)
        if self.kind in ("all", "full"):
            return frozenset(range(total))
        if self.kind == "none":
            return frozenset()
        if self.kind == "ends":
            count = max(1, round(total * Fraction(*self.numbers)))
            return frozenset(i for i in range(total) if i < count or i >= total - count)
        if self.kind != "steps" and self.numbers[0] > total:
            count = f"asks for {self.numbers[0]} steps, and the run has {total}"
            raise ValueError(f"correction_steps: '{self.text}' {count}; ask for {total} at most.")
        highest = max(self.numbers)
        if self.kind == "steps" and highest >= total:
            raise ValueError(
                f"correction_steps: '{self.text}' names step {highest}, but the run has {total} steps, numbered from 0 "
                f"to {total - 1}; name steps of the run only."
            )
        if self.kind == "first":
            return frozenset(range(self.numbers[0]))
        if self.kind == "last":
            return frozenset(range(total - self.numbers[0], total))
        return frozenset(self.numbers)


def parse_correction_steps(text):
    """Parse a `correction_steps` text. Raises ValueError, with a sentence that lists the forms, for anything else."""
    compact = re.sub(r"\s+", "", text).lower()
    if compact in ("all", "none", "full"):
        return CorrectionSteps(compact, compact)
    if match := re.fullmatch(r"ends:(\d+)/(\d+)", compact):
        over, under = map(int, match.groups())
        if over > 0 and 2 * over <= under:
            return CorrectionSteps(compact, "ends", (over, under))
        raise ValueError(f"correction_steps: '{text}' needs a share above 0 and at most 1/2, such as ends:1/10.")
    if match := re.fullmatch(r"(first|last):(\d+)", compact):
        if int(match[2]) > 0:
            return CorrectionSteps(compact, match[1], (int(match[2]),))
        raise ValueError(f"correction_steps: '{text}' asks for 0 steps; write none, or a count of at least 1.")
    if match := re.fullmatch(r"steps:(\d+(?:,\d+)*)", compact):
        return CorrectionSteps(compact, "steps", tuple(int(part) for part in match[1].split(",")))
    raise ValueError(f"correction_steps: '{text}' is not a known form; write {FORMS}.")


def steps_within(text, total):
    """Return the `correction_steps` text of those of a text's steps that a run of `total` steps has; `none` for a text that is
    of no known form.
    """
    try:
        steps = parse_correction_steps(text)
    except ValueError:
        return "none"
    if steps.kind in ("first", "last"):
        return f"{steps.kind}:{min(steps.numbers[0], total)}" if total else "none"
    if steps.kind == "steps":
        inside = [str(number) for number in steps.numbers if number < total]
        return f"steps:{','.join(inside)}" if inside else "none"
    return steps.text


def evaluations(total, corrected, iterations):
    """Return the number of network evaluations (NFE) of a first-order run: one a step, `iterations` more a corrected
    step. With a tolerance that stops an iteration early it is the upper bound.
    """
    return total + iterations * len(corrected)
