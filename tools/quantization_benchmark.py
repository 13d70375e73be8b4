"""Measure quality, savings and cost of quantization, for docs/quantization.md.

    python tools/quantization_benchmark.py [--steps 20] [--seeds 4]
    python tools/quantization_benchmark.py --weights [--steps 20 50] [--seeds 4] [--architecture transformer]
    python tools/quantization_benchmark.py --speed [--repeat 5] [--latent 128] [--networks "SD 1.5" SDXL Flux] [--compile]

Without an option: formats on the built-in model: error, PSNR and Fréchet distance to full precision, with dynamic, static and
timestep-wise activation scales, and with corrections.

With --weights: the same for ways to round the weights, and the time of calibrating. Calibration uses other classes and seeds
than the measured images.

With --speed: one evaluation of networks of true shapes with random weights. The pack's formats are compared with the model's
own dtype, and with the host's own formats and torchao's int8 if they are installed, as medians of shares measured in turn; also
the memory of the weights as the host counts it. On a GPU also which share of the device's peak the layers with most of the work
reach.
"""

import argparse
import functools
import os
import time

import benchmark
import comfyui
import torch
from networks import LINEAR, random_model
from other_formats import OTHERS, NotThere, in_other_format
from quality import Quality

FORMATS = {
    "W8A8": ("8", "8", {}),
    "W8A8, rotated": ("8", "8", {"rotate": True}),
    "W8A8, one scale a tensor": ("8", "8", {"activation_scale": "tensor"}),
    "W4A8": ("4", "8", {}),
    "W4A8, scales by search": ("4", "8", {"weight_scale": "search"}),
    "W8A16": ("8", "16", {}),
    "W4A16": ("4", "16", {}),
    "W4A16, scales by search": ("4", "16", {"weight_scale": "search"}),
    "W4A16, groups of 64": ("4", "16", {"group_size": "64"}),
    "W4A16, groups of 64 by search": ("4", "16", {"group_size": "64", "weight_scale": "search"}),
    "W4A16, groups of 32 by search": ("4", "16", {"group_size": "32", "weight_scale": "search"}),
    "fp8": ("fp8", "8", {}),
}
CORRECTIONS = {
    "": {},
    "; IEC paper, ends:1/10": {"correction_steps": "ends:1/10", "evaluation_point": "paper"},
    "; IEC next, ends:1/10": {"correction_steps": "ends:1/10", "evaluation_point": "next"},
    "; IEC next, all": {"correction_steps": "all", "evaluation_point": "next"},
}


def quantized(nodes, model, name):
    weight_bits, activation_bits, more = FORMATS[name]
    inputs = {"weight_bits": weight_bits, "activation_bits": activation_bits, "keep_sensitive_layers": True, **more}
    return nodes["IECQuantizeModel"].execute(model=model, **inputs).result[0]


def calibrated(nodes, model, steps, scales):
    """Return the MODEL with activation scales calibrated by runs on four pairs of classes."""
    return nodes["IECCalibrateQuantization"].execute(
        model=model, **benchmark.calibration_inputs(nodes, steps, runs=1), scales=scales, activation_scale="search"
    ).result[0]  # fmt: skip


def keep(nodes, steps, seeds):
    """Print how well every format keeps the built-in model's images."""
    quality = Quality(nodes, steps, seeds)
    size = size_of(quality.builtin.model)
    print(
        f"\nFormats. {benchmark.device()[1]}; built-in model, {steps} DDIM steps on normal, cfg 3, {seeds} seeds of 8 images."
    )
    print(f"Fréchet distance of as many images of other seeds: {quality.floor:.3f}\n")
    print("| format | weights, share of float16 | error | PSNR, dB | Fréchet distance |")
    print("| --- | --- | --- | --- | --- |")

    def row(name, model, **correction):
        error, psnr, distance = quality.of(model, **correction)
        share = size_of(model) / (size / 2)
        print(f"| {name} | {share:.3f} | {error:.4f} | {psnr:.1f} | {distance:.4f} |", flush=True)

    for name in FORMATS:
        row(name, quantized(nodes, quality.builtin.model, name))
    for name in ("W8A8", "W4A8, scales by search"):
        base = quantized(nodes, quality.builtin.model, name)
        variants = {f"{name}, dynamic": base}
        for scales in ("static", "timestep-wise"):
            variants[f"{name}, {scales}"] = calibrated(nodes, base, steps, scales)
        for label, model in variants.items():
            for correction, inputs in CORRECTIONS.items():
                row(label + correction, model, **inputs)


