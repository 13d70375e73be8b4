"""The search, on synthetic trials: compared with an exhaustive search, within its budget, and stopped anywhere."""

import collections
import functools
import statistics

import numpy as np
import pytest

from iec_core.search.candidates import NONE, Candidate, Space, Way
from iec_core.search.search import MOST, Search
from iec_core.search.trials import TIMING_NOISE, Goal, RefusedError, Trial

OWN = Way("euler", "simple")
LEVELS = 20
RUNS = 8
OPTIONS = {
    "cache": ("DeepCache", "CacheQuant", "EasyCache"),
    "weights": ("8 bits", "fp8"),
    "correction": ("auto",),
    "sampler": ("dpmpp_2m", "res"),
    "scheduler": ("karras", "beta"),
}
IN_TIME, IN_ERROR = Goal(of_time=True, limit=0.5), Goal(of_time=False, limit=0.05)


def levels_of(way):
    return LEVELS if way.cache == NONE else LEVELS - 1


def expected(candidate):
    """Return the expected share of the time; in a cached step a tenth of the network is evaluated."""
    share = candidate.level / LEVELS
    return share if candidate.way.cache == NONE else share + 0.1 * (1 - share)


def searched(goal, measure, options=None, runs=RUNS, budget=40):
    """Return a search that has ended."""
    search = Search(Space(OWN, options or {}, levels_of, expected), goal, measure, lambda: 1.0, runs, budget)
    search.run()
    return search


def counted(search):
    return sum(len(row.trials) for row in search.rows.values())


class Landscape:
    """A random smooth space of 216 ways with 19 or 20 levels: the seconds and errors of every candidate on every run.

    The error falls with the level; the value of each option scales it, and quantized weights add to it. Each way and each trial
    have a random factor of their own.
    """

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        factors = {value: draw.uniform(0.6, 1.5) for values in OPTIONS.values() for value in values}
        speeds = {NONE: 1.0, "8 bits": draw.uniform(0.5, 1.1), "fp8": draw.uniform(0.6, 1.1)}
        added = {NONE: 0.0, "8 bits": draw.uniform(0, 0.03), "fp8": draw.uniform(0, 0.03)}
        self.space = Space(OWN, OPTIONS, levels_of, expected)
        self.candidates = list(self.space.all())
        self._numbers = {candidate: number for number, candidate in enumerate(self.candidates)}
        of_way = {one.way: draw.uniform(0.85, 1.15) for one in self.candidates if one.level == 1}

        def error(way, level):
            plain = 0.9 / level**1.2 if way.cache == NONE else 0.5 * (1 - level / LEVELS) / level**0.7
            scaled = plain * np.prod([factors.get(getattr(way, name), 1.0) for name in OPTIONS])
            return of_way[way] * np.hypot(scaled, added[way.weights])

        seconds = np.array([[speeds[one.way.weights] * expected(one)] for one in self.candidates])
        errors = np.array([[error(one.way, one.level)] for one in self.candidates])
        self.seconds = seconds * draw.uniform(1, 1.01, (len(seconds), RUNS))
        self.errors = errors * draw.uniform(0.9, 1.1, (len(errors), RUNS))

    def measure(self, candidate, run):
        number = self._numbers[candidate]
        seconds = float(self.seconds[number, run])
        return Trial(seconds, float(self.errors[number, run]), spent=seconds)

    def search(self, goal, runs, budget, measure=None):
        return Search(self.space, goal, measure or self.measure, lambda: 1.0, runs, budget)

    def least(self, goal, runs):
        """Return the error (with a limit for it, the share of the time) of the best of all candidates on these runs."""
        shares, errors = self.seconds[:, :runs].min(1), self.errors[:, :runs].mean(1)
        return errors[shares <= goal.limit + TIMING_NOISE].min() if goal.of_time else shares[errors <= goal.limit].min()


landscape = functools.cache(Landscape)


@pytest.mark.parametrize(
    "goal, budget, runs, seeds, bound",
    [
        (IN_TIME, 25, 4, 15, 1.15),
        (IN_TIME, 60, 8, 11, 1.02),
        (IN_ERROR, 25, 4, 15, 1.25),
        (IN_ERROR, 40, 8, 7, 1.05),
    ],
)
def test_what_is_found_is_nearly_the_best_of_all(goal, budget, runs, seeds, bound):
    ratios = []
    for seed in range(seeds):
        space = landscape(seed)
        search = space.search(goal, runs, budget)
        search.run()
        assert goal.is_met(search.best) and len(search.best.trials) == runs
        ratios.append((search.best.error if goal.of_time else search.best.share) / space.least(goal, runs))
        assert counted(search) < len(space.candidates) / 5
    assert statistics.median(ratios) <= bound


