"""What helps, where, at what price: the runs of `experiment_rows.py`, measured on the built-in models.

    python tools/experiments.py [--list] [--only TEXT] [--minutes N] [--again KEY] [--images KEY PATH] [--output FOLDER]

A row is a line of a CSV file in docs/results: docs/results/README.md says what is in it. Rows that are there are skipped, the
cheapest missing ones come first, and a row is written as soon as it is known. It can be stopped at any time: what was sampled
is kept in .cache/experiments, but for the less than a minute's work that a kill interrupts.
"""

import argparse
import csv
import functools
import io
import os
import pathlib
import re
import signal
import sys
import tempfile
import tomllib
from dataclasses import asdict

import classifier
import comfyui
import experiment_rows
import experiment_samples
import numpy as np
import sample_distance
from experiment_samples import CHUNK, Store, sampled
from PIL import Image

RESULTS = comfyui.ROOT / "docs/results"
CACHE = comfyui.CACHE / "experiments"
SPEED = 60  # evaluations of the built-in network for an image, a second and core; for estimates alone
# What a repeated row may have otherwise: where and when it was computed.
OF_THE_MACHINE = ("seconds", "device", "torch", "comfyui", "pack")


def number(value):
    """Return a number as the files have it, with four digits."""
    return f"{value:.4g}"


def estimate(name, found):
    """Return the columns of an Estimate: its value, and the interval's ends."""
    return {name: number(found.value), f"{name}_low": number(found.low), f"{name}_high": number(found.high)}


def versions():
    """Return the versions that a row was made with."""
    import torch

    project = tomllib.loads((comfyui.ROOT / "pyproject.toml").read_text())["project"]
    told = re.search(r"__version__ = \"(.*)\"", (comfyui.provide() / "comfyui_version.py").read_text())
    return {"torch": torch.__version__, "comfyui": told[1], "pack": project["version"]}


def features(latents):
    """Return the classifier's features of latents [N, 3, 32, 32], whose values are pixels in -1..1, as float64 [N, 64]."""
    network, _ = classifier.load()
    return network.features((latents.clamp(-1, 1) + 1) / 2).numpy()


def record(run, store, baseline):
    """Return the row of a run, a dict of texts by column, from the chunks in the store.

    baseline: the row of its run without a correction, None for one that is that itself.
    """
    latents, nfe, seconds, device = store.load_run(run)
    row = {
        "key": run.key,
        "digest": experiment_samples.row_digest(run),
        **{name: str(value) for name, value in asdict(run).items()},
    }
    row |= {"images": str(len(latents)), "seed": str(experiment_samples.SEED), "nfe": str(nfe)}
    singles = {}
    for name in ("same_steps", "exact"):
        reference, error, change = run.references.get(name), f"error_{name}", f"change_{name}"
        row |= dict.fromkeys((part + end for part in (error, change) for end in ("", "_low", "_high")), "")
        singles[f"errors_{name}"] = ""
        if reference is None:
            continue
        each = experiment_samples.errors(latents, store.load_run(reference)[0])
        row |= estimate(error, sample_distance.mean_with_interval(each))
        singles[f"errors_{name}"] = ";".join(map(number, each))
        if baseline is not None:
            before = np.array(baseline[f"errors_{name}"].split(";"), float)
            row |= estimate(change, sample_distance.mean_with_interval(each - before))
    real, of_run = features_of_real_images(), features(latents)
    for kind in sample_distance.MEASURES:
        row |= estimate(f"emoji_{kind}", sample_distance.distance_with_interval(kind, of_run, real))
    return row | {"seconds": f"{seconds:.0f}", "device": device, **versions(), **singles}


@functools.cache
def features_of_real_images():
    """Return the classifier's features of the real images that it was not trained on."""
    network, _ = classifier.load()
    return network.features(classifier.real_images()[0]).numpy()


class Results:
    """The rows in a folder of CSV files."""

    def __init__(self, folder, files):
        """files: {name: [Run, ...]}, as `experiment_rows.declared()`. Raises ValueError for a folder that cannot be one."""
        self._folder, self._files = pathlib.Path(folder), files
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"output: {folder} is no folder; name one, or one that is to be made.")
        self._rows = {}
        for name in files:
            path = self._folder / f"{name}.csv"
            if path.exists():
                with path.open(newline="") as file:
                    self._rows |= {row["key"]: row for row in csv.DictReader(file)}

    def get(self, run):
        """Return the row of a run, None where there is none of these settings, references, images and weights."""
        row = self._rows.get(run.key)
        return row if row and row["digest"] == experiment_samples.row_digest(run) else None

    def add(self, run, row):
        """Take up a row, and write its file in the order in which the runs are declared, in one move."""
        self._rows[run.key] = row
        name = next(name for name, runs in self._files.items() if run in runs)
        rows = [found for found in map(self.get, self._files[name]) if found]
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{name}.csv.partial"
        partial.write_text(text.getvalue())
        partial.replace(self._folder / f"{name}.csv")


