"""Benchmarks of `make benchmark`: the cost and the quality of the correction, each against a baseline in the same run.

    python tools/benchmark.py [caches] [calibrated] [bias] [overhead] [correction_pass] [stochastic]
                              [--repeat N] [--architecture unet|transformer]

Prints the tables of docs/benchmarks.md. Times are medians after a warm-up; errors are means over seeds and images.
"""

import argparse
import functools
import itertools
import platform
import statistics
import time
import types

import comfyui
import experiment_rows
import pack
import torch

# The configuration of Stable Diffusion 1.5's U-Net, as the host detects it.
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8, "num_head_channels": -1,
    "use_spatial_transformer": True, "context_dim": 768, "use_linear_in_transformer": False, "legacy": False,
}  # fmt: skip
CORRECTION = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5}


def device():
    """Return the device that the host computes on, and its name."""
    import comfy.model_management

    found = comfy.model_management.get_torch_device()
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    return found, f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def seconds(function):
    """Return the wall time of one call of `function` in seconds."""
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def median_seconds(function, repeat):
    """Return the median wall time of `function` in seconds, after one call that is not counted."""
    function()
    return statistics.median(seconds(function) for _ in range(repeat))


def median_share(function, baseline, repeat):
    """Return the median of `function`'s wall time over `baseline`'s. They are called in turn, after one call that is not
    counted.
    """
    function()
    return statistics.median(seconds(function) / seconds(baseline) for _ in range(repeat))


class InstantGuider:
    """Replace the host's guider by one whose network costs next to nothing."""

    def __init__(self):
        import comfy.model_base

        config = types.SimpleNamespace(sampling_settings={})
        sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.EPS)
        self.inner_model = types.SimpleNamespace(model_sampling=sampling)
        self.model_patcher = types.SimpleNamespace(get_model_object=lambda name: getattr(self.inner_model, name))
        self.cfg = 1.0

    def __call__(self, x, sigma, model_options=None, seed=None):
        return x * 0.9


def overhead(nodes, repeat):
    """Measure the time that the wrapper adds to an evaluation, relative to an evaluation of a U-Net of SD 1.5's shape."""
    import comfy.samplers
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    at, name = device()
    dtype, steps = torch.float16 if at.type == "cuda" else torch.float32, 50
    unet = UNetModel(**SD15, dtype=dtype, device=at, operations=comfy.ops.disable_weight_init).eval()
    for parameter in unet.parameters():  # the layers are created without values
        torch.nn.init.normal_(parameter, std=0.02)
    x, context = torch.randn(2, 4, 64, 64, device=at, dtype=dtype), torch.randn(2, 77, 768, device=at, dtype=dtype)
    timesteps = torch.full((2,), 500.0, device=at)
    evaluation = median_seconds(lambda: unet(x, timesteps, context=context, transformer_options={}), repeat)

    latent, sigmas = torch.randn(1, 4, 64, 64, device=at), torch.linspace(14, 0, steps + 1, device=at)
    stock = comfy.samplers.sampler_object("euler")
    rows = []
    for kind, iterations in (("stock sampler", None), ("IEC, none", 0), ("IEC, all, K 1", 1), ("IEC, all, K 3", 3)):
        sampler = stock
        if iterations is not None:
            settings = {**CORRECTION, "max_iterations": iterations, "tolerance": 0.0}
            sampler = nodes["IECSampler"].execute(sampler=stock, **settings).result[0]

        def run(sampler=sampler):
            extra = {"model_options": {}, "seed": 1}
            sampler.sample(InstantGuider(), sigmas, extra, None, latent.clone(), torch.zeros_like(latent), None, True)

        seconds = median_seconds(run, 5 * repeat)
        evaluations = steps * (1 + (iterations or 0))
        rows.append((kind, evaluations, seconds))
    print(f"\nWrapper overhead. {name}; latent 1 x 4 x 64 x 64, {steps} Euler steps, a network that costs nothing; ", end="")
    print(f"one evaluation of the U-Net of SD 1.5's shape (batch 2, {dtype}): {evaluation * 1e3:.1f} ms\n")
    print("| run | evaluations | whole run, ms | above stock, a run, ms | above stock, share of the U-Net's evaluations |")
    print("| --- | --- | --- | --- | --- |")
    for kind, evaluations, seconds in rows:
        above = seconds - rows[0][2]
        share = above / (evaluations * evaluation)
        print(f"| {kind} | {evaluations} | {seconds * 1e3:.1f} | {above * 1e3:.1f} | {share:.3%} |")


