"""Compare what Find Settings (IEC) chooses with an exhaustive search over the same settings, for docs/search.md.

    python tools/found_settings.py [--models unet transformer] [--minutes 60] [--table]

The built-in models, 20 steps of euler, guidance 3, four images per run; fewer steps, DeepCache, EasyCache, 8 bits and the
correction, in every combination and at every level. Each has four runs, twice with the noise and the classes that the search
gets, and twice with others, and each run is timed three times. Every row, a line of docs/results/found_settings.csv, has the
seconds and the error. Existing rows are skipped.

With --table: let the search run on these numbers, for several limits and efforts, and print how its choice compares with the
best of all, on the runs that it saw and on the others.
"""

import argparse
import csv
import itertools
import random
import statistics
import time

import benchmark
import comfyui
import pack
import torch

FILE = comfyui.ROOT / "docs/results/found_settings.csv"
STEPS = 20
SCHEDULERS = {"unet": "karras", "transformer": "simple"}
LABELS = ("face, heart, fruit, boat", "bird, clock, flag, building")  # those of the search, and the others
RUNS = range(4)
TAKES = range(3)  # how often each run is timed
SEEN = 2  # the runs that the search gets
TRIED = {"fewer_steps", "caches", "eight_bits", "correction"}
COLUMNS = ("model", "weights", "cache", "correction", "level", "run", "take", "seconds", "error", "reason")
KEY = COLUMNS[:7]
LIMITS, BUDGETS = (0.7, 0.5, 0.35), (10, 25, 60)
DRAWS = 20  # how often the search is repeated with the times drawn anew


class Settings:
    """The settings of a built-in model, and how they are measured."""

    def __init__(self, nodes, name):
        import comfy.samplers  # noqa: F401 - the host must be loaded

        host = {part: pack.pack_module(f"nodes.host.search.{part}") for part in ("space", "variants", "measuring")}
        runs = pack.pack_module("nodes.host.sampling.calibration_runs")
        self.name, builtin = name, benchmark.Builtin(nodes, name)
        prompts = [nodes["IECClassLabel"].execute(labels=LABELS[run >= SEEN]).result[0] for run in RUNS]
        sampling = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": SCHEDULERS[name]}
        latent = {"samples": torch.zeros(4, 3, 32, 32)}
        runs = runs.Runs(prompts, builtin.conditioning[1], latent, 21, 1, sampling)
        tried = {option: option in TRIED for option in (*host["space"].TRIED, "fewer_steps")}
        self.space, self.levels = host["space"].space_of(builtin.model, sampling, tried)
        self._described = host["space"].described
        variants = host["variants"].Variants(builtin.model, runs.first, self.levels)
        make = host["measuring"].Measuring
        self.measuring = lambda: make(builtin.model, variants, self.levels, runs, self.space.full, converged=False)

    def described(self, candidate):
        return self._described(self.levels, candidate)

    def key(self, candidate, run, take):
        way = candidate.way
        return self.name, way.weights, way.cache, way.correction, str(candidate.level), str(run), str(take)

    def compute(self, rows, end):
        """Add the missing rows until a time, in random order: what slows the machine for a while then falls on all of them."""
        wanted = list(itertools.product(self.space.all(), RUNS, TAKES))
        random.Random(0).shuffle(wanted)
        wanted.sort(key=lambda one: (one[2], one[0].way.weights != "none"))  # so that the quantized model is seldom made
        missing = [one for one in wanted if self.key(*one) not in rows]
        measuring = self.measuring() if missing else None
        for candidate, run, take in missing:
            if time.monotonic() >= end:
                return
            found = {"seconds": "", "error": "", "reason": ""}
            try:
                trial = measuring.measure(candidate, run)
                found |= {"seconds": f"{trial.seconds:.4f}", "error": f"{trial.error:.5g}"}
            except pack.pack_module("iec_core.search.trials").RefusedError as refusal:
                found["reason"] = str(refusal)
            add(dict(zip(KEY, self.key(candidate, run, take))) | found)


