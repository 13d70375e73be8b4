"""Measure the quality and the savings of caches, for docs/caching.md.

    python tools/cache_benchmark.py [--steps 20] [--seeds 16] [--repeat 3] [--intervals 2 3 5]
    python tools/cache_benchmark.py --quantized [--steps 20] [--seeds 16] [--intervals 2 3 5]
    python tools/cache_benchmark.py --speed [--repeat 3] [--latent 32] [--networks "SD 1.5" SDXL]

Caches of the built-in model: error and Fréchet distance against time. At each interval, all variants of DeepCache and
CacheQuant evaluate the same number of steps in full. They are compared with the host's EasyCache and LazyCache, at the
threshold at which these evaluate as many steps as fit into the same time. Errors are to the uncached run of the same seed,
means over images. Times are medians of shares of an uncached run's time, measured in turn. The Fréchet distance is to the
uncached images of the same seeds, over 16 principal components of the network's own features.

With --quantized: the errors of the same caches on quantized models, with and without the paper's second correction, which
corrects the block that consumes the feature.

With --speed: how much less time DeepCache takes on U-Nets of the shapes of SD 1.5 and SDXL with random weights. Next to this:
how many fewer floating-point operations it needs, counted during the same run.
"""

import argparse
import itertools

import benchmark
import comfyui
import torch
from networks import random_model
from quality import Quality
from torch.utils.flop_counter import FlopCounterMode


