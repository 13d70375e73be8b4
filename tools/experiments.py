"""Measure which corrections help, where, and at what cost: the runs of `experiment_rows.py` on the built-in models.

    python tools/experiments.py [--scale full] [--list] [--only TEXT] [--minutes N] [--again KEY] [--images KEY PATH]

A row is a line of a CSV file in docs/results: docs/results/README.md describes its columns. Existing rows are skipped, the
cheapest missing rows come first, and each row is written as soon as it is known. The command can be stopped at any time:
samples are kept in .cache/experiments, and a kill loses less than a minute of work. With RAY_ADDRESS, the workers of a Ray
cluster sample: see experiment_ray.py.
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
import experiment_ray
import experiment_rows
import experiment_samples
import imagenet
import numpy as np
import sample_distance
import torch
from experiment_samples import Store, sampled
from PIL import Image

RESULTS = comfyui.ROOT / "docs/results"
CACHE = comfyui.CACHE / "experiments"
SPEED = 100  # evaluations of a built-in network per second and CPU core, for one image, for estimates; measured: 50 to 170
RESAMPLES = 200  # of the bootstrap of a distance
# Columns that may change when a row is repeated: where and when it was computed.
OF_THE_MACHINE = ("seconds", "seconds_an_image", "device", "torch", "comfyui", "pack")


def number(value):
    """Return a number as text with four digits, as in the files."""
    return f"{value:.4g}"


def estimate(name, found):
    """Return the columns of an Estimate: its value and the ends of its interval; empty for None."""
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), "")
    return {name: number(found.value), f"{name}_low": number(found.low), f"{name}_high": number(found.high)}


@functools.cache
def versions():
    """Return the columns of the software versions that a row is made with."""
    project = tomllib.loads((comfyui.ROOT / "pyproject.toml").read_text())["project"]
    told = re.search(r"__version__ = \"(.*)\"", (comfyui.provide() / "comfyui_version.py").read_text())
    return {"torch": torch.__version__, "comfyui": told[1], "pack": project["version"]}


@functools.cache
def real_features():
    """Return {network: features float64 [N, 64] of real images}: the classifier's on the images that it was not trained on, the
    ImageNet network's on all images.
    """
    emoji = classifier.load()[0].features(classifier.real_images()[0])
    return {"emoji": emoji.numpy(), "imagenet": imagenet.real().components.numpy()}


def record(row, store):
    """Return a Row as a dict of texts by column, from the chunks in the store."""
    run, found = row.run, {name: store.load_run(row, run) for name, run in row.run.references.items()}
    own, nfe, seconds, device = store.load_run(row, run)
    took = {"seconds": f"{sum(seconds):.0f}", "seconds_an_image": number(np.median(seconds) / row.chunk)}
    references = {name: tensors for name, (tensors, *_) in found.items()}
    told = {"key": row.key, "digest": experiment_samples.row_digest(row)}
    told |= {name: str(value) for name, value in asdict(run).items()}
    told |= {"images": str(row.images), "chunk": str(row.chunk), "seed": str(experiment_samples.SEED), "nfe": str(nfe)}
    told |= _errors(run, own, references) | _distances(own, references.get("baseline"))
    each = {f"errors_{name}": told.pop(f"errors_{name}") for name in ("same_steps", "exact")}
    return told | {**took, "device": device, **versions(), **each}


def _errors(run, own, references):
    """Return the columns of the errors to the references, and of their changes from the baseline, image by image.

    A baseline with another number of steps gives no change of the error to the run of as many steps.
    """
    told, baseline = {}, references.get("baseline")
    for name in ("same_steps", "exact"):
        error, change = f"error_{name}", f"change_{name}"
        told |= estimate(error, None) | estimate(change, None) | {f"errors_{name}": ""}
        if name not in references:
            continue
        reference = references[name]["latents"]
        errors = experiment_samples.errors(own["latents"], reference)
        told |= estimate(error, sample_distance.mean_with_interval(errors)) | {f"errors_{name}": ";".join(map(number, errors))}
        if baseline is not None and not (name == "same_steps" and run.instead_of):
            before = experiment_samples.errors(baseline["latents"], reference)
            told |= estimate(change, sample_distance.mean_with_interval(errors - before))
    return told


def _distances(own, baseline):
    """Return the columns of the distances to the real images in both networks' features, and of their changes from the
    baseline.
    """
    told = {}
    for network, real in real_features().items():
        before = None if baseline is None else baseline[network].numpy()
        for kind in sample_distance.MEASURES:
            name = f"{network}_{kind}"
            distance, change = sample_distance.measured(kind, own[network].numpy(), real, before, RESAMPLES)
            told |= estimate(name, distance) | estimate(f"change_{name}", change)
    return told


class Results:
    """The rows in a folder of CSV files."""

    def __init__(self, folder, files, digest=experiment_samples.row_digest):
        """Read the files. Raises ValueError if the folder cannot be one.

        files: {name: [row, ...]}, rows with `file` and `key`, such as `experiment_rows.declared()`. digest(row): changes with
        everything that changes the row's result, so that an outdated row is not used.
        """
        self._folder, self._files, self._digest = pathlib.Path(folder), files, digest
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"output: {folder} is no folder; name one, or one that is to be made.")
        self._rows = {}
        for name in files:
            path = self._folder / f"{name}.csv"
            if path.exists():
                with path.open(newline="") as file:
                    self._rows |= {(name, row["key"]): row for row in csv.DictReader(file)}

    def get(self, row):
        """Return the columns of a row, None if no row with its digest is known."""
        found = self._rows.get((row.file, row.key))
        return found if found and found["digest"] == self._digest(row) else None

    def add(self, row, columns):
        """Add a row, and write its file in one move, in the declared order of rows."""
        self._rows[row.file, row.key] = columns
        name = row.file
        rows = [found for found in map(self.get, self._files[name]) if found]
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{name}.csv.partial"
        partial.write_text(text.getvalue())
        partial.replace(self._folder / f"{name}.csv")


def list_rows(rows, results):
    """Print the rows of a Results, and whether they are there."""
    for row in rows:
        print(f"{row.key:60}  {'there' if results.get(row) else 'missing'}")


def minutes(rows, store, workers):
    """Return about how many CPU minutes the rows still take together."""
    missing = {chunk for row in rows for chunk in row.chunks if not store.path(chunk).exists()}
    calibrations = {chunk.run.model: chunk.run.calibration for chunk in missing}  # each worker calibrates for itself
    total = sum(chunk.run.evaluations * chunk.size for chunk in missing) + sum(calibrations.values()) * workers
    return total / SPEED / workers / 60


def in_order(rows):
    """Return rows cheapest first; at equal cost, a baseline before the rows that are compared with it."""
    return sorted(rows, key=lambda row: (row.run.evaluations * row.images, row.run != row.run.baseline))


def within(rows, store, workers, limit):
    """Return the first rows that together take at most about `limit` minutes."""
    while rows and minutes(rows, store, workers) > limit:
        rows = rows[:-1]
    return rows


def compute(rows, store, results, workers, on_row=print, again=False):
    """Compute rows in their order, and add each row to the results as soon as it is known.

    workers: number of processes that sample. on_row(row): called after each row. again: also compute existing rows. Raises
    ValueError if images are not finite. On an interrupt, the current chunks are finished first.
    """
    open_rows = [row for row in rows if again or results.get(row) is None]
    chunks = dict.fromkeys(chunk for row in open_rows for chunk in row.chunks if store.load(chunk) is None)
    waiting = {row: {chunk for chunk in row.chunks if chunk in chunks} for row in open_rows}
    _take_rows(waiting, store, results, on_row)
    for chunk in sampled(chunks, store, workers) if chunks else ():
        for needed in waiting.values():
            needed.discard(chunk)
        _take_rows(waiting, store, results, on_row)


def _take_rows(waiting, store, results, on_row):
    """Record the rows whose chunks are all there, and remove them from `waiting`."""
    for row in [row for row, needed in waiting.items() if not needed]:
        results.add(row, record(row, store))
        del waiting[row]
        on_row(row)


def compute_again(row, results, workers):
    """Compute an existing row without using stored samples, replace it, and return the columns whose digits differ."""
    before = results.get(row)
    with tempfile.TemporaryDirectory() as folder:
        compute([row], Store(folder), results, workers, lambda row: None, again=True)
    return differing(before, results.get(row))


def differing(before, after):
    """Return the columns in which a row's digits differ from the earlier ones."""
    return [name for name in after if name not in OF_THE_MACHINE and before.get(name) != after[name]]


