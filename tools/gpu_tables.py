"""Measure the pack's benefit on a GPU, for docs/gpu: `make gpu` runs this after the tests.

    python tools/gpu_tables.py [--output docs/gpu] [--size full|small] [--minutes 8] [--tables networks convolutions ...]

The networks have true shapes and random weights. Ratios are of times measured in turn in this run: medians after a warm-up, by
CUDA events. Each row is written to <card>.csv as soon as it is measured, and <card>.md is made from these rows; a row that
cannot be measured gives the reason. The most informative tables come first, and no table begins a row when the minutes are
over. --size small is for a machine without a GPU, to check that everything runs: its networks are tiny, and its times mean
nothing.
"""

import argparse
import contextlib
import csv
import functools
import gc
import pathlib
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import benchmark
import cached_steps
import comfyui
import layer_overhead
import quantization_benchmark as quantization
import torch
from networks import random_model
from torch.utils.flop_counter import FlopCounterMode

STEPS, CFG = 12, 2.0  # of the timed runs
ROUNDS = 3  # of whole runs
CACHES = (2, 3, 5)  # intervals


@dataclass(frozen=True)
class Size:
    """What is measured: networks as (kind, side of the latent, interval of the cache in the table `together`)."""

    networks: tuple[tuple[str, int, int], ...]
    compiled: tuple[str, ...]  # kinds
    steps: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # {kind: (shape of the latent, branches)}


SIZES = {
    "full": Size(
        (("SDXL", 128, 3), ("SD 1.5", 64, 5), ("Flux", 128, 3)),
        ("SDXL", "SD 1.5"),
        {kind: (latent, branches) for kind, (_, latent, branches) in cached_steps.NETWORKS.items()},
    ),
    "small": Size((("tiny U-Net", 8, 3),), ("tiny U-Net",), {"tiny U-Net": ((1, 4, 8, 8), (0,))}),
}


@dataclass(frozen=True)
class Row:
    """One measurement. milliseconds: the time of the row's variant. ratio: how many times as fast as the table's baseline it
    is.

    weights: bytes, as a share of the baseline's. peak_mib: peak memory without the weights. operations: by what factor fewer
    than the baseline's. of_peak: share of the GPU's peak int8 operations per second, from its maker's data sheet.
    """

    table: str
    subject: str
    variant: str
    milliseconds: float | None = None
    ratio: float | None = None
    weights: float | None = None
    peak_mib: float | None = None
    operations: float | None = None
    of_peak: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A row that is to be measured. take: a function that returns the values of Row's other fields, a dict."""

    subject: str
    variant: str
    take: Callable[[], dict]


class CpuClock:
    """Replace iec_core's CudaClock if there is no GPU."""

    def times(self, ways, device, rounds=3):
        found = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                found[name].append(1e6 * (time.perf_counter() - begin))
        return {name: statistics.median(times) for name, times in found.items()}


class Bench:
    """The common parts of all tables. nodes: classes by id. device: where it is measured."""

    def __init__(self, nodes, size):
        self.nodes, self.size, self.device = nodes, size, benchmark.device()[0]
        layers, self.core = layer_overhead.modules()
        times = sys.modules[layers.KernelTimes.__module__]
        self.clock = times.CudaClock() if self.device.type == "cuda" else CpuClock()

    def quantized(self, model, name, **more):
        """Return a MODEL in one of quantization_benchmark's formats; more: inputs of Quantize Model."""
        weight_bits, activation_bits, inputs = quantization.FORMATS[name]
        inputs = {"weight_bits": weight_bits, "activation_bits": activation_bits, "keep_sensitive_layers": True, **inputs}
        return self.nodes["IECQuantizeModel"].execute(model=model, **inputs, **more).result[0]

    def milliseconds(self, ways, rounds=5):
        """Return {name: milliseconds} of functions, timed in turn."""
        return {name: micro / 1e3 for name, micro in self.clock.times(ways, self.device, rounds).items()}

    def compare(self, way, baseline, rounds=5):
        """Return a function's milliseconds, and how many times as fast as the baseline it is."""
        way(), baseline()
        times = self.milliseconds({"way": way, "baseline": baseline}, rounds)
        return {"milliseconds": times["way"], "ratio": times["baseline"] / times["way"]}

    def loaded(self, *models):
        """Load MODELs together. Raises NotThere if they do not fit: the time of an offloaded model is not comparable."""
        import comfy.model_management

        comfy.model_management.load_models_gpu(list(models), force_full_load=True)
        if any(model.loaded_size() < 0.99 * model.model_size() for model in models):
            raise quantization.NotThere("the GPU has too little memory for both networks")

    def peak_mib(self, way):
        """Return the peak memory of a function in MiB, without the memory that is already taken; None without a GPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def share_of_peak(self, operations, milliseconds):
        """Return the share of the GPU's peak int8 operations per second, None if its data sheet is not known."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        peak = next((numbers[0] for key, numbers in quantization.PEAKS.items() if key in name), None)
        return None if peak is None else operations / (milliseconds / 1e3) / peak

    def cached(self, model, interval):
        return self.nodes["IECDeepCache"].execute(model=model, interval=interval, branch=0).result[0]

    def calibrated(self, model, conditioning, side):
        profile = self.nodes["IECCalibrateCacheQuant"].execute(
            model=model, positive=conditioning, negative=conditioning, latent_image=_empty(model, side), seed=0, runs=1,
            steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="normal", interval=3, branch=0, schedule="dps",
        ).result[0]  # fmt: skip
        return self.nodes["IECCacheQuant"].execute(model=model, profile=profile).result[0]

    def run(self, model, conditioning, side, **correction):
        """Return a function that samples; correction: inputs of IECKSampler; if there are none, the stock sampler runs."""
        import nodes as stock

        inputs = (1, STEPS, CFG, "euler", "normal", conditioning, conditioning, _empty(model, side))
        if not correction:
            return lambda: stock.common_ksampler(model, *inputs)
        names = ("seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image")
        settings = {**benchmark.CORRECTION, **correction, "denoise": 1.0, **dict(zip(names, inputs))}
        return lambda: self.nodes["IECKSampler"].execute(model=model, **settings)


