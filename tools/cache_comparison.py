"""Compare caches with each other and with fewer steps at equal cost, for docs/caching.md.

    python tools/cache_comparison.py [--models unet transformer] [--minutes 40] [--table]

The built-in models with guidance 3, eight images per seed. A run may cost a share of an uncached run's operations. Into that
cost fit: full and cached steps of DeepCache and of a calibrated CacheQuant; the steps that ComfyUI's EasyCache and LazyCache
evaluate, at the threshold that comes nearest, in their default part of the run or in the whole run, whichever keeps more; or
fewer uncached steps. A row has the error to the uncached run of the same seed, the error to 100 steps of heun (if the sampler
follows the probability flow), both with 95 % bootstrap intervals over the images, and the Fréchet distance to the uncached
images over 16 principal components of the U-Net's features. Rows are added to docs/results/equal_cost.csv, one by one, in the
order of their importance; existing rows are skipped.

With --table: print the table of the runs whose rows are all there.
"""

import argparse
import csv
import functools
import itertools
import math
import time

import benchmark
import comfyui
import numpy as np
import pack
import torch
from experiment_samples import errors
from quality import COMPONENTS, Features
from sample_distance import frechet_distance, mean_with_interval

FILE = comfyui.ROOT / "docs/results/equal_cost.csv"
SEEDS = (11, 12, 13)
SHARES = (0.5, 0.35, 0.65, 0.25)
SAMPLERS = ("euler", "dpmpp_2m", "res_multistep", "er_sde", "heun")
STOCHASTIC = ("er_sde",)  # of these, a run of fewer steps has other noise
SCHEDULERS = {"unet": "karras", "transformer": "simple"}
# the runs in the order of their importance: (steps, sampler, shares)
RUNS = (
    *((20, sampler, SHARES[:2]) for sampler in SAMPLERS), (50, "euler", SHARES[:2]),
    *((20, sampler, SHARES[2:]) for sampler in SAMPLERS), *((50, sampler, SHARES) for sampler in SAMPLERS),
)  # fmt: skip
KEY = ("model", "sampler", "steps", "share", "method")
COLUMNS = (
    *KEY, "scheduler", "detail", "images", "error", "error_low", "error_high", "exact", "exact_low", "exact_high", "frechet",
    "exact_of_uncached",
)  # fmt: skip
METHODS = {
    "auto": "DeepCache, auto", "branch0": "DeepCache, auto, branch 0", "uniform": "DeepCache, uniform",
    "dps": "CacheQuant, dps", "calibrated": "CacheQuant, auto", "easycache": "EasyCache", "lazycache": "LazyCache",
    "fewer": "fewer steps",
}  # fmt: skip
SAME = ("unet", "branch0")  # the cheapest branch of a U-Net is 0, so this method is `auto`