def picture(latents):
    """Return an image of latents [N, 3, 32, 32] in rows of eight."""
    pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in np.split(pixels, len(pixels) // 8)]))


def named(key, rows):
    """Return the rows with this key, from every file that has one. Raises ValueError if there is none."""
    found = [row for row in rows if row.key == key]
    if not found:
        raise ValueError(f"key: '{key}' is no row; --list has them all.")
    return found


def default_workers():
    """Return the number of processes that sample: one per CPU core, or a single one on a GPU."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def parsed(arguments):
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print all rows, whether they are there, and what they take")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only rows that have this text in their file and key, and their baselines"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="compute only as many rows as take at most about N minutes")
    parser.add_argument("--again", metavar="KEY", help="compute a row again, and tell whether its digits are the same")
    parser.add_argument("--images", nargs=2, metavar=("KEY", "PATH"), help="write a PNG file of a row's images")
    scales = experiment_rows.SCALES
    parser.add_argument(
        "--scale", choices=scales, default=scales[0], help="images a row: as many as a question needs, or 2,048, for a GPU"
    )
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="of the CSV files, docs/results unless named")
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="processes that sample")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command line; return the exit status: 1 if a repeated row has other digits, 2 for a wrong argument."""
    options = parsed(arguments)
    try:
        return _main(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _main(options):
    if options.workers < 1:
        raise ValueError(f"workers: {options.workers} is less than 1; one process at least samples.")
    folder = options.output or (RESULTS if options.scale == "small" else RESULTS / options.scale)
    files, store = experiment_rows.declared(options.scale, chunk_size(options.scale)), Store(CACHE)
    rows, results = in_order(row for rows in files.values() for row in rows), Results(folder, files)
    if options.again:
        return _again(named(options.again, rows), results, options.workers)
    if options.images:
        return _images(named(options.images[0], rows)[-1], pathlib.Path(options.images[1]), store, options.workers)
    chosen = [row for row in rows if options.only in f"{row.file} {row.key}"]
    if not chosen:
        raise ValueError(f"only: no row has '{options.only}' in its file and key; --list has them all.")
    if options.list:
        return _list(chosen, store, results, options.workers)
    wanted = in_order(dict.fromkeys(row for one in chosen for row in (one, one.baseline) if results.get(row) is None))
    if options.minutes is not None:
        wanted = within(wanted, store, options.workers, options.minutes)
    if not wanted:
        print("Nothing is missing." if options.minutes is None else "Nothing is missing that fits into these minutes.")
        return 0
    wanted, refused = without_weights(wanted)
    print(f"{len(wanted)} rows, about {minutes(wanted, store, options.workers):.0f} minutes of a CPU", flush=True)
    compute(wanted, store, results, options.workers, lambda row: print(_line(row, results.get(row)), flush=True))
    return said(refused)


def said(refused):
    """Print why some rows could not be computed, a sentence each; return the exit status, 2 if there are any."""
    for sentence in refused:
        print(sentence, file=sys.stderr)
    return 2 if refused else 0


def without_weights(wanted):
    """Return (the rows, or other things with a `run`, whose weights are there; a sentence for each missing kind of weights)."""
    kept, refused = [], {}
    for one in wanted:
        try:
            experiment_samples.weights_path(one.run)
            kept.append(one)
        except ValueError as error:
            refused[one.run.weights] = str(error)
    return kept, list(refused.values())


def chunk_size(scale):
    """Return how many images are sampled at once.

    At scale "full": as many as the machine or the cluster has memory for. Otherwise 8, so that any machine can reproduce what
    is published from a CPU.
    """
    if scale == "small":
        return experiment_rows.CHUNK
    return experiment_ray.at_once() if experiment_ray.is_wanted() else experiment_samples.at_once()


def _line(row, columns):
    shown = {name: columns[name] for name in ("error_same_steps", "error_exact", "imagenet_frechet", "nfe") if columns[name]}
    return "  ".join([f"{row.file:12} {row.key:60}", *(f"{name} {value}" for name, value in shown.items())])


def _list(rows, store, results, workers):
    for row in rows:
        state = "there" if results.get(row) else f"missing, {minutes([row], store, workers):.1f} minutes"
        print(f"{row.file:12} {row.key:60}  {state}")
    missing = [row for row in rows if results.get(row) is None]
    print(f"{len(missing)} of {len(rows)} rows are missing, about {minutes(missing, store, workers):.0f} minutes of a CPU")
    return 0


def _again(rows, results, workers):
    there = [row for row in rows if results.get(row) is not None]
    if not there:
        raise ValueError(f"again: the row '{rows[0].key}' is not there yet; compute it first.")
    status = 0
    for row in there:
        changed = compute_again(row, results, workers)
        status |= bool(changed)
        print(f"{row.file} {row.key}: " + (f"other digits in {', '.join(changed)}" if changed else "the same digits"))
    return status


def _images(row, path, store, workers):
    own = [chunk for chunk in row.chunks_of(row.run) if store.load(chunk) is None]
    for _ in sampled(own, store, workers) if own else ():
        pass
    picture(store.load_run(row, row.run)[0]["latents"]).save(path, "PNG")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl+C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; what was sampled is kept.")