def _empty(model, side):
    return {"samples": torch.zeros(1, model.model.latent_format.latent_channels, side, side)}


# The tables: generators of Tasks. Each network has its own generator, whose end frees the network's GPU memory.


def networks(bench):
    """One evaluation of a batch of two, against the unquantized network."""
    for kind, side, _ in bench.size.networks:
        yield from _network(bench, kind, side)


def _network(bench, kind, side):
    model, conditioning = random_model(kind)
    full = quantization.Evaluation(model, conditioning, side, False)

    def alone():
        return {"milliseconds": bench.milliseconds({"full": full})["full"], "weights": 1.0, "peak_mib": bench.peak_mib(full)}

    yield Task(kind, str(model.model.get_dtype())[6:], alone)
    ours = [("W8A8", {}), ("W8A8", {"compute": "8-bit"}), ("W4A8", {}), ("fp8", {}), ("W8A16", {}), ("W4A16, groups of 64", {})]
    makers = {", ".join([name, *more.values()]): functools.partial(bench.quantized, model, name, **more) for name, more in ours}
    makers |= {
        "host's float8": functools.partial(quantization.host_float8, kind),
        "host's int8, Linear layers": functools.partial(quantization.host_int8, bench.nodes, kind, model),
        "torchao's int8 dynamic": functools.partial(quantization.torchao_int8, kind),
    }
    for name, make in makers.items():
        yield Task(kind, name, functools.partial(_evaluated, bench, make, full, conditioning, side))


def _evaluated(bench, make, full, conditioning, side):
    variant = make()
    evaluation = quantization.Evaluation(variant, conditioning, side, False)
    bench.loaded(full.model, variant)
    found = bench.compare(evaluation, full) | {"peak_mib": bench.peak_mib(evaluation)}
    layers = quantization.layers(variant)
    if not layers:  # special tensor types report their bytes differently
        return found
    eight = sum(layer.choice(bench.device).backend != bench.core.WEIGHT_ONLY for layer in layers)
    share = quantization.size_of(variant) / quantization.size_of(full.model)
    return found | {"weights": share, "note": f"{eight} of {len(layers)} quantized layers in 8 bits"}


def convolutions(bench):
    """Every convolution of the first network but the pointwise ones: int8 kernels against the unquantized layer, NCHW."""
    kind, side, _ = bench.size.networks[0]
    model, conditioning = random_model(kind)
    shapes, dtype = _shapes(quantization.Evaluation(model, conditioning, side, False)), model.model.get_dtype()
    del model
    for (x, layer), count in sorted(shapes.items(), key=lambda item: -_operations(*item[0]) * item[1]):
        named = f"{'x'.join(map(str, x))} to {layer[0]}, window {layer[1][0]}, stride {layer[2][0]}, {count} of them"
        for scale in ("dynamic", "given"):
            yield Task(named, f"scale {scale}", functools.partial(_convolution, bench, x, layer, scale, dtype))