class Table(Quality):
    """Measure caches against the uncached runs."""

    def __init__(self, nodes, steps, seeds, repeat):
        super().__init__(nodes, steps, seeds)
        self.nodes, self.repeat = nodes, repeat
        self.full = benchmark.median_seconds(lambda: self.sample(self.builtin.model, 2), repeat)

    def share(self, model, **correction):
        """Return a run's time as a share of an uncached run's time."""
        return benchmark.median_share(
            lambda: self.sample(model, 2, **correction), lambda: self.sample(self.builtin.model, 2), self.repeat
        )

    def row(self, interval, name, model, correction=None):
        """Print the line of a variant; correction: inputs of IECKSampler."""
        correction = correction or {}
        error, _, distance = self.of(model, **correction)
        share = self.share(model, **correction)
        print(f"| {interval} | {name} | {share:.2f} | {error:.4f} | {distance:.4f} |", flush=True)
        return share

    def fewer_steps(self, interval, steps):
        """Print the line of uncached runs of this many steps; their time is taken to be proportional to the steps."""
        error, _, distance = self.of(self.builtin.model, steps=steps)
        print(f"| {interval} | uncached, {steps} steps | {steps / self.steps:.2f} | {error:.4f} | {distance:.4f} |", flush=True)

    def cached(self, forecast="hold", **settings):
        inputs = {"branch": 0, "forecast": forecast, "schedule": "uniform", **settings}
        return self.nodes["IECDeepCache"].execute(model=self.builtin.model, **inputs).result[0]

    def calibrate(self, interval, schedule, forecast):
        profile = self.nodes["IECCalibrateCacheQuant"].execute(
            model=self.builtin.model, **benchmark.calibration_inputs(self.nodes, self.steps, runs=2), interval=interval,
            branch=0, schedule=schedule, forecast=forecast,
        )  # fmt: skip
        return profile.result[0]

    def profiled(self, profile):
        return self.nodes["IECCacheQuant"].execute(model=self.builtin.model, profile=profile).result[0]

    def skipping(self, node, share):
        """Return (model, threshold) of the host's cache that skips whole steps, with about this share of steps evaluated."""
        low, high, target = 0.0, 20.0, max(2, round(share * self.steps))
        for _ in range(24):
            middle = (low + high) / 2
            count = self._evaluated(self._host_cache(node, middle))
            low, high = (middle, high) if count > target else (low, middle)
            if count == target:
                break
        return self._host_cache(node, high), high

    def _host_cache(self, node, threshold):
        inputs = {"reuse_threshold": threshold, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        return self.nodes[node].execute(model=self.builtin.model, **inputs).result[0]

    def _evaluated(self, model):
        count = []
        block = self.builtin.model.model.diffusion_model.middle_block[-1]
        hook = block.register_forward_hook(lambda *_: count.append(1))
        try:
            self.sample(model, 2)
        finally:
            hook.remove()
        return len(count)


def measure(table, interval):
    """Print the lines of one interval."""
    full = {"uniform": range(0, table.steps, interval)}
    profiles = {}
    for schedule in ("uniform", "dps"):
        profiles |= {(schedule, forecast): table.calibrate(interval, schedule, forecast) for forecast in ("hold", "linear")}
    full["dps"] = profiles["dps", "hold"].full_steps
    listed = {schedule: "steps:" + ",".join(map(str, steps)) for schedule, steps in full.items()}
    on_full = {schedule: {"correction_steps": text, "evaluation_point": "next"} for schedule, text in listed.items()}
    share = table.row(interval, "DeepCache", table.cached(interval=interval))
    table.fewer_steps(interval, round(share * table.steps))
    power = f"power:{table.steps // 3},1.4"
    table.row(interval, f"DeepCache, {power}", table.cached(interval=interval, schedule=power))
    table.row(interval, "DeepCache, dps", table.cached(interval=interval, schedule=listed["dps"]))
    for forecast in ("linear", "auto"):
        table.row(interval, f"DeepCache, {forecast}", table.cached(interval=interval, forecast=forecast))
    for (schedule, forecast), profile in profiles.items():
        table.row(interval, f"CacheQuant, {schedule}, {forecast}", table.profiled(profile))
    table.row(interval, "DeepCache; IEC next on full steps", table.cached(interval=interval), on_full["uniform"])
    table.row(
        interval, "CacheQuant, dps, hold; IEC next on full steps", table.profiled(profiles["dps", "hold"]), on_full["dps"]
    )
    last = {**on_full["dps"], "evaluation_point": "paper"}
    table.row(interval, "CacheQuant, dps, hold; IEC paper on full steps", table.profiled(profiles["dps", "hold"]), last)
    for node in ("EasyCache", "LazyCache"):
        model, threshold = table.skipping(node, share)
        table.row(interval, f"{node}, threshold {threshold:.3g}", model)


def quantized(nodes, steps, seeds, intervals):
    """Print the errors of caches on quantized models, relative to the full-precision runs without a cache."""
    found = Quality(nodes, steps, seeds)
    full, runs = found.builtin.model, benchmark.calibration_inputs(nodes, steps, runs=2)
    kinds = [(forecast, consumer) for forecast in ("hold", "linear") for consumer in (False, True)]
    names = [f"CacheQuant, dps, {forecast}{', correct_consumer' if consumer else ''}" for forecast, consumer in kinds]
    benchmark.table("model", "interval", "no cache", "DeepCache, hold", *names)
    for bits, interval in itertools.product((8, 4), intervals):
        model = found.builtin.variant(bits=bits)
        cells = [found.of(model)[0], found.of(found.builtin.variant(bits=bits, interval=interval, forecast="hold"))[0]]
        for forecast, consumer in kinds:
            profile = nodes["IECCalibrateCacheQuant"].execute(
                model=model, full_precision=full, **runs, interval=interval, branch=0, schedule="dps", forecast=forecast,
                correct_consumer=consumer,
            ).result[0]  # fmt: skip
            cells.append(found.of(nodes["IECCacheQuant"].execute(model=model, profile=profile).result[0])[0])
        benchmark.row(f"W{bits}A8", interval, *cells)


def speed(nodes, kinds, repeat, latent, steps=12):
    """Print by what factor DeepCache lowers the time of a run, and by what factor its operations."""
    import nodes as stock

    print(
        f"\nSpeed. {benchmark.device()[1]}; random weights, latent 4 x {latent} x {latent}, {steps} Euler steps, cfg 2, ",
        end="",
    )
    print("branch 0.\n")
    print("| network | interval | uncached, s | faster by | fewer operations by | time over operations |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in kinds:
        model, conditioning = random_model(kind)
        empty = {"samples": torch.zeros(1, 4, latent, latent)}

        def run(model):
            return stock.common_ksampler(model, 1, steps, 2.0, "euler", "normal", conditioning, conditioning, empty)  # noqa: B023

        def operations(model):
            with FlopCounterMode(display=False) as counter:
                run(model)
            return counter.get_total_flops()

        full, full_operations = benchmark.median_seconds(lambda: run(model), 1), operations(model)  # noqa: B023
        for interval in (2, 3, 5):
            cached = nodes["IECDeepCache"].execute(model=model, interval=interval, branch=0).result[0]
            faster = 1 / benchmark.median_share(lambda: run(cached), lambda: run(model), repeat)  # noqa: B023
            fewer = full_operations / operations(cached)
            cells = f"{full:.2f} | {faster:.2f} | {fewer:.2f} | {faster / fewer:.2f}"
            print(f"| {kind} | {interval} | {cells} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=16, help="eight images each")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--quantized", action="store_true", help="caches on quantized models instead")
    parser.add_argument("--speed", action="store_true", help="time U-Nets of true shapes instead")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent for --speed")
    parser.add_argument("--networks", nargs="+", default=["SD 1.5", "SDXL"], help="for --speed")
    arguments = parser.parse_args()
    nodes = comfyui.load_nodes("easycache", cpu=not torch.cuda.is_available())
    with torch.inference_mode():
        if arguments.speed:
            return speed(nodes, arguments.networks, arguments.repeat, arguments.latent)
        if arguments.quantized:
            return quantized(nodes, arguments.steps, arguments.seeds, arguments.intervals)
        table = Table(nodes, arguments.steps, arguments.seeds, arguments.repeat)
        print(f"\nCaches. {benchmark.device()[1]}; built-in model, float32, {arguments.steps} DDIM steps on normal, cfg 3,")
        print(
            f"{arguments.seeds} seeds of 8 images, branch 0. An uncached run of 8 images takes {table.full:.2f} s; the Fréchet"
        )
        print(f"distance of as many uncached images of other seeds is {table.floor:.4f}.\n")
        print("| interval | variant | time, share of uncached | error to uncached | Fréchet distance |")
        print("| --- | --- | --- | --- | --- |")
        for interval in arguments.intervals:
            measure(table, interval)


if __name__ == "__main__":
    main()
