"""What a search says about its result, in full."""

from types import SimpleNamespace

import pytest

from iec_core.search.candidates import NONE, Candidate, Space, Way
from iec_core.search.search import Search
from iec_core.search.trials import Goal, RefusedError, Row, Trial
from iec_core.search.verdict import HEADER, table, verdict

IN_TIME, IN_ERROR = Goal(of_time=True, limit=0.5), Goal(of_time=False, limit=0.05)
SPACE = Space(Way("euler", "simple"), {"correction": ("auto",)}, lambda way: 20, lambda candidate: candidate.level / 20)


def row(level, share, errors, reason="", **changes):
    """Return the row of a candidate with an error on each run. changes: fields of its Way, of euler on simple."""
    trials = {run: Trial(2 * share, error, share) for run, error in enumerate(errors)}
    return Row(Candidate(Way(**{"sampler": "euler", "scheduler": "simple", **changes}), level), 2.0, trials, reason)


def ended(goal, *rows, space=SPACE):
    """Return a search that has ended with these rows; the best is among those with the most runs."""
    most = max(len(row.trials) for row in rows)
    best = goal.best(row for row in rows if len(row.trials) == most)
    return SimpleNamespace(goal=goal, space=space, rows={row.candidate: row for row in rows}, best=best, compared=most)


def described(candidate):
    way = candidate.way
    names = [value for value in (way.sampler, way.weights, way.cache) if value not in ("euler", NONE)]
    return " ".join((*names, str(candidate.level), *(["corrected"] if way.correction != NONE else [])))


def said(goal, *rows, **more):
    return verdict(ended(goal, *rows, **more), described)


FULL = row(20, 1.0, [0.0])
BEST = row(8, 0.49, [0.01, 0.03], weights="8 bits", cache="DeepCache")
FOUND = "8 bits DeepCache 8 at 0.49 of the time: error 0.02 (2 runs)."


def test_the_result_alone():
    assert said(IN_TIME, FULL, BEST) == FOUND
    assert said(IN_ERROR, BEST, row(9, 0.6, [0.01, 0.01])) == FOUND + " Within the same error: 9 0.60."
    assert said(IN_TIME, row(3, 0.15, [0.125])) == "3 at 0.15 of the time: error 0.125 (1 run)."


def test_rivals_in_the_same_time():
    """The best of the user's own way, and of each cache that the best one does not have."""
    own = row(10, 0.5, [0.05, 0.07])
    easy = row(5, 0.5, [0.03, 0.04], cache="EasyCache", sampler="res")
    others = row(9, 0.45, [0.06, 0.08]), row(4, 0.4, [0.04, 0.05], cache="EasyCache"), row(7, 0.4, [0.03, 0.03], sampler="res")
    same_cache = row(7, 0.45, [0.02, 0.03], cache="DeepCache")
    others = *others, row(8, 0.4, [0.01]), row(3, 0.4, [0.01], cache="EasyCache")  # better, but on fewer runs
    assert (
        said(IN_TIME, FULL, own, easy, *others, same_cache, BEST)
        == f"{FOUND} In the same time: 10 0.06, res EasyCache 5 0.035."
    )


def test_rivals_within_the_same_error():
    own, easy = row(12, 0.6, [0.04, 0.05]), row(11, 0.55, [0.05, 0.05], cache="EasyCache")
    dearer = row(13, 0.65, [0.03, 0.03]), row(12, 0.58, [0.01, 0.01], cache="EasyCache")
    assert said(IN_ERROR, *dearer, own, easy, BEST) == f"{FOUND} Within the same error: 12 0.60, EasyCache 11 0.55."


@pytest.mark.parametrize("goal", [IN_TIME, IN_ERROR])
def test_rivals_have_as_many_runs_and_are_within_the_limit(goal):
    fewer = row(10, 0.5, [0.05]), row(5, 0.5, [0.03], cache="EasyCache")
    beyond = row(11, 0.52, [0.2, 0.2]), row(6, 0.6, [0.1, 0.1], cache="EasyCache")
    refused = row(4, 0.4, [0.04, 0.04], reason="out of memory", cache="CacheQuant")
    assert said(goal, *fewer, *beyond, refused, BEST) == FOUND