# The prompts and the seed of calibrations.
PROMPTS = ("face, heart", "person, vehicle", "fruit, boat", "clock, flag")
CALIBRATION_SEED = 500


def rehearsals(nodes, repeat):
    """Measure a rehearsal of each of the host's samplers; a corrected run begins with one rehearsal."""
    import comfy.samplers

    host = pack.pack_module("nodes.host.sampling.rehearsal")
    at = host.NoModel()
    latent = torch.zeros(1, 4, 64, 64)
    table("sampler", "20 steps, ms", "500 steps, ms", "20 steps again, ms")
    for name in comfy.samplers.KSampler.SAMPLERS:
        sampler = comfy.samplers.sampler_object(name)
        sigmas = {steps: comfy.samplers.KSampler(at, steps, "cpu", name, "karras", 1.0).sigmas for steps in (20, 500)}

        def rehearse(steps, how, sampler=sampler, sigmas=sigmas):
            how(sampler.sampler_function, at, latent, sigmas[steps], {"seed": 1}, sampler.extra_options, True)

        try:
            took = [median_seconds(lambda steps=steps: rehearse(steps, host.rehearse), repeat) for steps in (20, 500)]
            again = median_seconds(lambda: rehearse(20, host.rehearsal_of), repeat)
        except host.CannotRehearse:
            continue
        row(name, *(f"{1000 * seconds:.0f}" for seconds in took), f"{1000 * again:.2f}")


def calibration_inputs(nodes, steps, runs, sampler_name="ddim", scheduler="normal", cfg=3.0, prompts=PROMPTS):
    """Return the inputs of a calibrating node's runs, on four pairs of classes, with seeds of their own."""
    label = nodes["IECClassLabel"]
    names = ("positive", "positive_2", "positive_3", "positive_4")
    return {
        **{name: label.execute(labels=text).result[0] for name, text in zip(names, prompts)},
        "negative": label.execute(labels="none").result[0],
        "latent_image": {"samples": torch.zeros(experiment_rows.CALIBRATION_IMAGES, 3, 32, 32)}, "seed": CALIBRATION_SEED,
        "runs": runs, "steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler,
    }  # fmt: skip


class Builtin:
    """Sample a built-in model in float32: eight classes, guidance scale 3, DDIM."""

    LABELS = "face, heart, person, vehicle, fruit, boat, clock, flag"

    def __init__(self, nodes, architecture="unet"):
        self._nodes = nodes
        self.model = nodes["IECLoadBuiltinModel"].execute(precision="float32", architecture=architecture).result[0]
        self.is_flow = architecture == "transformer"
        self.conditioning = [nodes["IECClassLabel"].execute(labels=text).result[0] for text in (self.LABELS, "none")]

    def variant(self, bits=None, **cache):
        """Return the model with weights of `bits` bits and 8-bit activations, and with a DeepCache of these inputs.

        Its branch is 0 and its schedule uniform unless the inputs have others.
        """
        model = self.model
        if bits:
            inputs = {"weight_bits": str(bits), "activation_bits": "8", "keep_sensitive_layers": True}
            model = self._nodes["IECQuantizeModel"].execute(model=model, **inputs).result[0]
        if cache:
            model = self._nodes["IECDeepCache"].execute(model=model, **{"branch": 0, "schedule": "uniform", **cache}).result[0]
        return model

    def sample(self, model, seed, steps=50, scheduler="ddim_uniform", sampler="ddim", **correction):
        """Return the latents [8, 3, 32, 32]; correction: inputs of IECKSampler, default none."""
        return self.run(model, seed, steps, scheduler, sampler, **correction)[0]

    def run(self, model, seed, steps, scheduler, sampler, **correction):
        """Return (latents, [RunReport]) of the same run as `sample`."""
        positive, negative = self.conditioning
        settings = {**CORRECTION, "correction_steps": "none", **correction}
        sampled = self._nodes["IECKSampler"].execute(
            model=model, seed=seed, steps=steps, cfg=3.0, sampler_name=sampler, scheduler=scheduler, positive=positive,
            negative=negative, latent_image={"samples": torch.zeros(8, 3, 32, 32)}, denoise=1.0, **settings,
        )  # fmt: skip
        return sampled.result[0]["samples"], sampled.result[1]


