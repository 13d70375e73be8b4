"""Measure quality and cost of LoRAs after a quantized model, for docs/quantization.md.

    python tools/lora_benchmark.py [--steps 20] [--seeds 2] [--architecture transformer]
    python tools/lora_benchmark.py --speed [--networks "SD 1.5" Flux] [--repeat 9] [--latent 16]

Without --speed, on a built-in model with a random LoRA of rank 16 on all quantized layers: the share of the LoRA's changes that
the weights keep; and the images with the LoRA before and after the node that quantizes. With --speed: the time of an evaluation
of networks of true shapes with such a LoRA after the quantized model, loaded and offloaded, over an evaluation without one.
"""

import argparse

import benchmark
import comfyui
import torch
from networks import random_model
from quality import Quality
from quantization_benchmark import FORMATS, OTHER_PROMPTS, Evaluation, layers, quantized, rounded

NAMES = "W8A8", "fp8", "W4A8", "W4A16, groups of 64", "W4A8, GPTQ, rank 16"
SIZES = 0.01, 0.02, 0.05  # norms of the changes, relative to the norms of the weights
OF_IMAGES = 0.05
RANK = 16
PREFIX = "diffusion_model."


def random_lora(model, names, size):
    """Return the weights of a random LoRA on layers of a MODEL; the norm of each change is `size` times its weight's norm."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name in names:
        weight = model.model.get_parameter(f"{PREFIX}{name}.weight")
        out, into = (torch.randn(shape, generator=generator) for shape in ((len(weight), RANK), (RANK, *weight.shape[1:])))
        norm = ((out.t() @ out) * (into.flatten(1) @ into.flatten(1).t())).sum().sqrt()  # norm of the product
        out = out * (size * weight.float().norm().cpu() / norm)
        found[f"{PREFIX}{name}.lora_up.weight"] = out[..., None, None] if weight.ndim == 4 else out
        found[f"{PREFIX}{name}.lora_down.weight"] = into
    return found


def with_lora(model, lora):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def names_of(model):
    return [layer.name for layer in layers(model)]


def weights_of(model):
    """Return {name: the weight in floating point} of the quantized layers of a MODEL with its patches."""
    model.load(model.load_device, full_load=True)
    try:
        return {layer.name: layer.convert_weight(layer.weight).double().cpu() for layer in layers(model)}
    finally:
        model.detach()


def kept(model, full, size):
    """Return the share of a LoRA's change that the weights of a quantized MODEL keep: the actual change, projected on the
    LoRA's exact change.
    """
    lora = random_lora(full, names_of(model), size)
    before, after = weights_of(model), weights_of(with_lora(model, lora))
    asked = left = 0.0
    for name, weight in before.items():
        out, into = (lora[f"{PREFIX}{name}.{part}.weight"].flatten(1).double() for part in ("lora_up", "lora_down"))
        change = (out @ into).view(weight.shape)
        asked, left = asked + change.square().sum(), left + (change * (after[name] - weight)).sum()
    return (left / asked).item()


def keep(nodes, steps, seeds, architecture):
    """Print the share of a LoRA that quantized built-in models keep, before and after quantization."""
    quality = Quality(nodes, steps, seeds, architecture)
    full, (scheduler, sampler) = quality.builtin.model, quality.sampling
    of_runs = benchmark.calibration_inputs(nodes, steps, 2, sampler, scheduler, prompts=OTHER_PROMPTS)
    print(f"\nLoRAs. {benchmark.device()[1]}; built-in {architecture}, {sampler} on {scheduler}, {steps} steps, cfg 3, {seeds}")
    print(f"seeds of 8 images; a random LoRA of rank {RANK} on all that is quantized, of {OF_IMAGES:.0%} for images.")

    def images(model):
        return [quality.sample(model, seed) for seed in quality.seeds]

    def make(name, source):
        return quantized(nodes, source, name) if name in FORMATS else rounded(nodes, source, name, of_runs)

    lora = random_lora(full, names_of(make(NAMES[0], full)), OF_IMAGES)
    plain, reference = images(full), images(with_lora(full, lora))
    print(f"The LoRA changes the images of full precision by {benchmark.mean_error(plain, reference):.3f}.\n")
    benchmark.table(
        "format", *(f"kept of {size:.0%}" for size in SIZES), "error without LoRA", "error, in front", "error, behind",
        "behind to in front",
    )  # fmt: skip
    for name in NAMES:
        base, front = make(name, full), images(make(name, with_lora(full, lora)))
        behind = images(with_lora(base, lora))
        errors = (images(base), plain), (front, reference), (behind, reference), (behind, front)
        benchmark.row(name, *(kept(base, full, size) for size in SIZES), *(benchmark.mean_error(*pair) for pair in errors))


# The cost


def speed(nodes, kinds, repeat, latent):
    """Print the time of an evaluation of each network with a LoRA after it over one without."""
    for kind in kinds:
        model, conditioning = random_model(kind)
        dtype = str(model.model.get_dtype()).removeprefix("torch.")
        print(
            f"\nTime of {kind} with a LoRA of rank {RANK}. {benchmark.device()[1]}; random weights, latent side {latent}, batch"
        )
        print(f"2, {dtype}: shares of an evaluation without it, the first in seconds\n")
        benchmark.table("format", "loaded", "to load it, s", "offloaded", "offloaded, without it", "first one offloaded, s")
        for name in ("W8A8", "W4A8", "fp8"):
            base = quantized(nodes, model, name)
            patched = with_lora(base, random_lora(model, names_of(base), OF_IMAGES))
            benchmark.row(name, *_times(base, patched, conditioning, repeat, latent))


def _times(base, patched, conditioning, repeat, latent):
    """Return the cells of a row."""
    plain = Evaluation(base, conditioning, latent, False)
    alone = benchmark.median_seconds(plain, repeat)
    to_load = benchmark.seconds(lambda: Evaluation(patched, conditioning, latent, False))
    loaded = benchmark.median_seconds(Evaluation(patched, conditioning, latent, False), repeat) / alone
    offloaded = []
    for source in (patched, base):
        evaluation = Evaluation(source, conditioning, latent, False)
        source.detach()
        source.load(source.load_device, lowvram_model_memory=1)
        first = benchmark.seconds(evaluation)
        offloaded.append((benchmark.median_seconds(evaluation, repeat) / alone, first))
        source.detach()
    (with_it, first), (without, _) = offloaded
    return loaded, f"{to_load:.1f}", with_it, without, f"{first:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="eight images each")
    parser.add_argument("--architecture", choices=["unet", "transformer"], default="unet")
    parser.add_argument("--speed", action="store_true", help="time networks of true shapes instead")
    parser.add_argument("--networks", nargs="+", default=["SD 1.5", "Flux"])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--latent", type=int, default=16, help="side of the latent for --speed; 128 is 1024 pixels")
    arguments = parser.parse_args()
    nodes = comfyui.load_nodes(cpu=not torch.cuda.is_available())
    with torch.inference_mode():
        if arguments.speed:
            speed(nodes, arguments.networks, arguments.repeat, arguments.latent)
        else:
            keep(nodes, arguments.steps, arguments.seeds, arguments.architecture)


if __name__ == "__main__":
    main()
