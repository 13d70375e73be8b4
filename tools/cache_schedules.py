"""Compare where a cache evaluates its full steps, at equally many of them, for docs/caching.md.

    python tools/cache_schedules.py [--seeds 2] [--models unet transformer]

DeepCache with its default forecast on the built-in models, eight images per seed: the error to the uncached run of the same
seed, with evenly spaced full steps; with `auto`, which goes by the noise levels; with the first 15 % and the last 10 % of the
steps in full and the others as by `auto`; and with full steps that are closer together at the beginning of the run
(`power:0,1.3`). The ratios have 95 % bootstrap intervals over the images, in pairs.
"""

import argparse
import math

import benchmark
import comfyui
import pack
import torch
from experiment_samples import errors
from sample_distance import ratio_with_interval

KARRAS, NORMAL, SIMPLE = "karras", "normal", "simple"
# {model: (steps, sampler, scheduler, intervals)}
RUNS = {
    "unet": (
        (20, "euler", KARRAS, (2, 3, 5)), (20, "euler", NORMAL, (2, 3)), (20, "dpmpp_2m", KARRAS, (2, 3)),
        (20, "heun", KARRAS, (3,)), (20, "er_sde", KARRAS, (3,)), (20, "euler_ancestral", KARRAS, (3,)),
        (50, "euler", KARRAS, (3, 5)),
    ),
    "transformer": (
        (20, "euler", SIMPLE, (2, 3, 5)), (20, "dpmpp_2m", SIMPLE, (2, 3)), (20, "heun", SIMPLE, (3,)),
        (20, "er_sde", SIMPLE, (3,)), (20, "euler_ancestral", SIMPLE, (3,)), (50, "euler", SIMPLE, (3, 5)),
    ),
}  # fmt: skip


def with_ends_in_full(builtin, steps, sampler, scheduler, count):
    """Return the schedule with the first 15 % and the last 10 % of the steps in full, and the others as by `auto`."""
    import comfy.samplers

    cache_run, placement = pack.pack_module("nodes.host.caching.cache_run"), pack.load("iec_core.caching.placement")
    levels = builtin.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.KSampler(builtin.model, steps, "cpu", sampler, scheduler).sigmas
    ends = {*range(math.ceil(0.15 * steps)), *range(steps - round(0.1 * steps), steps)}
    full = placement.full_steps_by_noise(*cache_run.noise_and_signal(levels, sigmas), count, ends)
    return f"steps:{','.join(map(str, sorted(full)))}"


def measure(builtin, name, steps, sampler, scheduler, interval, references, seeds):
    """Print the row of a run at an interval. references: its uncached latents."""

    def of(schedule):
        model = builtin.variant(interval=interval, schedule=schedule)
        return errors(torch.cat([builtin.sample(model, seed, steps, scheduler, sampler) for seed in seeds]), references)

    full = math.ceil(steps / interval)
    uniform, cells = of("uniform"), []
    for schedule in ("auto", with_ends_in_full(builtin, steps, sampler, scheduler, full), "power:0,1.3"):
        error = of(schedule)
        ratio = ratio_with_interval(error, uniform, 0.95)
        cells += [f"{error.mean():.3f}", f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"]
    benchmark.row(name, f"{sampler}, {scheduler}", steps, full, f"{uniform.mean():.3f}", *cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    nodes, seeds = comfyui.load_nodes(cpu=not torch.cuda.is_available()), range(11, 11 + arguments.seeds)
    print(f"\nSchedules of a cache. {benchmark.device()[1]}; {8 * arguments.seeds} images\n")
    heads = [head for schedule in ("auto", "ends in full", "power:0,1.3") for head in (schedule, "to uniform")]
    benchmark.table("model", "sampler", "steps", "in full", "uniform", *heads)
    for name in arguments.models:
        builtin = benchmark.Builtin(nodes, name)
        for steps, sampler, scheduler, intervals in RUNS[name]:
            references = torch.cat([builtin.sample(builtin.model, seed, steps, scheduler, sampler) for seed in seeds])
            for interval in intervals:
                measure(builtin, name, steps, sampler, scheduler, interval, references, seeds)


if __name__ == "__main__":
    main()