def mean_error(latents, references):
    """Return ||x - reference|| / ||reference||, the mean over all images of all seeds; both are lists of [B, ...]."""
    errors = [(x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1) for x, y in zip(latents, references)]
    return torch.cat(errors).mean().item()


AUTO = {"correction_steps": "auto"}
SEEDS = (11, 12)  # not the seeds that were used to choose the settings of `auto`
VARIANTS = {
    "full precision": {}, "W8A8": {"bits": 8}, "W4A8": {"bits": 4},
    "DeepCache 3": {"interval": 3}, "DeepCache 5": {"interval": 5},
}  # fmt: skip
FORECASTS = ("hold", "linear", "auto")
REASONS = ("nothing", "multiplies", "higher order", "its own")  # one word from each of the warnings
INTERVALS = (2, 3, 5)
# The share of an uncached run's time that DeepCache takes in 20 steps, by interval: from docs/results/times.csv, except the
# U-Net's at interval 5.
SHARES = {"unet": {2: 0.56, 3: 0.44, 5: 0.30}, "transformer": {2: 0.75, 3: 0.60}}


@functools.cache
def exact_of(builtin, scheduler, seeds=SEEDS):
    """Return each seed's latents of the reference run that approximates the exact solution: 100 steps of heun on the schedule.

    All schedules of a flow model begin at sigma 1, and schedules with small steps there do not converge: flow models use
    simple.
    """
    scheduler = "simple" if builtin.is_flow else scheduler
    return [builtin.sample(builtin.model, seed, 100, scheduler, "heun") for seed in seeds]