# Classes that `benchmark.Builtin` does not draw.
OTHER_PROMPTS = ("hand, mammal", "bird, flower", "dish, drink", "building, tool")
NEAREST, SEARCH = {"weight_scale": "absmax"}, {"weight_scale": "search"}
# (weight_bits, activation_bits, other inputs: of Quantize Model if they have weight_scale, else of Calibrate Weights)
ROUNDINGS = {
    "W8A8": ("8", "8", NEAREST),
    "W8A8, GPTQ": ("8", "8", {"rank": "0"}),
    "W4A8": ("4", "8", NEAREST),
    "W4A8, scales by search": ("4", "8", SEARCH),
    "W4A8, groups of 32": ("4", "8", {**NEAREST, "group_size": "32"}),
    "W4A8, GPTQ": ("4", "8", {"rank": "0"}),
    "W4A8, GPTQ, groups of 64": ("4", "8", {"rank": "0", "group_size": "64"}),
    "W4A8, GPTQ, groups of 32": ("4", "8", {"rank": "0", "group_size": "32"}),
    "W4A8, GPTQ, groups of 16": ("4", "8", {"rank": "0", "group_size": "16"}),
    "W4A8, GPTQ, rank 8": ("4", "8", {"rank": "8"}),
    "W4A8, GPTQ, rank 16": ("4", "8", {"rank": "16"}),
    "W4A8, GPTQ, rank 16, groups of 32": ("4", "8", {"rank": "16", "group_size": "32"}),
    "W4A8, GPTQ, rank 32": ("4", "8", {"rank": "32"}),
    "W4A16, GPTQ, rank 16": ("4", "16", {"rank": "16"}),
    "mixed, 4.5 bits": ("mixed", "8", {"rank": "auto", "average_bits": 4.5}),
    "mixed, 5 bits": ("mixed", "8", {"rank": "auto", "average_bits": 5.0}),
    "mixed, 6 bits": ("mixed", "8", {"rank": "auto", "average_bits": 6.0}),
    "mixed, 4.5 bits, groups of 32": ("mixed", "8", {"rank": "auto", "average_bits": 4.5, "group_size": "32"}),
    "mixed, 5 bits, groups of 32": ("mixed", "8", {"rank": "auto", "average_bits": 5.0, "group_size": "32"}),
}


def weights(nodes, counts, seeds, architecture, names, runs=2):
    """Print how well ways to round the weights keep a built-in model's images at these numbers of steps."""
    qualities = [Quality(nodes, steps, seeds, architecture) for steps in counts]
    full, (scheduler, sampler) = qualities[0].builtin.model, qualities[0].sampling
    of_runs = benchmark.calibration_inputs(nodes, 20, runs, sampler, scheduler, prompts=OTHER_PROMPTS)
    print(f"\nWeights. {benchmark.device()[1]}; built-in {architecture}, {sampler} on {scheduler}, cfg 3, {seeds} seeds of 8")
    print(f"images; calibrated on other classes and seeds: 4 prompts, {runs} runs each of 2 images, 20 steps.")
    print(f"Fréchet distance of as many images of other seeds: {', '.join(f'{quality.floor:.3f}' for quality in qualities)}\n")
    benchmark.table(
        "weights and activations", "memory, share of float16", "made in, s",
        *(f"error, PSNR in dB, Fréchet distance, {steps} steps" for steps in counts),
    )  # fmt: skip
    for name in names:
        begin = time.perf_counter()
        try:
            model, unseen = in_other_format(nodes, full, name) if name in OTHERS else (rounded(nodes, full, name, of_runs), 0)
        except NotThere as reason:
            print(f"| {name} | not measured: {reason} |")
            continue
        seconds, share = time.perf_counter() - begin, (size_of(model) + unseen) / (size_of(full) / 2)
        kept = ["{:.4f}, {:.1f}, {:.3f}".format(*quality.of(model)) for quality in qualities]
        benchmark.row(name, share, f"{seconds:.0f}", *kept)