def _shapes(evaluation):
    """Return {(shape of x, (outputs, window, stride, padding)): number of layers} of an evaluation's convolutions."""
    found, hooks = Counter(), []

    def note(layer, inputs, _):
        found[tuple(inputs[0].shape), (layer.out_channels, layer.kernel_size, layer.stride, layer.padding)] += 1

    for layer in evaluation.model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1):
            hooks.append(layer.register_forward_hook(note))
    try:
        evaluation()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _operations(x, layer):
    (batch, channels, *image), (outputs, window, stride, padding) = x, layer
    height, width = ((size + 2 * p - k) // s + 1 for size, k, s, p in zip(image, window, stride, padding))
    return 2 * batch * height * width * outputs * channels * window[0] * window[1]


def _convolution(bench, shape, layer, scale, dtype):
    (outputs, window, stride, padding), last = layer, torch.channels_last
    x = torch.randn(shape, device=bench.device).to(dtype)
    weight = torch.randint(-127, 128, (outputs, *window, shape[1]), dtype=torch.int8, device=bench.device)
    full, scales = (weight.permute(0, 3, 1, 2) * 1e-3).to(dtype).contiguous(), torch.full((outputs,), 1e-3, device=bench.device)
    x_last, full_last = x.to(memory_format=last), full.to(memory_format=last)
    given = torch.full((1,), 0.03, device=bench.device) if scale == "given" else None

    def in_8_bits(x):
        return bench.core.conv2d_int8(x, weight.flatten(1), scales, None, window, stride, padding, (1, 1), given)

    times = bench.milliseconds({
        "NCHW": lambda: torch.nn.functional.conv2d(x, full, None, stride, padding),
        "NHWC": lambda: torch.nn.functional.conv2d(x_last, full_last, None, stride, padding),
        "8 bits": lambda: in_8_bits(x), "8 bits, NHWC": lambda: in_8_bits(x_last),
    })  # fmt: skip
    taken, taken_last = times["8 bits"], times["8 bits, NHWC"]
    return {
        "milliseconds": taken, "ratio": times["NCHW"] / taken, "of_peak": bench.share_of_peak(_operations(shape, layer), taken),
        "note": f"channels last: {taken_last:.3g} ms, {times['NHWC'] / taken_last:.2f} times as fast",
    }  # fmt: skip


def caches(bench):
    """Runs of 12 Euler steps with a cache, against the same without."""
    for kind, side, _ in bench.size.networks[:2]:
        model, conditioning = random_model(kind)
        full = bench.run(model, conditioning, side)
        makers = {f"DeepCache {interval}": functools.partial(bench.cached, model, interval) for interval in CACHES}
        makers["CacheQuant 3, dps"] = functools.partial(bench.calibrated, model, conditioning, side)
        for name, make in makers.items():
            yield Task(kind, name, functools.partial(_cached, bench, make, full, conditioning, side))


def _cached(bench, make, full, conditioning, side):
    run = bench.run(make(), conditioning, side)
    found = bench.compare(run, full, ROUNDS)
    return found | {"operations": _flops(full) / _flops(run), "peak_mib": bench.peak_mib(run)}


def _flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def steps(bench):
    """A cached step of a run with interval 2, against a full one. Times on the clock, with all of the cache's Python."""
    for kind, (latent, branches) in bench.size.steps.items():
        model, conditioning = random_model(kind)
        for branch in branches:
            yield Task(kind, f"branch {branch}", functools.partial(_step, bench, model, conditioning, latent, branch))


def _step(bench, model, conditioning, latent, branch):
    bench.loaded(model)
    found = cached_steps.measure(bench.nodes["IECDeepCache"], model, conditioning, latent, branch)
    share, operations = found.share
    note = f"time over operations {share / operations:.2f}; a full step takes {found.price:.3f} of one without a cache"
    return {"milliseconds": found.milliseconds["cached"], "ratio": 1 / share, "operations": 1 / operations, "note": note}


def together(bench):
    """Runs of 12 Euler steps with all that makes them faster, against the stock sampler on the unquantized network."""
    auto = {"correction_steps": "auto"}
    for kind, side, interval in bench.size.networks[:2]:
        model, conditioning = random_model(kind)
        full, quantized = bench.run(model, conditioning, side), bench.quantized(model, "W8A8")
        for name, more, settings in (("W8A8", None, auto), ("W8A8", interval, {}), ("W8A8", interval, auto)):
            variant = bench.cached(quantized, more) if more else quantized
            named = ", ".join([name, *([f"DeepCache {more}"] if more else []), *(["IEC auto"] if settings else [])])
            yield Task(kind, named, functools.partial(_sampled, bench, variant, model, full, conditioning, side, **settings))


def correction(bench):
    """The same runs by KSampler (IEC) with correction_steps none and auto, which take equally many evaluations, against the
    stock sampler.
    """
    for kind, side, _ in bench.size.networks[:2]:
        model, conditioning = random_model(kind)
        full = bench.run(model, conditioning, side)
        for steps in ("none", "auto"):
            take = functools.partial(_sampled, bench, model, model, full, conditioning, side, correction_steps=steps)
            yield Task(kind, steps, take)


def _sampled(bench, model, plain, full, conditioning, side, **correction):
    bench.loaded(plain, model)
    run = bench.run(model, conditioning, side, **correction)
    return bench.compare(run, full, ROUNDS) | {"peak_mib": bench.peak_mib(run)}


def compiled(bench):
    """One evaluation of a batch of two by torch.compile, against the unquantized network compiled."""
    for kind, side, _ in bench.size.networks:
        if kind in bench.size.compiled:
            model, conditioning = random_model(kind)
            full = quantization.Evaluation(model, conditioning, side, True)
            for name in ("W8A8", "fp8"):
                make = functools.partial(bench.quantized, model, name)
                yield Task(kind, name, functools.partial(_compiled, bench, make, full, conditioning, side))


def _compiled(bench, make, full, conditioning, side):
    variant = make()
    quantization.Evaluation(variant, conditioning, side, False)()  # chooses the kernels by timing, before compiling
    evaluation = quantization.Evaluation(variant, conditioning, side, True)
    bench.loaded(full.model, evaluation.model)
    return bench.compare(evaluation, full) | {"peak_mib": bench.peak_mib(evaluation)}


TABLES = {one.__name__: one for one in (networks, convolutions, caches, steps, together, correction, compiled)}
HEADS = {
    "milliseconds": "ms", "ratio": "times as fast", "weights": "weights, share", "peak_mib": "memory besides, MiB",
    "operations": "times fewer operations", "of_peak": "of the int8 peak",
}  # fmt: skip


class Writer:
    """Write rows to <card>.csv one by one, and all of them to <card>.md."""

    def __init__(self, folder, command):
        self.about, self._command, self.rows = benchmark.device()[1], command, []
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._path = pathlib.Path(folder) / re.sub(r"\W+", "_", card.lower()).strip("_")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._csv = self._path.with_suffix(".csv")
        self._write("w", [field.name for field in fields(Row)])

    def add(self, row):
        self.rows.append(row)
        self._write("a", [_cell(value) for value in asdict(row).values()])
        print(" | ".join(filter(None, map(_cell, asdict(row).values()))), flush=True)
        self._path.with_suffix(".md").write_text("\n".join(self._page()), encoding="utf-8")

    def _write(self, mode, cells):
        with open(self._csv, mode, encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)

    def _page(self):
        yield from (f"# {self.about.split(',')[0]}", "", f"`{self._command}`; {self.about}.", "")
        for table, measure in TABLES.items():
            rows = [row for row in self.rows if row.table == table]
            if rows:
                yield from (f"## {table.capitalize()}", "", measure.__doc__, "", *_table(rows), "")


def _table(rows):
    """Return the lines of a Markdown table, with the columns that any of the rows has."""
    named = [name for name in HEADS if any(getattr(row, name) is not None for row in rows)]
    heads = ["of", "variant", *(HEADS[name] for name in named), "note"]
    yield from (f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}")
    for row in rows:
        cells = [row.subject, row.variant, *(_cell(getattr(row, name)) for name in named), row.note.replace("|", "/")]
        yield f"| {' | '.join(cells)} |"


def _cell(value):
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _free():
    """Free the memory of networks that nothing refers to any more."""
    import comfy.model_management

    gc.collect()
    comfy.model_management.soft_empty_cache()


def measure(bench, writer, names, minutes):
    """Measure the tables of these names, until the minutes are over; return how many rows failed."""
    end, failed = time.monotonic() + 60 * minutes, 0
    for name in names:
        with contextlib.closing(TABLES[name](bench)) as tasks:
            for task in tasks:
                if time.monotonic() > end:
                    writer.add(Row(name, task.subject, task.variant, note=f"not measured: {minutes} minutes were over"))
                    break
                row, is_fault = _measured(name, task)
                failed += is_fault
                writer.add(row)
        _free()
    return failed


def _measured(table, task):
    """Return (Row, whether an error prevented its measurement)."""
    try:
        return Row(table, task.subject, task.variant, **task.take()), False
    except quantization.NotThere as reason:
        return Row(table, task.subject, task.variant, note=f"not measured: {reason}"), False
    except Exception as error:  # any error: one failing row must not prevent the others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(table, task.subject, task.variant, note=f"failed: {reason}"), True
    finally:
        _free()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=comfyui.ROOT / "docs/gpu", type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and arguments.size == "full":
        sys.exit("no CUDA GPU is here; --size small shows on a CPU that all of it runs, and its times say nothing.")
    nodes = comfyui.load_nodes(cpu=not has_gpu)
    command = " ".join(["tools/gpu_tables.py", *sys.argv[1:]])
    with torch.inference_mode():
        failed = measure(
            Bench(nodes, SIZES[arguments.size]), Writer(arguments.output, command), arguments.tables, arguments.minutes
        )
    if failed:
        sys.exit(f"{failed} rows failed; the last column has the reasons.")


if __name__ == "__main__":
    main()
