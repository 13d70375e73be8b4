"""Measure the times of the runs among which a user chooses, for docs/results/times.csv.

    python tools/times.py [--list] [--again]

One process with one thread samples eight images by each run in turn, round after round; the machine must be otherwise idle. In
each round, a run's seconds are divided by the seconds of the model's plain run (20 euler steps without cache and correction).
The run's time is the median of these ratios. All runs are measured together: a stop loses them all. About 20 minutes on a CPU.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar

import experiment_rows
import experiment_samples
import experiments
import numpy as np
import torch
from experiment_rows import CHUNK, Run

ROUNDS = 3


@dataclass(frozen=True)
class TimeRow:
    """A line of the file: a run whose time is measured."""

    run: Run
    file: ClassVar[str] = "times"

    @property
    def key(self):
        return self.run.key

    @property
    def plain(self):
        """The row of the plain run, which is the unit of this row's time."""
        return TimeRow(Run(architecture=self.run.architecture, scheduler=self.run.scheduler))


def declared():
    """Return {file name without suffix: [TimeRow, ...]} of the runs of the question which run to choose."""
    return {TimeRow.file: [TimeRow(row.run) for row in experiment_rows.declared()["choices"]]}


def digest(row):
    """Return the digest of a row. Weights do not change the time."""
    return experiment_samples.digest_of([asdict(row.run), CHUNK, ROUNDS])


def results(folder=experiments.RESULTS):
    """Return the Results of a folder."""
    return experiments.Results(folder, declared(), digest)


def measured(rows, sample, rounds=ROUNDS, on_round=lambda number: None):
    """Return {row: [seconds of each round]}.

    sample(run): samples a run once, and returns the seconds it took. Each MODEL is warmed up by its shortest run.
    """
    shortest = {}
    for row in sorted(rows, key=lambda row: row.run.evaluations):
        shortest.setdefault(row.run.model, row.run)
    for run in shortest.values():
        sample(run)
    seconds = {row: [] for row in rows}
    for number in range(rounds):
        on_round(number)
        for row in rows:
            seconds[row].append(sample(row.run))
    return seconds


def columns(row, seconds):
    """Return a row as a dict of texts by column; seconds: the result of `measured`."""
    shares = np.divide(seconds[row], seconds[row.plain])
    told = {"key": row.key, "digest": digest(row)}
    told |= {"time": np.median(shares), "time_low": shares.min(), "time_high": shares.max()}
    told["seconds_an_image"] = np.median(seconds[row]) / CHUNK
    texts = {name: value if isinstance(value, str) else experiments.number(value) for name, value in told.items()}
    return texts | {"rounds": str(len(shares)), "device": experiment_samples.device(), **experiments.versions()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print all runs, and whether their times are there")
    parser.add_argument("--again", action="store_true", help="measure all anew, whether they are there or not")
    options, found, rows = parser.parse_args(arguments), results(), declared()[TimeRow.file]
    if options.list:
        experiments.list_rows(rows, found)
        return 0
    if all(map(found.get, rows)) and not options.again:
        print("times: nothing is missing.")
        return 0
    sampler = experiment_samples.prepare()
    with torch.inference_mode():
        seconds = measured(
            rows,
            lambda run: sampler.chunk(experiment_rows.Chunk(run, 0, CHUNK))[2],
            on_round=lambda number: print(f"round {number + 1} of {ROUNDS}, {len(rows)} runs", flush=True),
        )
    for row in rows:
        found.add(row, columns(row, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
