"""The result of a search in words, and as a table."""

from collections.abc import Callable, Iterable, Sequence

from .candidates import NONE, Candidate
from .search import Search
from .trials import Row

HEADER = ("settings", "share of the time", "error", "runs", "")


def verdict(search: Search, described: Callable[[Candidate], str]) -> str:
    """Return the sentences that say what was found, and what else the same time or error would give.

    described(candidate): its settings in words.
    """
    best, goal = search.best, search.goal
    if best is None:
        reasons = {row.reason for row in search.rows.values()}
        return f"Nothing could be run: {'; '.join(sorted(reasons)) or 'the search was stopped before its first result'}."
    best = best.on(search.compared)
    found = f"{described(best.candidate)} at {best.share:.2f} of the time: error {best.error:.3g} ({_runs(search.compared)})."
    if not goal.is_met(best):
        asked = f"{goal.limit:g} of the time" if goal.of_time else f"an error of {goal.limit:g}"
        found = f"Nothing that was tried is within {asked}. The nearest: {found}"
    rivals = _rivals(search, best)
    if rivals and goal.of_time:
        found += f" In the same time: {', '.join(f'{described(row.candidate)} {row.error:.3g}' for row in rivals)}."
    elif rivals:
        found += f" Within the same error: {', '.join(f'{described(row.candidate)} {row.share:.2f}' for row in rivals)}."
    return found + _correction(search, best)


def _rivals(search: Search, best: Row) -> list[Row]:
    """Return the best row within the limit of the user's own way, and of each cache that the best one does not have.

    They are compared on the runs that all of them did.
    """
    own, rows = search.space.own, [row for row in search.rows.values() if len(row.trials) >= search.compared]
    caches = [cache for cache in dict.fromkeys(row.candidate.way.cache for row in rows) if cache != best.candidate.way.cache]
    groups = [[row for row in rows if row.candidate.way == own]]
    groups += [[row for row in rows if row.candidate.way.cache == cache] for cache in caches if cache != NONE]
    found = [search.goal.best(row.on(search.compared) for row in group) for group in groups]
    return [row for row in found if row is not None and row.candidate != best.candidate and search.goal.is_met(row)]


def _correction(search: Search, best: Row) -> str:
    """Return what the correction changes, where the best candidate was measured with and without it on the same runs."""
    if not search.space.options.get("correction"):
        return ""
    for row in search.rows.values():
        way, other = best.candidate.way, row.candidate.way
        is_pair = row.candidate.level == best.candidate.level and [name for name, _ in other.changes(way)] == ["correction"]
        if row.has_run and is_pair and set(best.trials) & set(row.trials):
            common = set(best.trials) & set(row.trials)
            mine, its = (_error_on(one, common) for one in (best, row))
            without = "No correction: with it" if way.correction == NONE else "Without the correction"
            return f" {without} the error is {its:.3g} instead of {mine:.3g} ({_runs(len(common))})."
    return ""


def _runs(number: int) -> str:
    return f"{number} run{'s' if number > 1 else ''}"


def _error_on(row: Row, runs: Iterable[int]) -> float:
    errors = [row.trials[run].error for run in runs]
    return sum(errors) / len(errors)


def table(rows: Sequence[Row], search: Search, described: Callable[[Candidate], str]) -> list[tuple[str, ...]]:
    """Return the lines of the table below HEADER as texts: the candidates that ran, best first, then those refused."""
    ran = sorted((row for row in rows if row.has_run), key=lambda row: (-len(row.trials), search.goal.key(row)))
    lines: list[tuple[str, ...]] = []
    for row in ran:
        numbers = f"{row.share:.3f}", f"{row.error:.4g}", str(len(row.trials))
        lines.append((described(row.candidate), *numbers, "chosen" if row is search.best else ""))
    return lines + [(described(row.candidate), "", "", str(len(row.trials)), row.reason) for row in rows if row.reason]