def rounded(nodes, full, name, of_runs):
    """Return the MODEL with weights rounded by one of the ROUNDINGS. of_runs: inputs of a calibrating node."""
    weight_bits, activation_bits, more = ROUNDINGS[name]
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits, "keep_sensitive_layers": True}
    if "weight_scale" in more:
        return nodes["IECQuantizeModel"].execute(model=full, **bits, **more).result[0]
    return nodes["IECCalibrateWeights"].execute(model=full, **bits, **of_runs, **more).result[0]


def size_of(model):
    """Return the bytes of a MODEL's weights, as the host counts them."""
    import comfy.model_management

    return comfy.model_management.module_size(model.model)


def speed(nodes, kinds, repeat, latent, compiled):
    """Print time and memory of one evaluation of each network in each format."""
    for kind in kinds:
        model, conditioning = random_model(kind)
        full = Evaluation(model, conditioning, latent, compiled)
        dtype = str(model.model.get_dtype()).removeprefix("torch.")
        seconds = benchmark.median_seconds(full, repeat)
        print(f"\nSpeed of {kind}. {benchmark.device()[1]}; random weights, latent side {latent}, batch 2, {dtype}"
              f"{', torch.compile' if compiled else ''}: {seconds * 1e3:.1f} ms an evaluation\n")  # fmt: skip
        print(f"| format | faster than {dtype} by | weights, share of {dtype} | computed by |")
        print("| --- | --- | --- | --- |")
        for name in ("W8A8", "W8A8, rotated", "W4A8", "W8A16", "W4A16, groups of 64", "fp8"):
            variant = quantized(nodes, model, name)
            share = share_of(full, Evaluation(variant, conditioning, latent, compiled), repeat)
            backends = {layer.choice(variant.load_device).backend for layer in layers(variant)}
            size = size_of(variant) / size_of(model)
            print(f"| {name} | {1 / share:.2f} | {size:.3f} | {'; '.join(sorted(backends))} |", flush=True)
        others(nodes, kind, model, conditioning, latent, compiled, full, repeat)
        variant = quantized(nodes, model, "W8A8")
        roofline(variant, Evaluation(variant, conditioning, latent, False))


def share_of(full, evaluation, repeat):
    """Return an evaluation's time as a share of the full-precision evaluation's; both models stay loaded."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([full.model, evaluation.model], force_full_load=True)
    return benchmark.median_share(evaluation, full, repeat)


def layers(model):
    return [layer for layer in model.model.diffusion_model.modules() if hasattr(layer, "packing")]


class Evaluation:
    """One evaluation of a MODEL's network, as a function."""

    def __init__(self, model, conditioning, latent, compiled):
        import comfy.model_management

        if compiled:
            from comfy_api.torch_helpers import set_torch_compile_wrapper

            model = model.clone()
            set_torch_compile_wrapper(model=model, backend="inductor")
        self.model, device = model, model.load_device
        channels = model.model.latent_format.latent_channels
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(2, channels, latent, latent, generator=generator).to(device)
        self._sigma = torch.full((2,), 1.0, device=device)
        cond = conditioning[0][0].to(device).expand(2, -1, -1)
        options = {"cond_or_uncond": [0, 1], "sigmas": self._sigma, "wrappers": model.wrappers}  # among them torch.compile
        self._conds = {"c_crossattn": cond, "transformer_options": options}
        pooled = conditioning[0][1]["pooled_output"].to(device).expand(2, -1)
        if model.model.adm_channels:
            width = getattr(model.model, "adm_channels", pooled.shape[1])
            self._conds["y"] = torch.nn.functional.pad(pooled, (0, width - pooled.shape[1]))
        comfy.model_management.load_models_gpu([model], force_full_load=True)

    def __call__(self):
        return self.model.model.apply_model(self._x, self._sigma, **self._conds)


def others(nodes, kind, model, conditioning, latent, compiled, full, repeat):
    """Print the lines of other formats: torchao's int8, and the host's float8 and int8."""
    makers = {
        "torchao's int8 dynamic": lambda: torchao_int8(kind),
        "the host's float8": lambda: host_float8(kind),
        "the host's int8, Linear layers": lambda: host_int8(nodes, kind, model),
    }
    for name, make in makers.items():
        try:
            other = make()
        except NotThere as reason:
            print(f"| {name} | not measured: {reason} | | |")
            continue
        share = share_of(full, Evaluation(other, conditioning, latent, compiled), repeat)
        print(f"| {name} | {1 / share:.2f} | | |", flush=True)  # special tensor types report their bytes differently


