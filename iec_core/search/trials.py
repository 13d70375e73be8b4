"""What a search has measured, and what it looks for."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .candidates import Candidate

TIMING_NOISE = 0.01  # by how much a measured share of the time may exceed a limit


class RefusedError(Exception):
    """A candidate cannot be run; the message is the reason, a sentence. spent: as in Trial."""

    def __init__(self, reason: str, spent: float = 0.0) -> None:
        super().__init__(reason)
        self.spent = spent


@dataclass(frozen=True)
class Trial:
    """One measured run. seconds: of the run. error: of its result. spent: what it cost altogether, with what had to be made
    for it, as a share of the full run's time.
    """

    seconds: float
    error: float
    spent: float


@dataclass
class Row:
    """What is known of a candidate.

    trials: {number of the run: Trial}. full_seconds: the time of the full run, as far as it is known; it falls when a faster
    one is measured. reason: why it cannot be run, "" if it can.
    """

    candidate: Candidate
    full_seconds: float
    trials: dict[int, Trial] = field(default_factory=dict)
    reason: str = ""

    @property
    def share(self) -> float:
        """The time as a share of the full run's: of the fastest run, because other work on the machine only adds time."""
        return min(trial.seconds for trial in self.trials.values()) / self.full_seconds

    @property
    def error(self) -> float:
        """The mean error over the runs."""
        return sum(trial.error for trial in self.trials.values()) / len(self.trials)

    def on(self, runs: int) -> "Row":
        """Return this row with the first so many runs only."""
        return replace(self, trials={run: trial for run, trial in self.trials.items() if run < runs})

    @property
    def has_run(self) -> bool:
        """Whether there is a result, and the candidate was not refused."""
        return bool(self.trials) and not self.reason


@dataclass(frozen=True)
class Goal:
    """The least error within a share of the full run's time (`of_time`), or the least time within an error."""

    of_time: bool
    limit: float

    def is_met(self, row: Row) -> bool:
        """Tell whether a candidate is within the limit."""
        return row.share <= self.limit + TIMING_NOISE if self.of_time else row.error <= self.limit

    def key(self, row: Row) -> tuple[bool, float]:
        """Return the sort key of a candidate, the best first; those that miss the limit come last, the nearest first."""
        bounded, least = (row.share, row.error) if self.of_time else (row.error, row.share)
        least = least if math.isfinite(least) else math.inf
        return (False, least) if self.is_met(row) else (True, bounded if math.isfinite(bounded) else math.inf)

    def best(self, rows: Iterable[Row]) -> Row | None:
        """Return the best of those that ran, None if none ran."""
        return min((row for row in rows if row.has_run), key=self.key, default=None)