def test_a_search_that_was_stopped_compares_on_the_runs_that_all_did():
    best, own = row(8, 0.49, [0.01, 0.03, 0.5], cache="DeepCache"), row(10, 0.5, [0.05, 0.07])
    search = ended(IN_TIME, best, own)
    search.compared = 2
    found = "DeepCache 8 at 0.49 of the time: error 0.02 (2 runs). In the same time: 10 0.06."
    assert verdict(search, described) == found


def test_the_best_is_not_its_own_rival():
    own = row(10, 0.5, [0.05, 0.07])
    assert said(IN_TIME, FULL, own) == "10 at 0.50 of the time: error 0.06 (2 runs)."


def test_what_the_correction_changes():
    """On the runs that both did, at the same level, with nothing else changed."""
    plain = row(9, 0.4, [0.02, 0.04])
    corrected = row(9, 0.5, [0.01, 0.02], correction="auto")
    found = "9 corrected at 0.50 of the time: error 0.015 (2 runs)."
    assert (
        said(IN_TIME, row(9, 0.4, [0.02]), corrected)
        == f"{found} Without the correction the error is 0.02 instead of 0.01 (1 run)."
    )
    assert said(IN_TIME, plain, corrected) == (
        f"{found} In the same time: 9 0.03. Without the correction the error is 0.03 instead of 0.015 (2 runs)."
    )
    other = row(8, 0.4, [0.02, 0.04]), row(9, 0.5, [0.03, 0.06], sampler="res", weights="8 bits")
    assert said(IN_TIME, *other, corrected) == f"{found} In the same time: 8 0.03."


@pytest.mark.parametrize("goal", [IN_TIME, IN_ERROR])
def test_that_no_correction_is_better(goal):
    worse = row(8, 0.5, [0.016], weights="8 bits", cache="DeepCache", correction="auto")
    assert said(goal, worse, BEST) == f"{FOUND} No correction: with it the error is 0.016 instead of 0.01 (1 run)."
    refused = row(8, 0.5, [0.02], "out of memory", weights="8 bits", cache="DeepCache", correction="auto")
    assert said(goal, refused, BEST) == FOUND
    space = Space(SPACE.own, {"cache": ("DeepCache",)}, SPACE.levels, SPACE.expected)
    assert said(goal, worse, BEST, space=space) == FOUND


def test_nothing_within_the_limit_names_the_nearest():
    rows = row(1, 0.625, [0.5]), row(2, 0.7, [0.4]), FULL
    nearest = "1 at 0.62 of the time: error 0.5 (1 run)."
    assert said(IN_TIME, *rows) == f"Nothing that was tried is within 0.5 of the time. The nearest: {nearest}"
    nearest = "2 at 0.70 of the time: error 0.4 (1 run)."
    assert said(IN_ERROR, *rows[:2]) == f"Nothing that was tried is within an error of 0.05. The nearest: {nearest}"


def test_nothing_ran_says_why():
    def refuse(candidate, run):
        raise RefusedError("out of memory" if candidate.way.correction == NONE else "cannot be corrected")

    search = Search(SPACE, IN_TIME, refuse, lambda: 1.0, 4, 10)
    assert verdict(search, described) == "Nothing could be run: the search was stopped before its first result."
    search.run()
    assert verdict(search, described) == "Nothing could be run: cannot be corrected; out of memory."
    assert table(list(search.rows.values()), search, described) == [
        ("20", "", "", "0", "out of memory"),
        ("10 corrected", "", "", "0", "cannot be corrected"),
    ]


def test_the_table_lists_the_best_first_and_the_refused_last():
    late = row(5, 0.25, [0.1], reason="out of memory", weights="fp8")
    never = row(4, 0.2, [], reason="fp8 needs a newer GPU", weights="fp8")
    beyond, own, once = row(9, 0.6, [0.001, 0.001]), row(10, 0.5, [0.05, 0.07]), row(7, 0.3501, [0.012345])
    search = ended(IN_TIME, late, once, beyond, never, own, FULL, BEST)
    lines = table(list(search.rows.values()), search, described)
    assert lines == [
        ("8 bits DeepCache 8", "0.490", "0.02", "2", "chosen"),
        ("10", "0.500", "0.06", "2", ""),
        ("9", "0.600", "0.001", "2", ""),
        ("7", "0.350", "0.01235", "1", ""),
        ("20", "1.000", "0", "1", ""),
        ("fp8 5", "", "", "1", "out of memory"),
        ("fp8 4", "", "", "0", "fp8 needs a newer GPU"),
    ]
    assert all(len(line) == len(HEADER) for line in lines)
