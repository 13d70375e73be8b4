"""Measure how the time of a cached step compares with its operations, for docs/benchmarks.md.

    python tools/cached_steps.py [--rounds 7] [--networks Z-Image Flux "Wan 2.1" SDXL] [--true-width]

The networks have all blocks of the true ones and random weights, but a smaller width, unless --true-width is given. One run of
the host's euler samples with DeepCache at interval 2, so that full and cached steps alternate. Each evaluation is timed where
the sampler calls for it, so the times contain all that the pack does for it. Without a GPU they are CPU times, which other
processes change less than times by the clock; run it with OMP_NUM_THREADS=1. After each full step the same evaluation is done
without a cache, and after each cached step that of a transformer which has only the blocks that the cached step runs.
Operations are counted by torch in the last warm-up pair, which is not timed.
"""

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass, field

import benchmark
import comfyui
import torch
from networks import SHORT, random_model
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 3  # pairs of steps before the timed ones: the third full step is the first trial of the forecast `auto`
# {kind: (latent of the narrow network, latent of the true one, branches)}
NETWORKS = {
    "Z-Image": ((1, 16, 48, 48), (1, 16, 128, 128), (-1, 0, 4)),
    "Flux": ((1, 16, 32, 32), (1, 16, 128, 128), (-1, 0, 8)),
    "Wan 2.1": ((1, 16, 3, 24, 24), (1, 16, 5, 60, 104), (-1, 0, 4)),
    "SDXL": ((1, 4, 64, 64), (1, 4, 128, 128), (0, 4)),
}


@dataclass
class Steps:
    """What was measured: seconds and operations by kind of evaluation.

    "full" and "cached" with the cache, "plain" without one, "short" without one and with the blocks of a cached step only.
    """

    seconds: dict = field(default_factory=lambda: {"full": [], "cached": [], "plain": [], "short": []})
    operations: dict = field(default_factory=dict)

    def median(self, kind, over):
        """Return the median of the rounds' ratios of times."""
        return statistics.median(one / other for one, other in zip(self.seconds[kind], self.seconds[over]))

    @property
    def milliseconds(self):
        return {kind: 1e3 * statistics.median(seconds) for kind, seconds in self.seconds.items() if seconds}

    @property
    def share(self):
        """Return (the time of a cached step, its operations), as shares of a full step's."""
        return self.median("cached", "full"), self.operations["cached"] / self.operations["full"]

    @property
    def price(self):
        """Return the time of a full step over that of an evaluation without a cache."""
        return self.median("full", "plain")

    @property
    def overhead(self):
        """Return the time of a cached step over that of a network with only its blocks, None if that was not timed."""
        return self.median("cached", "short") if self.seconds["short"] else None


def seconds(function):
    """Return the time of one call of a function: on a GPU by the clock, else of the CPU."""
    if torch.cuda.is_available():
        return benchmark.seconds(function)
    begin = time.process_time()
    function()
    return time.process_time() - begin


def measure(node, model, conditioning, latent, branch, rounds=7, short=None):
    """Return the Steps of a MODEL in a run with IECDeepCache (node) over a latent of a shape.

    short: a MODEL of the same kind with only the blocks that a cached step runs.
    """
    import comfy.patcher_extension
    import comfy.samplers
    import nodes as stock

    found, done = Steps(), []
    if short is not None:
        short.pre_run()

    def take(kind, evaluation):
        pair = len(done) // 2
        with FlopCounterMode(display=False) if pair == WARM_UP - 1 else contextlib.nullcontext() as counter:
            results = []
            taken = seconds(lambda: results.append(evaluation()))
        if counter is not None:
            found.operations[kind] = counter.get_total_flops()
        elif pair >= WARM_UP:
            found.seconds[kind].append(taken)
        return results[0]

    def predict_noise(executor, x, timestep, options, seed):
        kind = ("full", "cached")[len(done) % 2]
        result = take(kind, lambda: executor(x, timestep, options, seed))
        bare = {**options, "transformer_options": {**options["transformer_options"], "wrappers": {}}}
        if kind == "full":
            take("plain", lambda: executor.class_obj.predict_noise(x, timestep, bare, seed))
        elif short is not None:
            inputs = short.model, x, timestep, None, executor.class_obj.conds["positive"], 1.0, bare
            take("short", lambda: comfy.samplers.sampling_function(*inputs))
        done.append(kind)
        return result

    timed = model.clone()
    timed.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "times", predict_noise)
    cached = node.execute(model=timed, interval=2, branch=branch, schedule="uniform").result[0]
    empty, steps = {"samples": torch.zeros(latent)}, 2 * (WARM_UP + rounds)
    stock.common_ksampler(cached, 1, steps, 1.0, "euler", "normal", conditioning, conditioning, empty)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--true-width", action="store_true", help="for a GPU")
    arguments = parser.parse_args()
    node = comfyui.load_nodes(cpu=not torch.cuda.is_available())["IECDeepCache"]
    print(f"\nCached steps. {benchmark.device()[1]}; {arguments.rounds} rounds\n")
    benchmark.table(
        "network", "branch", "full step, ms", "cached step, ms", "time, share", "operations, share", "time over operations",
        "cached step over only its blocks", "full step over one without a cache",
    )  # fmt: skip
    with torch.inference_mode():
        for kind in arguments.networks:
            narrow, true, branches = NETWORKS[kind]
            model, conditioning = random_model(kind, narrow=not arguments.true_width)
            latent = true if arguments.true_width else narrow
            for branch in branches:
                has_short = kind in SHORT and branch >= 0
                short = random_model(kind, narrow=not arguments.true_width, ends=branch + 1)[0] if has_short else None
                found = measure(node, model, conditioning, latent, branch, arguments.rounds, short)
                taken, (share, operations) = found.milliseconds, found.share
                benchmark.row(
                    kind, branch, f"{taken['full']:.0f}", f"{taken['cached']:.1f}", f"{share:.4f}", f"{operations:.4f}",
                    f"{share / operations:.2f}", f"{found.overhead:.3f}" if short else "", f"{found.price:.3f}",
                )  # fmt: skip
            del model


if __name__ == "__main__":
    main()