# Peak dense int8 operations per second and bytes per second, from the makers' data sheets.
PEAKS = {
    "H100 80GB HBM3": (1979e12, 3.35e12), "H200": (1979e12, 4.8e12), "A100": (624e12, 2.0e12), "4090": (661e12, 1.01e12),
    "3090": (284e12, 0.94e12),
}  # fmt: skip


def roofline(model, evaluation):
    """Print, for the layers with most of an evaluation's work, which share of the GPU's peak they reach."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((numbers for key, numbers in PEAKS.items() if key in name), None)
    if peak is None:
        print(f"\nRoofline: not measured, for {name + ' is not known' if name else 'there is no GPU'}.")
        return
    seen = {}
    hooks = [layer.register_forward_hook(functools.partial(_note, seen)) for layer in layers(model)]
    try:
        evaluation()
    finally:
        for hook in hooks:
            hook.remove()
    print("\n| layer | x | operations, 10^9 | microseconds | of the int8 peak | of the bandwidth |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape, (layer, operations, count, x) in sorted(seen.items(), key=lambda item: -item[1][1] * item[1][2])[:8]:
        seconds = benchmark.median_seconds(lambda: [layer(x) for _ in range(20)], 5) / 20  # noqa: B023
        moved = layer.weight.nbytes + x.nbytes + operations / layer.packing.inputs / 2 * x.element_size()
        shares = f"{operations / seconds / peak[0]:.1%} | {moved / seconds / peak[1]:.1%}"
        print(f"| {layer.name} ({count} like it) | {shape[0]} | {operations / 1e9:.1f} | {seconds * 1e6:.0f} | {shares} |")


def _note(seen, layer, inputs, output):
    """Count a layer's call: {(shapes): [layer, operations, calls, input]}."""
    key = tuple(inputs[0].shape), tuple(layer.packing.shape)
    operations = 2 * output.numel() * layer.packing.inputs
    seen.setdefault(key, [layer, operations, 0, inputs[0]])[2] += 1


def torchao_int8(kind):
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise NotThere("torchao is not installed") from error
    model, _ = random_model(kind)
    quantize_(model.model.diffusion_model, Int8DynamicActivationInt8WeightConfig())
    return model


def host_float8(kind):
    import comfy.model_management

    if not comfy.model_management.supports_fp8_compute(benchmark.device()[0]):
        raise NotThere("this device does not multiply float8")
    return random_model(kind, float8=True)[0]


def host_int8(nodes, kind, model):
    """Return the MODEL whose Linear layers the host computes in int8, from a file of the pack that the host opens by itself."""
    import comfy.quant_ops
    import comfy.sd
    import folder_paths

    if "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        raise NotThere("this host has no int8")
    inputs = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True, "include": LINEAR[kind]}
    ours = nodes["IECQuantizeModel"].execute(model=model, **inputs).result[0]
    nodes["IECSaveQuantizedModel"].execute(model=ours, name="benchmark_int8")
    path = folder_paths.get_full_path("diffusion_models", "benchmark_int8.safetensors")
    try:
        return comfy.sd.load_diffusion_model(path)
    finally:
        os.remove(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="with --weights as many as are to be told")
    parser.add_argument("--seeds", type=int, default=4, help="eight images each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--weights", action="store_true", help="ways to round the weights instead")
    parser.add_argument(
        "--formats", nargs="+", choices=[*ROUNDINGS, *OTHERS], default=[*ROUNDINGS, *OTHERS], help="rows of --weights"
    )
    parser.add_argument("--architecture", choices=["unet", "transformer"], default="unet", help="for --weights")
    parser.add_argument("--speed", action="store_true", help="time networks of true shapes instead")
    parser.add_argument("--latent", type=int, default=16, help="side of the latent for --speed; 128 is 1024 pixels")
    parser.add_argument("--networks", nargs="+", default=["SD 1.5", "SDXL", "Flux"])
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    arguments = parser.parse_args()
    nodes = comfyui.load_nodes(cpu=not torch.cuda.is_available())
    with torch.inference_mode():
        if arguments.speed:
            speed(nodes, arguments.networks, arguments.repeat, arguments.latent, arguments.compile)
        elif arguments.weights:
            weights(nodes, arguments.steps, arguments.seeds, arguments.architecture, arguments.formats)
        else:
            keep(nodes, arguments.steps[0], arguments.seeds)


if __name__ == "__main__":
    main()
