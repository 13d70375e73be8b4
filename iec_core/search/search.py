"""Find the best settings of a Space with few runs: a best-first search on one run, then successive halving on more runs.

Successive halving: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator

from .candidates import Candidate, Space, Way
from .trials import Goal, RefusedError, Row, Trial

EXPLORING = 0.65  # the share of the budget for the first run, on which all ways are tried
MOST = 1.3  # the share of the budget at which the search ends in any case
MUCH_FASTER = 0.85  # a way that takes less than this share of the allowed time gets a further level
DELAYED = 1.5  # a run that takes this many times the expected time is repeated
DELAY = 1.3  # by how much other work on the machine may lengthen a run without being noticed
REPEATS = 3  # how often a candidate is run again because of that, at most
WORTH_REFINING = 1.25  # a way whose error is this many times the best one's gets no further level


class Search:
    """A search that can be stopped at any time: `rows` then has what was measured, and `best` is the best so far.

    measure(candidate, run): returns the Trial of a candidate with the prompt and noise of that run; raises RefusedError if it
    cannot be run. full_seconds(): the time of the full run, as far as it is known; asked again after each trial. runs: how many
    different runs there are. budget: about how much may be spent, as a multiple of the full run's time.
    """

    def __init__(
        self,
        space: Space,
        goal: Goal,
        measure: Callable[[Candidate, int], Trial],
        full_seconds: Callable[[], float],
        runs: int,
        budget: float,
    ) -> None:
        self.space, self.goal, self.budget = space, goal, budget
        self._measure, self._full_seconds, self._runs = measure, full_seconds, runs
        self.rows: dict[Candidate, Row] = {}
        self._by_way: dict[Way, list[Row]] = {}
        self._by_weights: dict[str, dict[int, Row]] = {}  # of each level the row that ran first
        self.best: Row | None = None  # the best candidate on the `compared` runs, None before the first result
        self.spent = 0.0
        self._last = space.full
        self._done = 1  # the number of runs that the candidates which are still in the search did

    @property
    def compared(self) -> int:
        """The number of runs that all candidates which are still in the search did."""
        most = max((len(row.trials) for row in self.rows.values() if row.has_run), default=0)
        return min(self._done, most)  # fewer if all others were refused

    @property
    def _complete(self) -> list[Row]:
        return [row for row in self.rows.values() if row.has_run and len(row.trials) >= self._done]

    @property
    def last(self) -> Row:
        """The row of the candidate that was tried last."""
        return self.rows[self._last]

    def run(self) -> None:
        """Search until the budget is spent, or nothing is left to try."""
        for _ in self.progress():
            pass

    def progress(self) -> Iterator[float]:
        """Search; yield the share of the budget that is spent, after each run."""
        for candidate, run in self._next():
            self._try(candidate, run)
            yield min(self.spent / self.budget, 1.0)
            if self.spent >= MOST * self.budget:
                return

    def _try(self, candidate: Candidate, run: int) -> None:
        self._last = candidate
        if candidate not in self.rows:
            self.rows[candidate] = Row(candidate, self._full_seconds())
            self._by_way.setdefault(candidate.way, []).append(self.rows[candidate])
        row = self.rows[candidate]
        try:
            trial = self._measured(candidate, run)
            row.trials[run] = min(row.trials.get(run, trial), trial, key=lambda one: one.seconds)
        except RefusedError as refusal:
            row.reason = row.reason if run in row.trials else str(refusal)  # a run that is only repeated has its result already
            self.spent += refusal.spent
        else:
            self._by_weights.setdefault(candidate.way.weights, {}).setdefault(candidate.level, row)
        for each in self.rows.values():
            each.full_seconds = self._full_seconds()
        self._find_best()

    def _find_best(self) -> None:
        runs = self.compared
        rows = [row for row in self.rows.values() if row.has_run and len(row.trials) >= runs]
        self.best = min(rows, key=lambda row: self.goal.key(row.on(runs)), default=None)

    def _measured(self, candidate: Candidate, run: int) -> Trial:
        """Return the Trial of a candidate; the faster of two if the first took much longer than the candidates measured so far
        let expect, because other work on the machine may have delayed it.
        """
        expected = self._expected(candidate.way, candidate.level) if self._known(candidate.way) else math.inf
        trial = self._measure(candidate, run)
        self.spent += trial.spent
        if trial.seconds <= DELAYED * expected * self._full_seconds():
            return trial
        try:
            again = self._measure(candidate, run)
        except RefusedError as refusal:
            self.spent += refusal.spent
            return trial
        self.spent += again.spent
        return min(trial, again, key=lambda one: one.seconds)

    def _next(self) -> Iterator[tuple[Candidate, int]]:
        """Yield (candidate, run) in the order in which they are to be tried; each is tried before the next is asked for."""
        for candidate in self._explore():
            yield candidate, 0
        yield from self._halve()
        yield from self._time_again()
        yield from self._polish()

    # On the first run, best first: the ways that differ in one field from the best way whose neighbours were not tried yet.

    def _explore(self) -> Iterator[Candidate]:
        most = EXPLORING * self.budget
        yield self.space.full
        yield from self._first_levels(self.space.own, most)
        base, extended = self.space.own, set()
        while self.spent < most:
            extended.add(base)
            ways = [way for way in self.space.neighbours(base) if not self._of(way)]
            for way in sorted(ways, key=functools.partial(self._promise, base)):
                yield from self._first_levels(way, most)
            for way in sorted(self._ways(), key=self._rank):
                yield from self._refine(way, most)
            left = [way for way in self._ways() if way not in extended and any(row.has_run for row in self._of(way))]
            if not left:
                return
            base = min(left, key=self._rank)

    def _first_levels(self, way: Way, most: float) -> Iterator[Candidate]:
        """Yield a first level of a way, and with a limit for the time further ones, until one is within it."""
        for candidate in self._refine(way, most):
            yield candidate
            if not self.goal.of_time or any(self.goal.is_met(row) for row in self._of(way) if row.has_run):
                return

    def _refine(self, way: Way, most: float) -> Iterator[Candidate]:
        """Yield levels of a way until its best one is known, or cannot be the best of all."""
        while self.spent < most and not self._is_refused(way) and self._may_win(way):
            level = self._guess(way, self._of(way))
            if level is None:
                return
            yield Candidate(way, level)

    def _may_win(self, way: Way) -> bool:
        """Tell whether a further level of a way may be better than the best of all."""
        best, own = self.best, self.goal.best(self._of(way))
        if best is None or own is None or not self.goal.is_met(best) or not self.goal.of_time:
            return True  # with a limit for the error, `_guess` leaves out the levels that take more time than the best one
        return own.error <= WORTH_REFINING * best.error or own.share < MUCH_FASTER * self.goal.limit

    def _guess(self, way: Way, known: list[Row]) -> int | None:
        """Return the next level of a way to try, None if its best one is among the `known` rows."""
        low, high = 0, self.space.levels(way) + 1
        for row in known:
            if self.goal.of_time == self.goal.is_met(row):
                low = max(low, row.candidate.level)
            else:
                high = min(high, row.candidate.level)
        levels = [level for level in range(low + 1, high)]
        if not self.goal.of_time and (best := self.best) is not None and self.goal.is_met(best):
            levels = [level for level in levels if self._expected(way, level) < best.share]
        if not levels:
            return None
        if not self.goal.of_time:
            return levels[(len(levels) - 1) // 2]
        within = [level for level in levels if self._expected(way, level) <= self.goal.limit]
        return within[-1] if within else levels[0]

    def _expected(self, way: Way, level: int) -> float:
        """Return the expected share of the time, in proportion to the nearest level of the way, or of one with its weights."""
        own = self.space.expected(Candidate(way, level))
        nearest = min(self._known(way), key=lambda row: abs(row.candidate.level - level), default=None)
        if nearest is None:
            return own
        return own * nearest.share / self.space.expected(nearest.candidate)

    def _known(self, way: Way) -> list[Row]:
        """Return the rows of a way that ran, or if none did, those that ran with its weights."""
        own = [row for row in self._of(way) if row.has_run]
        return own or [row for row in self._by_weights.get(way.weights, {}).values() if row.has_run]

    def _is_refused(self, way: Way) -> bool:
        return any(row.reason for row in self._of(way))

    def _of(self, way: Way) -> list[Row]:
        return self._by_way.get(way, [])

    def _ways(self) -> list[Way]:
        return list(self._by_way)

    def _rank(self, way: Way) -> tuple[bool, float]:
        best = self.goal.best(self._of(way))
        return (True, math.inf) if best is None else self.goal.key(best)

    def _promise(self, base: Way, way: Way) -> tuple[bool, float, float]:
        """Return the rank of the best known way that has what a way changes in `base`; among equals, what making it costs."""
        ((name, value),) = way.changes(base)
        known = [self._rank(other) for other in self._ways() if getattr(other, name) == value]
        return *min(known, default=(True, math.inf)), self.space.making(way)

    # On the further runs: twice as many runs for about half as many candidates, until all runs are done, or the next ones would
    # take too long. The own way is carried along, because the result is compared with it, and the full run, because shares of
    # the time are relative to it.

    def _halve(self) -> Iterator[tuple[Candidate, int]]:
        while self._done < self._runs:
            runs = range(self._done, min(2 * self._done, self._runs))
            kept = self._kept(len(runs))
            cost = sum(self.rows[one].share for one in kept if one != self.space.full)  # the full run is needed in any case
            if self.spent + len(runs) * cost > MOST * self.budget:
                return
            for candidate, run in itertools.product(kept, runs):
                if not self.rows[candidate].reason:
                    yield candidate, run
            self._done = runs.stop
            self._find_best()

    def _kept(self, runs: int) -> list[Candidate]:
        """Return the candidates for so many more runs: at most the better half, but at least two, as the budget allows."""
        rungs = math.ceil(math.log2(self._runs / self._done))
        most = max(self.budget - self.spent, 0.0) / rungs / runs
        ran = sorted(self._complete, key=self.goal.key)
        kept: list[Candidate] = []
        cost = 0.0
        for row in ran[: max(2, len(ran) // 2)]:
            if len(kept) < 2 or cost + row.share <= most:
                kept.append(row.candidate)
                cost += row.share
        plain = self.goal.best(row for row in ran if row.candidate.way == self.space.own)
        kept += [row.candidate for row in (plain, self.rows[self.space.full]) if row is not None and row.has_run]
        return sorted(dict.fromkeys(kept), key=lambda one: one.way.weights)  # so that each quantized model is made once

    # With what is left of the budget: other work on the machine may have delayed those that would otherwise be better.

    def _time_again(self) -> Iterator[tuple[Candidate, int]]:
        """Yield further runs of candidates that would be the best, had they been delayed; the nearest first."""
        repeats: collections.Counter[Candidate] = collections.Counter()
        while self.spent < self.budget:
            rows = [row for row in self.rows.values() if repeats[row.candidate] < REPEATS and self._may_be_delayed(row)]
            if not rows:
                return
            row = min(rows, key=lambda row: row.share)
            repeats[row.candidate] += 1
            yield row.candidate, next((run for run in range(self._done) if run not in row.trials), 0)
            if row.has_run and self.goal.is_met(row):
                yield from ((row.candidate, run) for run in range(self._done) if run not in row.trials and not row.reason)
                level = self._guess(row.candidate.way, self._of(row.candidate.way))
                if level is not None and not self._is_refused(row.candidate.way):
                    yield Candidate(row.candidate.way, level), 0

    def _may_be_delayed(self, row: Row) -> bool:
        """Tell whether a candidate would be better than the best one if its time were shorter by a delay."""
        best = self.best
        if best is None or not row.has_run:
            return False
        runs = [run for run in row.trials if run in best.trials]
        error, least = (sum(one.trials[run].error for run in runs) for one in (row, best))
        if self.goal.of_time:
            return not self.goal.is_met(row) and row.share <= DELAY * self.goal.limit and error < least
        return self.goal.is_met(row) and best.share < row.share <= DELAY * best.share

    def _polish(self) -> Iterator[tuple[Candidate, int]]:
        """Yield further levels, on all runs, of the ways that did all runs.

        With a limit for the time only if the best one misses it, which it then met on fewer runs.
        """
        for way in sorted(dict.fromkeys(row.candidate.way for row in self._complete), key=self._rank):
            for candidate in self._levels_on_all_runs(way):
                for run in range(self._done):
                    is_missing = candidate not in self.rows or run not in self.rows[candidate].trials
                    if is_missing and not self._is_refused(way) and self.spent < MOST * self.budget:
                        yield candidate, run

    def _levels_on_all_runs(self, way: Way) -> Iterator[Candidate]:
        while self.spent < MOST * self.budget and not self._is_refused(way) and (best := self.best) is not None:
            if self.goal.of_time and self.goal.is_met(best):
                return
            level = self._guess(way, [row for row in self._of(way) if len(row.trials) >= self._done])
            if level is None:
                return
            yield Candidate(way, level)
