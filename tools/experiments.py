"""What helps, where, at what price: the runs of `experiment_rows.py`, measured on the built-in models.

    python tools/experiments.py [--scale full] [--list] [--only TEXT] [--minutes N] [--again KEY] [--images KEY PATH]

A row is a line of a CSV file in docs/results: docs/results/README.md says what is in it. Rows that are there are skipped, the
cheapest missing ones come first, and a row is written as soon as it is known. It can be stopped at any time: what was sampled
is kept in .cache/experiments, but for the less than a minute's work that a kill interrupts. With RAY_ADDRESS the workers of a
Ray cluster sample: experiment_ray.py says how.
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
SPEED = 100  # evaluations of a built-in network for an image, a second and CPU core, for estimates; measured: 50 to 170
RESAMPLES = 200  # of the bootstrap of a distance
# What a repeated row may have otherwise: where and when it was computed.
OF_THE_MACHINE = ("seconds", "seconds_an_image", "device", "torch", "comfyui", "pack")


def number(value):
    """Return a number as the files have it, with four digits."""
    return f"{value:.4g}"


def estimate(name, found):
    """Return the columns of an Estimate: its value, and the interval's ends; empty ones for None."""
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), "")
    return {name: number(found.value), f"{name}_low": number(found.low), f"{name}_high": number(found.high)}


@functools.cache
def versions():
    """Return the versions that a row was made with."""
    project = tomllib.loads((comfyui.ROOT / "pyproject.toml").read_text())["project"]
    told = re.search(r"__version__ = \"(.*)\"", (comfyui.provide() / "comfyui_version.py").read_text())
    return {"torch": torch.__version__, "comfyui": told[1], "pack": project["version"]}


@functools.cache
def real_features():
    """Return {network: features float64 [N, 64] of real images}: the classifier's of those that it was not trained on, the
    ImageNet network's of all.
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
    """Return the columns of the errors to the references, and of their change against the baseline, image by image. A baseline
    of other steps has no error to a run of as many.
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
    """Return the columns of the distances to the real images in both networks' features, and of their change against the
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
        """files: {name: [row, ...]}, rows with `file` and `key`, such as `experiment_rows.declared()`. digest(row): what tells
        what is known of it from what was computed in another way. Raises ValueError for a folder that cannot be one.
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
        """Return what is known of a row, None where there is nothing of this digest."""
        found = self._rows.get((row.file, row.key))
        return found if found and found["digest"] == self._digest(row) else None

    def add(self, row, columns):
        """Take up a row, and write its file in the order in which the rows are declared, in one move."""
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
    """Return about how many minutes of a CPU the rows still take together."""
    missing = {chunk for row in rows for chunk in row.chunks if not store.path(chunk).exists()}
    calibrations = {chunk.run.model: chunk.run.calibration for chunk in missing}  # made by each worker
    total = sum(chunk.run.evaluations * chunk.size for chunk in missing) + sum(calibrations.values()) * workers
    return total / SPEED / workers / 60


def in_order(rows):
    """Return rows cheapest first; of as cheap ones, a baseline before what is compared with it."""
    return sorted(rows, key=lambda row: (row.run.evaluations * row.images, row.run != row.run.baseline))


def within(rows, store, workers, limit):
    """Return the first of the rows that together take no more than about `limit` minutes."""
    while rows and minutes(rows, store, workers) > limit:
        rows = rows[:-1]
    return rows


def compute(rows, store, results, workers, on_row=print, again=False):
    """Compute rows, in their order, and add each to the results as soon as it is known.

    workers: how many processes sample. on_row(row): called after each. again: also of rows that are there. Raises ValueError
    where images are not finite. An interrupt ends it when the chunks at hand are sampled.
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
    """Make the rows whose chunks are all there; take them off `waiting`."""
    for row in [row for row, needed in waiting.items() if not needed]:
        results.add(row, record(row, store))
        del waiting[row]
        on_row(row)


def compute_again(row, results, workers):
    """Compute a row that is there without what was sampled before, replace it, and return the columns whose digits differ."""
    before = results.get(row)
    with tempfile.TemporaryDirectory() as folder:
        compute([row], Store(folder), results, workers, lambda row: None, again=True)
    return differing(before, results.get(row))


def differing(before, after):
    """Return the columns in which a row's digits differ from those that it had before."""
    return [name for name in after if name not in OF_THE_MACHINE and before.get(name) != after[name]]


def picture(latents):
    """Return an image of latents [N, 3, 32, 32] in rows of eight."""
    pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in np.split(pixels, len(pixels) // 8)]))


def named(key, rows):
    """Return the rows of a key, of every file that has it. Raises ValueError where there is none."""
    found = [row for row in rows if row.key == key]
    if not found:
        raise ValueError(f"key: '{key}' is no row; --list has them all.")
    return found


def default_workers():
    """Return how many processes sample: one for each CPU core, one alone on a GPU."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def parsed(arguments):
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print all rows, whether they are there, and what they take")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows alone that have this text in their file and key, and their baselines"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no more than takes about so many minutes")
    parser.add_argument("--again", metavar="KEY", help="compute a row anew, and tell whether its digits are the same")
    parser.add_argument("--images", nargs=2, metavar=("KEY", "PATH"), help="write a PNG file of a row's images")
    scales = experiment_rows.SCALES
    parser.add_argument(
        "--scale", choices=scales, default=scales[0], help="images a row: as many as a question needs, or 2,048, for a GPU"
    )
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="of the CSV files, docs/results unless named")
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="processes that sample")
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
        print("Nothing is missing." if options.minutes is None else "Nothing is missing that takes no longer.")
        return 0
    wanted, refused = without_weights(wanted)
    print(f"{len(wanted)} rows, about {minutes(wanted, store, options.workers):.0f} minutes of a CPU", flush=True)
    compute(wanted, store, results, options.workers, lambda row: print(_line(row, results.get(row)), flush=True))
    return said(refused)


def said(refused):
    """Print the sentences of what could not be computed; return the exit status, 2 where there are any."""
    for sentence in refused:
        print(sentence, file=sys.stderr)
    return 2 if refused else 0


def without_weights(wanted):
    """Return (those rows or other things with a `run` whose weights are there, why the others cannot be computed: a sentence
    for each kind of weights).
    """
    kept, refused = [], {}
    for one in wanted:
        try:
            experiment_samples.weights_path(one.run)
            kept.append(one)
        except ValueError as error:
            refused[one.run.weights] = str(error)
    return kept, list(refused.values())


def chunk_size(scale):
    """Return how many images are sampled at once: what those who sample have room for at scale "full", else 8, so that what is
    published from a CPU can be made again on any.
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; what was sampled is kept.")