@pytest.mark.parametrize("budget, runs", [(10, 2), (25, 4), (10, 8)])
@pytest.mark.parametrize("goal", [IN_TIME, Goal(True, 0.9), IN_ERROR, Goal(False, 0.01), Goal(False, 0.001)])
def test_the_budget_is_respected(goal, budget, runs):
    for seed in range(8):
        spent = []

        def measure(candidate, run, spent=spent, seed=seed):
            trial = landscape(seed).measure(candidate, run)
            spent.append(trial.spent)
            return trial

        search = landscape(seed).search(goal, runs, budget, measure)
        search.run()
        dearest = max(spent)
        assert search.spent == pytest.approx(sum(spent))
        assert budget / 2 < search.spent <= MOST * budget + dearest
        own = max(len(row.trials) for row in search.rows.values() if row.candidate.way == OWN)
        assert min(own, len(search.best.trials)) >= search.compared >= 2


@pytest.mark.parametrize("goal", [IN_TIME, IN_ERROR])
def test_what_is_tried_is_reproducible_and_paired_and_keeps_the_own_way(goal):
    def tried():
        calls = []

        def measure(candidate, run):
            calls.append((candidate, run))
            return landscape(1).measure(candidate, run)

        search = landscape(1).search(goal, RUNS, 40, measure)
        search.run()
        return calls, search

    (calls, search), (again, _) = tried(), tried()
    assert calls == again and len(set(calls)) == len(calls)
    last = [row for row in search.rows.values() if RUNS - 1 in row.trials]
    assert len(last) >= 2 and all(set(row.trials) == set(range(RUNS)) for row in last)
    assert any(row.candidate.way == OWN for row in last)
    assert search.last.candidate == calls[-1][0]


@pytest.mark.parametrize("goal", [IN_TIME, IN_ERROR])
def test_stopped_anywhere_the_best_is_that_of_the_last_complete_rung(goal):
    """Rungs end after 1, 2 and 4 of 8 runs; one is complete when the next has begun. The runs differ in how hard they are, so
    that only errors on the same runs can be compared.
    """

    def measure(candidate, run):
        trial = landscape(2).measure(candidate, run)
        return Trial(trial.seconds, trial.error * (0.4, 0.6, 2.0, 0.4, 1.5, 0.5, 1.2, 1.0)[run], trial.spent)

    def key(row):
        share, error = (
            min(row.trials[run].seconds for run in range(done)),
            sum(row.trials[run].error for run in range(done)) / done,
        )
        met = share <= goal.limit + TIMING_NOISE if goal.of_time else error <= goal.limit
        return not met, error if met is goal.of_time else share

    search = landscape(2).search(goal, RUNS, 40, measure)
    shares, begun = [], 0
    for share in search.progress():
        shares.append(share)
        begun = max(begun, *search.last.trials)
        done = 4 if begun >= 4 else 2 if begun >= 2 else 1
        complete = [row for row in search.rows.values() if len(row.trials) >= done]
        assert search.best.candidate == min(complete, key=key).candidate, f"after {len(shares)} trials"
        if len(search.last.trials) == RUNS:
            break  # the last rung may be complete
    assert begun == RUNS - 1 and shares == sorted(shares) and shares[-1] <= 1


@pytest.mark.parametrize("goal", [IN_TIME, IN_ERROR])
def test_a_refused_candidate_is_a_row_with_its_reason_and_its_way_is_left(goal):
    def measure(candidate, run):
        if candidate.way.weights == "fp8":
            raise RefusedError("fp8 needs a newer GPU", spent=0.25)
        return landscape(3).measure(candidate, run)

    search = landscape(3).search(goal, 4, 25, measure)
    search.run()
    refused = [row for row in search.rows.values() if row.reason]
    assert refused and all((row.reason, row.trials, row.has_run) == ("fp8 needs a newer GPU", {}, False) for row in refused)
    assert len({row.candidate.way for row in refused}) == len(refused)
    spent = sum(trial.spent for row in search.rows.values() for trial in row.trials.values())
    assert search.spent == pytest.approx(spent + 0.25 * len(refused))
    assert list(search.rows.values()).index(refused[0]) < len(search.rows) - len(refused)
    assert search.best.candidate.way.weights != "fp8" and len(search.best.trials) == 4