class Comparison:
    """The rows of one built-in model."""

    def __init__(self, nodes, name, rows):
        self.nodes, self.name, self.rows = nodes, name, rows
        self.builtin, self.scheduler = benchmark.Builtin(nodes, name), SCHEDULERS[name]
        unet = self.builtin if name == "unet" else benchmark.Builtin(nodes)
        self.features = Features(unet.model)
        self.reference = functools.cache(self._reference)
        self.profile = functools.cache(self._profile)
        self.cached_share = functools.cache(self._cached_share)

    def sample(self, model, steps, sampler):
        """Return the latents of all seeds [N, 3, 32, 32]."""
        return torch.cat([self.builtin.sample(model, seed, steps, self.scheduler, sampler) for seed in SEEDS])

    def _reference(self, steps, sampler):
        """Return (latents, a basis of their features, the features in it) of the uncached runs."""
        latents = self.sample(self.builtin.model, steps, sampler)
        features = self.features.of(latents)
        basis = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[:COMPONENTS].T
        return latents, basis, features @ basis

    @functools.cached_property
    def exact(self):
        return torch.cat(benchmark.exact_of(self.builtin, self.scheduler, SEEDS))

    def _cached_share(self, branch):
        """Return the operations of a cached step over those of a full one."""
        cached = self.builtin.variant(schedule="steps:0", interval=2, branch=branch)
        full = operations(lambda: self.builtin.sample(self.builtin.model, 1, 1))
        both = operations(lambda: self.builtin.sample(cached, 1, 2))
        return both / full - 1

    def _profile(self, steps, sampler, interval, schedule):
        inputs = benchmark.calibration_inputs(self.nodes, steps, 1, sampler, self.scheduler)
        return self.nodes["IECCalibrateCacheQuant"].execute(
            model=self.builtin.model, **inputs, interval=interval, branch=-1, schedule=schedule, forecast="linear"
        ).result[0]  # fmt: skip

    def variant(self, method, steps, sampler, share):
        """Return (MODEL, steps, detail) of a method at a share of the uncached run's operations."""
        if method == "fewer":
            fewer = max(round(share * steps), 1)
            return self.builtin.model, fewer, f"{fewer} steps"
        if method in ("easycache", "lazycache"):
            return self.skipping({"easycache": "EasyCache", "lazycache": "LazyCache"}[method], steps, sampler, share)
        branch = 0 if method == "branch0" else -1
        cached = self.cached_share(branch)
        full = min(max(round(steps * (share - cached) / (1 - cached)), 1), steps)
        if method == "uniform":
            text = "steps:" + ",".join(str(number * steps // full) for number in range(full))
            return self.builtin.variant(interval=2, schedule=text, branch=branch), steps, f"{full} in full"
        if method in ("auto", "branch0"):
            speed = 1 / (full / steps + self._model_share(branch) * (1 - full / steps))
            model = self.builtin.variant(interval=2, schedule="auto", speed=speed, branch=branch)
            return model, steps, f"{full} in full"
        interval = min(range(1, steps + 1), key=lambda one: (abs(math.ceil(steps / one) - full), one))
        profile = self.profile(steps, sampler, interval, "dps" if method == "dps" else "auto")
        model = self.nodes["IECCacheQuant"].execute(model=self.builtin.model, profile=profile).result[0]
        return model, steps, f"{len(profile.full_steps)} in full"

    def _model_share(self, branch):
        """Return the share that the node takes a cached step to have, judged by the weights."""
        cached_model, model = pack.pack_module("nodes.host.caching.cached_model"), self.builtin.model
        return cached_model.cache_kind(model).cached_share(model.model.diffusion_model, cached_model.branch_of(model, branch))

    def skipping(self, node, steps, sampler, share):
        """Return the host's cache at the threshold that comes nearest to the share of evaluated steps.

        Its part of the run is the default, or the whole run, whichever has the smaller error.
        """
        found = []
        for start, end in ((0.15, 0.95), (0.0, 1.0)):
            model, threshold, evaluated = self._at_threshold(node, steps, sampler, share, start, end)
            error = errors(self.sample(model, steps, sampler), self.reference(steps, sampler)[0]).mean()
            found.append((error, model, f"threshold {threshold:.3g}, {start} to {end}, {evaluated:.2f} evaluated"))
        _, model, detail = min(found, key=lambda one: one[0])
        return model, steps, detail

    def _at_threshold(self, node, steps, sampler, share, start, end):
        """Return (MODEL, threshold, the share that is evaluated)."""
        low, high, best, nearest = 0.0, 20.0, None, math.inf
        total = self._evaluated(self.builtin.model, steps, sampler)
        for _ in range(14):
            middle = (low + high) / 2
            inputs = {"reuse_threshold": middle, "start_percent": start, "end_percent": end, "verbose": False}
            own = pack.pack_module("nodes.host.easycache").with_own_input(self.builtin.model)
            model = self.nodes[node].execute(model=own, **inputs).result[0]
            evaluated = self._evaluated(model, steps, sampler) / total
            low, high = (middle, high) if evaluated > share else (low, middle)
            if abs(evaluated - share) < nearest:
                best, nearest = (model, middle, evaluated), abs(evaluated - share)
            if nearest < 0.3 / steps:
                break
        return best

    def _evaluated(self, model, steps, sampler):
        """Return how often the network runs for one seed."""
        network, count = self.builtin.model.model.diffusion_model, []
        block = network.middle_block[-1] if self.name == "unet" else network.single_blocks[1]
        hook = block.register_forward_hook(lambda *_: count.append(1))
        try:
            self.builtin.sample(model, SEEDS[0], steps, self.scheduler, sampler)
        finally:
            hook.remove()
        return len(count)

    def row(self, method, steps, sampler, share):
        """Return the columns of a row."""
        model, own_steps, detail = self.variant(method, steps, sampler, share)
        latents, (references, basis, features) = self.sample(model, own_steps, sampler), self.reference(steps, sampler)
        found = dict.fromkeys(COLUMNS, "") | {
            "model": self.name, "sampler": sampler, "steps": steps, "share": share, "method": method,
            "scheduler": self.scheduler, "detail": detail, "images": len(latents),
            "frechet": f"{frechet_distance(self.features.of(latents) @ basis, features):.4g}",
        }  # fmt: skip
        if method != "fewer" or sampler not in STOCHASTIC:
            found |= estimate("error", errors(latents, references))
        if sampler not in STOCHASTIC:
            found |= estimate("exact", errors(latents, self.exact))
            found["exact_of_uncached"] = f"{errors(references, self.exact).mean():.4g}"
        return {name: str(value) for name, value in found.items()}


def operations(evaluate):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        evaluate()
    return counter.get_total_flops()


def estimate(name, values):
    """Return a mean and its interval as columns."""
    found = mean_with_interval(np.asarray(values))
    return {name: f"{found.value:.4g}", f"{name}_low": f"{found.low:.4g}", f"{name}_high": f"{found.high:.4g}"}


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


def compute(names, minutes):
    """Add the missing rows until the minutes are over."""
    end = time.monotonic() + 60 * minutes
    nodes = comfyui.load_nodes("easycache", cpu=not torch.cuda.is_available())
    with torch.inference_mode():
        models = {name: Comparison(nodes, name, known_rows()) for name in names}
        for (steps, sampler, shares), name in itertools.product(RUNS, names):
            for share, method in itertools.product(shares, METHODS):
                key = (name, sampler, str(steps), str(share), method)
                if key not in models[name].rows and (name, method) != SAME and time.monotonic() < end:
                    models[name].rows[key] = models[name].row(method, steps, sampler, share)
                    add(models[name].rows[key])


def print_table():
    """Print a line per run and share: the error and the Fréchet distance of each method, the lowest in bold."""
    rows = known_rows()
    benchmark.table("model", "sampler", "steps", "share", "in full", *METHODS.values(), "error of the uncached run")
    for steps, sampler, share, name in itertools.product((20, 50), SAMPLERS, sorted(SHARES, reverse=True), SCHEDULERS):
        key = (name, sampler, str(steps), str(share))
        found = [rows.get((*key, "auto" if (name, method) == SAME else method)) for method in METHODS]
        if all(found):
            full = ", ".join(dict.fromkeys(row["detail"].split()[0] for row in found if row["detail"].endswith("in full")))
            cells = zip(*(_bold_lowest([row[column] for row in found]) for column in ("error", "frechet")))
            uncached = found[0]["exact_of_uncached"] or "-"
            benchmark.row(name, sampler, steps, str(share), full, *map(", ".join, cells), uncached)


def _bold_lowest(texts):
    """Return numbers, given as texts, with three digits, and the lowest in bold; "-" for an empty text."""
    lowest = min(float(text) for text in texts if text)
    shown = [f"{float(text):.3g}" if text else "-" for text in texts]
    return [f"**{short}**" if text and float(text) == lowest else short for text, short in zip(texts, shown)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there")
    arguments = parser.parse_args()
    print_table() if arguments.table else compute(arguments.models, arguments.minutes)


if __name__ == "__main__":
    main()