def table(*columns):
    """Print the head of a table."""
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def row(*cells):
    """Print a row of a table; floats with three decimals."""
    print(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def caches(nodes, architecture):
    """Compare, for several samplers, the feature forecasts on cached steps with fewer uncached steps in the same time."""
    builtin, scheduler = Builtin(nodes, architecture), "simple" if architecture == "transformer" else "karras"
    print(
        f"\nForecasts. {device()[1]}; built-in {architecture}, float32, {scheduler}, batch 8, cfg 3, seeds {SEEDS}; DeepCache"
    )
    print("branch 0. The error to full precision of as many steps, and in brackets that to 100 steps of heun.\n")
    table("sampler", "steps", "interval", *FORECASTS, "uncached, fewer steps")
    runs = [("euler", {}), ("euler", AUTO), ("dpmpp_2m", {}), ("dpmpp_2m_sde", {}), ("euler_ancestral", {})]
    exact = exact_of(builtin, scheduler)

    def sampled(model, steps, sampler, correction):
        return [builtin.sample(model, seed, steps, scheduler, sampler, **correction) for seed in SEEDS]

    for steps, (sampler, correction) in itertools.product((10, 20, 30), runs):
        own = sampled(builtin.model, steps, sampler, {})
        for interval, share in SHARES[architecture].items():
            models = [(builtin.variant(interval=interval, forecast=forecast), steps) for forecast in FORECASTS]
            models.append((builtin.model, round(steps * share)))
            cells = []
            for model, count in models:
                latents = sampled(model, count, sampler, correction)
                cells.append(f"{mean_error(latents, own):.3f} ({mean_error(latents, exact):.3f})")
            row(sampler + (", auto" if correction else ""), steps, interval, *cells)


def calibrated(nodes, architecture):
    """Compare calibrated caches: corrected from the last feature or from the last two, on either schedule."""
    builtin, scheduler, steps = Builtin(nodes, architecture), "simple" if architecture == "transformer" else "karras", 20
    kinds = list(itertools.product(("uniform", "dps"), ("hold", "linear")))
    print(
        f"\nCalibrated caches. {device()[1]}; built-in {architecture}, float32, {steps} steps on {scheduler}, batch 8, cfg 3,"
    )
    print(f"seeds {SEEDS}; branch 0, calibrated on four pairs of classes, two runs each. The error to full precision.\n")
    table("sampler", "interval", "DeepCache, hold", "DeepCache, auto", *(f"CacheQuant, {', '.join(kind)}" for kind in kinds))
    for sampler in ("euler", "euler_ancestral"):
        inputs = calibration_inputs(nodes, steps, 2, sampler, scheduler)
        own = [builtin.sample(builtin.model, seed, steps, scheduler, sampler) for seed in SEEDS]
        for interval in INTERVALS:
            models = [builtin.variant(interval=interval, forecast=forecast) for forecast in ("hold", "auto")]
            for schedule, forecast in kinds:
                profile = nodes["IECCalibrateCacheQuant"].execute(
                    model=builtin.model, **inputs, interval=interval, branch=0, schedule=schedule, forecast=forecast
                ).result[0]  # fmt: skip
                models.append(nodes["IECCacheQuant"].execute(model=builtin.model, profile=profile).result[0])
            runs = [[builtin.sample(model, seed, steps, scheduler, sampler) for seed in SEEDS] for model in models]
            row(sampler, interval, *(mean_error(latents, own) for latents in runs))


class AncestralPath:
    """Noise for euler_ancestral (and ddpm, which takes the same step) that is the same on a schedule and on any split of its
    steps.

    All runs follow one path: a step's noise is a weighted sum of the noises of its split steps, which has the same effect where
    D stays the same.
    """

    def __init__(self, sigmas, split):
        pairs = itertools.pairwise(sigmas.tolist())
        steps = [here * (then / here) ** (part / split) for here, then in pairs if then > 0 for part in range(split)]
        self.sigmas = torch.tensor([*steps, *sigmas[-2:].tolist()])  # sigmas of the split schedule, [n + 1] on the CPU

    def sampler(self, x, seed=None):
        """Return noise_sampler(sigma, sigma_next), instead of the host's `default_noise_sampler`."""
        generator = torch.Generator().manual_seed(seed)
        fine = list(itertools.pairwise(self.sigmas[:-1].tolist()))
        drawn = [torch.randn(x.shape, generator=generator) for _ in fine]

        def up(here, then):
            return then * (here**2 - then**2) ** 0.5 / here

        def noise(sigma, sigma_next):
            here, then, total = float(sigma), float(sigma_next), torch.zeros(x.shape)
            for (begin, end), one in zip(fine, drawn):
                if begin <= here * (1 + 1e-4) and end >= then * (1 - 1e-4):
                    total += then**2 / end**2 * up(begin, end) * one
            return (total / up(here, then)).to(x)

        return noise


def stochastic(nodes, repeat):
    """Compare euler_ancestral with default inputs to the solution of its stochastic equation along the same noise path."""
    import comfy.sample
    import comfy.samplers
    from comfy.k_diffusion import sampling

    builtin, split = Builtin(nodes), 8
    print(f"\neuler_ancestral, stock → auto. {device()[1]}; built-in model, float32, batch 8, cfg 3, seeds {SEEDS}.")
    print(f"The error to the same path of noise in steps split in {split}.\n")
    table("schedule", "steps", "full precision", "W8A8", "W4A8", "DeepCache 3")

    def sampled(model, sampler, sigmas, seed):
        empty, (positive, negative) = torch.zeros(8, 3, 32, 32), builtin.conditioning
        noise = comfy.sample.prepare_noise(empty, seed)
        return comfy.sample.sample_custom(
            model, noise, 3.0, sampler, sigmas, positive, negative, empty, seed=seed, disable_pbar=True
        )

    stock, before = comfy.samplers.sampler_object("euler_ancestral"), sampling.default_noise_sampler
    auto = nodes["IECSampler"].execute(sampler=stock, lambda_=0.5, max_iterations=1, tolerance=1e-5, **AUTO).result[0]
    try:
        for scheduler, steps in itertools.product(("karras", "normal"), (10, 20, 30)):
            sigmas = comfy.samplers.calculate_sigmas(builtin.model.get_model_object("model_sampling"), scheduler, steps)
            path, cells = AncestralPath(sigmas, split), []
            sampling.default_noise_sampler = path.sampler
            exact = [sampled(builtin.model, stock, path.sigmas, seed) for seed in SEEDS]
            for name in ("full precision", "W8A8", "W4A8", "DeepCache 3"):
                model = builtin.variant(**VARIANTS[name])
                runs = [[sampled(model, sampler, sigmas, seed) for seed in SEEDS] for sampler in (stock, auto)]
                cells.append(" → ".join(f"{mean_error(latents, exact):.3f}" for latents in runs))
            row(scheduler, steps, *cells)
    finally:
        sampling.default_noise_sampler = before


def bias(nodes, architecture):
    """Compare the estimated effect of a correction by itself, on which a run's warning is based, with the measured change."""
    builtin = Builtin(nodes, architecture)
    # In eight images of the transformer, the one or two that become a different image dominate the mean.
    seeds = (*SEEDS, 13, 14) if builtin.is_flow else SEEDS[:1]
    print(f"\nWhat a correction does by itself. {device()[1]}; built-in {architecture}, float32, batch 8, cfg 3,")
    print(f"seeds {seeds}. The error is that to 100 steps of heun.\n")
    table("sampler, schedule", "steps", "model", "corrected", "estimate", "moved", "error, stock → corrected", "warning")
    models = {name: builtin.variant(**VARIANTS[name]) for name in ("full precision", "W8A8", "DeepCache 5")}
    even, uneven = ("simple", "beta") if builtin.is_flow else ("karras", "normal")
    runs = [("euler", even, steps) for steps in (10, 20, 50)] + [("euler", "simple", 20)]
    runs += [("dpmpp_2m", even, 20), ("dpmpp_2m", uneven, 20), ("uni_pc", even, 20), ("heun", even, 20)]
    for sampler, scheduler, steps in dict.fromkeys(runs):
        exact = exact_of(builtin, scheduler, seeds)
        for name, model in models.items():
            plain = [builtin.sample(model, seed, steps, scheduler, sampler) for seed in seeds]
            for point, text in itertools.product(("paper", "next"), ("ends:1/10", "all")):
                correction = {"correction_steps": text, "evaluation_point": point}
                found = [builtin.run(model, seed, steps, scheduler, sampler, **correction) for seed in seeds]
                latents, reports = [one for one, _ in found], [report for _, (report,) in found]
                change = f"{mean_error(plain, exact):.3f} → {mean_error(latents, exact):.3f}"
                moved = statistics.mean(report.moved for report in reports), mean_error(latents, plain)
                row(f"{sampler}, {scheduler}", steps, name, f"{point}, {text}", *moved, change, said_in(reports))


def said_in(reports):
    """Return the most frequent warning word of the reports, "-" for no warning."""
    said = [next((word for word in REASONS if any(word in text for text in report.warnings)), "-") for report in reports]
    return statistics.mode(said)


def correction_pass(nodes, repeat):
    """Measure time and error of each `correction_pass` on cached features."""
    builtin, seeds = Builtin(nodes), (2, 3)
    references = [builtin.sample(builtin.model, seed) for seed in seeds]
    full = median_seconds(lambda: builtin.sample(builtin.model, 2), repeat)
    print(f"\nCorrection on cached features. {device()[1]}; built-in model, float32, 50 DDIM steps, batch 8, cfg 3,")
    print(f"seeds {seeds}; ", end="")
    print(f"DeepCache branch 0. Full precision without a cache takes {full:.2f} s\n")
    print("| interval | corrected | evaluation_point | correction_pass | time, share of full | error to full precision |")
    print("| --- | --- | --- | --- | --- | --- |")
    passes = [("none", "paper", "refresh")]
    passes += [("all", point, kind) for point in ("paper", "next") for kind in ("refresh", "keep", "reuse")]
    for interval in (3, 5):
        for steps, point, kind in passes:
            model = builtin.variant(interval=interval, correction_pass=kind, forecast="hold")
            correction = {"correction_steps": steps, "evaluation_point": point}
            seconds = median_seconds(lambda: builtin.sample(model, 2, **correction), repeat)  # noqa: B023
            error = mean_error([builtin.sample(model, seed, **correction) for seed in seeds], references)
            shown = "- | -" if steps == "none" else f"{point} | {kind}"
            print(f"| {interval} | {steps} | {shown} | {seconds / full:.2f} | {error:.3f} |", flush=True)


OF_BOTH_MODELS = {"caches": caches, "calibrated": calibrated, "bias": bias}
BENCHMARKS = {"overhead": overhead, "rehearsals": rehearsals, "correction_pass": correction_pass, "stochastic": stochastic}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *OF_BOTH_MODELS, *BENCHMARKS], help="default: all")
    parser.add_argument("--architecture", default="unet", choices=("unet", "transformer"), help="of the built-in model")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls of each, after one that is not timed")
    arguments = parser.parse_args()
    nodes = comfyui.load_nodes(cpu=not torch.cuda.is_available())
    with torch.inference_mode():
        for name in arguments.names or [*OF_BOTH_MODELS, *BENCHMARKS]:
            if name in OF_BOTH_MODELS:
                OF_BOTH_MODELS[name](nodes, arguments.architecture)
            else:
                BENCHMARKS[name](nodes, arguments.repeat)


if __name__ == "__main__":
    main()