def test_what_is_refused_on_a_later_run_is_not_run_again():
    def measure(candidate, run):
        if run == 1 and candidate.way.weights == "8 bits":
            raise RefusedError("out of memory")
        return Trial(expected(candidate) / 2, 1 / candidate.level + (candidate.way.weights == NONE), 0.5)

    search = searched(IN_TIME, measure, {"weights": ("8 bits",)}, runs=4)
    refused = [row for row in search.rows.values() if row.reason]
    assert refused and all(set(row.trials) == {0} for row in refused)
    assert search.best.candidate.way == OWN and len(search.best.trials) == 4


def test_where_all_that_is_left_is_refused_the_best_is_of_what_ran():
    def measure(candidate, run):
        if run:
            raise RefusedError("out of memory")
        return Trial(expected(candidate), 1 / candidate.level, expected(candidate))

    search = searched(IN_TIME, measure, {"scheduler": ("karras", "beta", "normal")})
    assert search.best is not None and search.best.has_run and set(search.best.trials) == {0}


def one_way(candidate, run):
    """Trials of one way, whose time does not rise in proportion to the level."""
    share = (candidate.level / LEVELS) ** 1.4
    return Trial(share, 1 / candidate.level - 1 / LEVELS, share)


@pytest.mark.parametrize("limit", [*np.arange(0.02, 1.0, 0.03), 1.0])
def test_within_a_time_the_largest_level_that_fits_is_chosen(limit):
    best = searched(Goal(True, float(limit)), one_way).best.candidate
    fit = [level for level in range(1, LEVELS + 1) if one_way(Candidate(OWN, level), 0).seconds <= limit + TIMING_NOISE]
    assert best == Candidate(OWN, max(fit))


@pytest.mark.parametrize("limit", [0.0, 0.001, *np.geomspace(0.003, 0.94, 25), 1.0])
def test_within_an_error_the_smallest_level_that_fits_is_chosen(limit):
    best = searched(Goal(False, float(limit)), one_way).best.candidate
    fit = [level for level in range(1, LEVELS + 1) if one_way(Candidate(OWN, level), 0).error <= limit]
    assert best == Candidate(OWN, min(fit))


def test_the_time_that_weights_save_goes_into_a_higher_level():
    """By its expected cost, level 10 takes half the time; 8 bits take it at level 20. What the first way with 8 bits measures
    is used at once for other ways with 8 bits.
    """

    def measure(candidate, run):
        seconds = expected(candidate) / (2 if candidate.way.weights == "8 bits" else 1)
        return Trial(seconds, (0.5 if candidate.way.scheduler == "beta" else 1) / candidate.level, seconds)

    search = searched(IN_TIME, measure, {"weights": ("8 bits",), "scheduler": ("beta",)})
    assert search.best.candidate == Candidate(Way("euler", "beta", weights="8 bits"), LEVELS)
    levels = [one.level for one in search.rows if one.way == search.best.candidate.way]
    assert levels == [LEVELS]
    assert max(one.level for one in search.rows if one.way == Way("euler", "simple", weights="8 bits")) == LEVELS


def test_a_limit_that_is_met_on_one_run_only_is_met_in_the_end():
    """On run 0 dpmpp_2m meets the limit from level 5 on, on all eight runs from level 14 on; euler never does."""

    def measure(candidate, run):
        error = 9.0 if candidate.way == OWN else (3 if run else 1) / candidate.level
        return Trial(expected(candidate), error, expected(candidate))

    search = searched(Goal(False, 0.2), measure, {"sampler": ("dpmpp_2m",)})
    assert 0 in search.rows[Candidate(Way("dpmpp_2m", "simple"), 5)].trials
    assert search.best.candidate == Candidate(Way("dpmpp_2m", "simple"), 14)
    assert search.goal.is_met(search.best) and len(search.best.trials) == RUNS


def test_a_level_that_is_refused_in_the_end_is_not_run_again():
    """As above, but dpmpp_2m cannot be run above level 10: the level that is tried next is refused on its first run."""
    refused = []

    def measure(candidate, run):
        if candidate.way != OWN and candidate.level > 10:
            refused.append(candidate)
            raise RefusedError("out of memory")
        return Trial(expected(candidate), 9.0 if candidate.way == OWN else (3 if run else 1) / candidate.level, 0.5)

    search = searched(Goal(False, 0.2), measure, {"sampler": ("dpmpp_2m",)})
    assert len(refused) == 1 and search.rows[refused[0]].reason == "out of memory"
    assert search.best.candidate == Candidate(Way("dpmpp_2m", "simple"), 10) and not search.goal.is_met(search.best)