def chunks_of(run):
    """Return the chunks, (Run, number), that a row needs: its own and its references'."""
    needed = dict.fromkeys([run, *run.references.values()])
    return [(one, number) for one in needed for number in range(experiment_rows.IMAGES // CHUNK)]


def minutes(runs, store, workers):
    """Return about how many minutes the rows of `runs` still take together."""
    missing = {chunk for run in runs for chunk in chunks_of(run) if not store.path(*chunk).exists()}
    return sum(run.evaluations * CHUNK for run, _ in missing) / SPEED / workers / 60


def in_order(runs):
    """Return runs cheapest first; of as cheap ones, and so of all, a baseline before what is compared with it."""
    return sorted(runs, key=lambda run: (run.evaluations, run != run.baseline))


def within(runs, store, workers, limit):
    """Return the first of `runs` that together take no more than about `limit` minutes."""
    while runs and minutes(runs, store, workers) > limit:
        runs = runs[:-1]
    return runs


def compute(runs, store, results, workers, on_row=print, again=False):
    """Compute the rows of `runs`, in their order, and add each to the results as soon as it and its baseline are known.

    workers: how many processes sample. on_row(run): called after each. again: also of rows that are there. Raises ValueError
    where images are not finite. An interrupt ends it when the chunks at hand are sampled.
    """
    open_runs = [run for run in runs if again or results.get(run) is None]
    chunks = dict.fromkeys(chunk for run in open_runs for chunk in chunks_of(run) if store.load(*chunk) is None)
    waiting = {run: {chunk for chunk in chunks_of(run) if chunk in chunks} for run in open_runs}
    _take_rows(waiting, store, results, on_row)
    for chunk in sampled(chunks, store, workers) if chunks else ():
        for needed in waiting.values():
            needed.discard(chunk)
        _take_rows(waiting, store, results, on_row)


def _take_rows(waiting, store, results, on_row):
    """Make the rows whose chunks are all there, and whose baseline is known; take them off `waiting`."""
    for run in [run for run, needed in waiting.items() if not needed]:
        baseline = None if run == run.baseline else results.get(run.baseline)
        if run == run.baseline or baseline is not None:
            results.add(run, record(run, store, baseline))
            del waiting[run]
            on_row(run)


def compute_again(run, results, workers):
    """Compute a row that is there without what was sampled before, replace it, and return the columns whose digits differ."""
    before = results.get(run)
    with tempfile.TemporaryDirectory() as folder:
        compute([run], Store(folder), results, workers, lambda run: None, again=True)
    after = results.get(run)
    return [name for name in after if name not in OF_THE_MACHINE and before[name] != after[name]]


def picture(latents):
    """Return an image of latents [N, 3, 32, 32] in rows of eight."""
    pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in np.split(pixels, len(pixels) // 8)]))


def named(key, runs):
    """Return the run of a key. Raises ValueError where there is none."""
    found = [run for run in runs if run.key == key]
    if not found:
        raise ValueError(f"key: '{key}' is no row; --list has them all.")
    return found[0]


def parsed(arguments):
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print all rows, whether they are there, and what they take")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows alone whose key has this text in it, and their baselines"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no more than takes about so many minutes")
    parser.add_argument("--again", metavar="KEY", help="compute a row anew, and tell whether its digits are the same")
    parser.add_argument("--images", nargs=2, metavar=("KEY", "PATH"), help="write a PNG file of a row's images")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, metavar="FOLDER", help="of the CSV files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes that sample")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Do what the command line says; return the exit status: 1 where a row came out otherwise, 2 for a wrong argument."""
    options = parsed(arguments)
    try:
        return _main(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _main(options):
    files, store = experiment_rows.declared(), Store(CACHE)
    runs, results = in_order(run for runs in files.values() for run in runs), Results(options.output, files)
    if options.workers < 1:
        raise ValueError(f"workers: {options.workers} is less than 1; one process at least samples.")
    if options.again:
        return _again(named(options.again, runs), results, options.workers)
    if options.images:
        return _images(named(options.images[0], runs), pathlib.Path(options.images[1]), store, options.workers)
    chosen = [run for run in runs if options.only in run.key]
    if not chosen:
        raise ValueError(f"only: no row's key has '{options.only}' in it; --list has them all.")
    if options.list:
        return _list(chosen, store, results, options.workers)
    wanted = in_order(dict.fromkeys(run for one in chosen for run in (one, one.baseline) if results.get(run) is None))
    if options.minutes is not None:
        wanted = within(wanted, store, options.workers, options.minutes)
    if not wanted:
        print("Nothing is missing." if options.minutes is None else "Nothing is missing that takes no longer.")
        return 0
    print(f"{len(wanted)} rows, about {minutes(wanted, store, options.workers):.0f} minutes", flush=True)
    compute(wanted, store, results, options.workers, lambda run: print(_line(results.get(run)), flush=True))
    return 0


def _line(row):
    shown = {name: row[name] for name in ("error_same_steps", "error_exact", "nfe") if row[name]}
    return "  ".join([f"{row['key']:60}", *(f"{name} {value}" for name, value in shown.items())])


def _list(runs, store, results, workers):
    for run in runs:
        state = "there" if results.get(run) else f"missing, {minutes([run], store, workers):.1f} minutes"
        print(f"{run.key:60}  {state}")
    missing = [run for run in runs if results.get(run) is None]
    print(f"{len(missing)} of {len(runs)} rows are missing, about {minutes(missing, store, workers):.0f} minutes")
    return 0


def _again(run, results, workers):
    if results.get(run) is None:
        raise ValueError(f"again: the row '{run.key}' is not there yet; compute it first.")
    if run != run.baseline and results.get(run.baseline) is None:
        raise ValueError(f"again: the row of its baseline, '{run.baseline.key}', is not there; compute it first.")
    differing = compute_again(run, results, workers)
    print(f"{run.key}: " + (f"other digits in {', '.join(differing)}" if differing else "the same digits"))
    return 1 if differing else 0


def _images(run, path, store, workers):
    own = [chunk for chunk in chunks_of(run) if chunk[0] == run and store.load(*chunk) is None]
    for _ in sampled(own, store, workers) if own else ():
        pass
    picture(store.load_run(run)[0]).save(path, "PNG")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; what was sampled is kept.")