def known_rows():
    """Return {key: row} of the rows that are there."""
    if not FILE.exists():
        return {}
    with FILE.open(newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def add(row):
    """Append a row to the file."""
    is_new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            table.writeheader()
        table.writerow(row)


class Replay:
    """The rows of a model, as if they were measured again.

    idle: {candidate: Row on the runs that the search gets}, with the fastest of all times of the candidate, which is that of a
    machine without other work. others: the same with the errors on the other runs.
    """

    def __init__(self, settings, rows):
        self.settings = settings
        self.search, self.trials = (pack.pack_module(f"iec_core.search.{part}") for part in ("search", "trials"))
        self._rows = rows
        full = self._times(settings.space.full)
        self.full_seconds = min(full)
        ran = [one for one in settings.space.all() if self._times(one)]
        self.idle, self.others = (
            {one: self.trials.Row(one, self.full_seconds, {run: self._idle(one, run) for run in half}) for one in ran}
            for half in (RUNS[:SEEN], RUNS[SEEN:])
        )

    def _row(self, candidate, run, take=0):
        return self._rows[self.settings.key(candidate, run, take)]

    def _times(self, candidate):
        found = [self._row(candidate, run, take)["seconds"] for run, take in itertools.product(RUNS, TAKES)]
        return [float(seconds) for seconds in found if seconds]

    def delays(self):
        """Return, of every run, its time divided by that of the fastest with the same settings."""
        return [seconds / min(times) for one in self.idle for times in [self._times(one)] for seconds in times]

    def _idle(self, candidate, run):
        return self._trial(candidate, run, min(self._times(candidate)))

    def _trial(self, candidate, run, seconds):
        row = self._row(candidate, run)
        if row["reason"]:
            raise self.trials.RefusedError(row["reason"])
        spent = 0.0 if candidate == self.settings.space.full else seconds / self.full_seconds  # as in the node
        return self.trials.Trial(seconds, float(row["error"]), spent)

    def found(self, goal, budget, draw=None):
        """Return (the candidate that the search chooses, the number of runs). draw: chooses the times; None: the idle ones."""
        made = []

        def measure(candidate, run):
            made.append(candidate)
            if draw is None:
                return self._idle(candidate, run)
            return self._trial(candidate, run, float(self._row(candidate, run, draw.choice(TAKES))["seconds"] or 0))

        search = self.search.Search(self.settings.space, goal, measure, lambda: self.full_seconds, SEEN, budget)
        search.run()
        return search.best.candidate, len(made)


def print_table(models):
    """Print, for every limit and effort, how what is found compares with the best of all."""
    rows = known_rows()
    titles = ("best of all", "found", "error / best", "… on other runs", "as timed: error / best", "share of the time")
    benchmark.table("model", "limit", "effort", *titles, "runs", "of all")
    for settings in models:
        replay = Replay(settings, rows)
        for limit, budget in itertools.product(LIMITS, BUDGETS):
            print_row(replay, limit, budget)
    for settings in models:
        low, middle, high = statistics.quantiles(Replay(settings, rows).delays(), n=4)
        print(f"\n{settings.name}: a run takes {middle:.2f} times as long as the fastest (quartiles {low:.2f} and {high:.2f}).")


def print_row(replay, limit, budget):
    goal, described = replay.trials.Goal(True, limit), replay.settings.described
    best = goal.best(replay.idle.values())
    chosen, made = replay.found(goal, budget)
    drawn = [replay.found(goal, budget, random.Random(number))[0] for number in range(DRAWS)]
    ratios = sorted(replay.idle[one].error / best.error for one in drawn)
    shares = sorted(replay.idle[one].share for one in drawn)
    on_others = replay.others[chosen].error / goal.best(replay.others.values()).error
    benchmark.row(
        replay.settings.name, str(limit), str(budget), f"{described(best.candidate)}: {best.error:.4f}", described(chosen),
        f"{replay.idle[chosen].error / best.error:.2f}", f"{on_others:.2f}",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})",
        str(made), f"{made / (SEEN * len(replay.idle)):.2f}",
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    nodes = comfyui.load_nodes("easycache", cpu=not torch.cuda.is_available())
    models = [Settings(nodes, name) for name in arguments.models]
    if arguments.table:
        print_table(models)
        return
    with torch.inference_mode():
        for settings in models:
            settings.compute(known_rows(), end)


if __name__ == "__main__":
    main()