def test_nothing_within_the_limit_gives_the_nearest():
    best = searched(Goal(True, 0.001), lambda one, run: Trial(0.3 + 0.7 * expected(one), 1 / one.level, 0.5)).best
    assert best.candidate == Candidate(OWN, 1)


def test_neighbours_differ_in_one_field_and_fit():
    """From any way, they include those that have the user's own value again."""
    options = {"cache": ("DeepCache",), "sampler": ("res", "deis")}
    space = Space(OWN, options, levels_of, expected, fits=lambda way: (way.cache, way.sampler) != ("DeepCache", "deis"))
    around = [(way.cache, way.sampler) for way in space.neighbours(Way("res", "simple", cache="DeepCache"))]
    assert around == [(NONE, "res"), ("DeepCache", "euler")]
    assert len(list(space.all())) == 3 * LEVELS + 2 * (LEVELS - 1) and space.full == Candidate(OWN, LEVELS)


def test_before_its_first_result_a_search_has_no_best():
    search = landscape(0).search(IN_TIME, RUNS, 25)
    assert search.best is None and not search.rows and search.spent == 0


def test_run_that_was_delayed_is_repeated():
    """Every third run takes four times as long, as beside other work: the level that is chosen is that of an idle machine."""
    calls = []

    def measure(candidate, run):
        calls.append(candidate)
        share = candidate.level / LEVELS
        return Trial(share * (4 if len(calls) % 3 == 0 else 1), 1 / candidate.level, share)

    search = searched(Goal(True, 0.5), measure)
    assert search.best.candidate == Candidate(OWN, 10)
    assert len(calls) > len(set(calls)) and search.spent == pytest.approx(sum(one.level for one in calls) / LEVELS)


@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("goal, level", [(Goal(True, 0.5), 10), (Goal(False, 0.1), 10)])
def test_what_missed_by_a_small_delay_is_run_again(goal, level, runs):
    """The first three runs of level 10 take 1.25 times as long. The own way has its error at level 12."""
    calls = collections.Counter()

    def measure(candidate, run):
        calls[candidate] += 1
        slow = 1.25 if candidate == best and calls[candidate] <= 3 else 1
        share = candidate.level / LEVELS
        return Trial(slow * share, (1 if candidate.way == best.way else 1.2) / candidate.level, share)

    best = Candidate(Way("euler", "karras"), level)
    search = searched(goal, measure, {"scheduler": ("karras",)}, runs)
    assert search.best.candidate == best and len(search.best.trials) == runs and calls[best] > 3
    assert search.spent == pytest.approx(sum(number * one.level / LEVELS for one, number in calls.items()))


def test_what_is_run_again_is_bounded():
    """Level 11 is too slow by a tenth, and better: it may have been delayed, until it has been run again three times."""
    calls = collections.Counter()

    def measure(candidate, run):
        calls[candidate] += 1
        return one_way(candidate, run)

    limit = one_way(Candidate(OWN, 11), 0).seconds / 1.1
    assert searched(Goal(True, limit), measure, runs=1).best.candidate == Candidate(OWN, 10)
    assert calls[Candidate(OWN, 11)] <= 4 and max(calls.values()) <= 4


def test_run_that_is_refused_when_it_is_repeated_keeps_its_first_trial():
    seen = set()

    def measure(candidate, run):
        if candidate in seen:
            raise RefusedError("out of memory", spent=0.5)
        seen.add(candidate)
        share = candidate.level / LEVELS
        return Trial(3 * share if candidate.level < LEVELS else share, 1 / candidate.level, share)

    search = searched(Goal(True, 0.5), measure, runs=1)
    late = [row for row in search.rows.values() if row.candidate.level < LEVELS]
    assert late and all(row.has_run for row in search.rows.values())
    assert late[0].trials[0].seconds == 3 * late[0].candidate.level / LEVELS
    assert search.spent > sum(row.trials[0].spent for row in search.rows.values())


def test_faster_full_run_raises_all_shares():
    """The full run takes 1.25 s, until the second run shows that an idle machine needs 1 s."""
    full = [1.25]

    def measure(candidate, run):
        if run:
            full[0] = 1.0
        return Trial(candidate.level / LEVELS, 1 / candidate.level, candidate.level / LEVELS)

    search = Search(Space(OWN, {}, levels_of, expected), Goal(True, 0.5), measure, lambda: full[0], 2, 40)
    for _ in search.progress():
        assert all(row.share == pytest.approx(row.candidate.level / LEVELS / full[0]) for row in search.rows.values())
    assert full == [1.0] and search.best.candidate == Candidate(OWN, 10)
