"""An experiment: how a known error grows over the steps of a sampling run, with and without IEC.

    python tools/error_growth.py [--output FOLDER] [--steps N] [--batch B]

The built-in model samples in this process through the pack's own nodes. A disturbance of known size is added to the network's
output, at every evaluation (growth) or in one step only (impulse). The run is compared with the undisturbed run of the same
settings and seed. Leaves `table.csv` (growth), `impulse.csv`, `curves.csv` (every curve, point by point) and `error_growth.png`
in the output folder. `docs/error_growth.md` describes the results.

An error curve is e_i = ||x_i - x_ref,i|| / ||x_ref,i||, the mean over the batch, for the latent x_i at the start of step i; e_n
is the final latent's. In the paper's coordinates (VP, what the network sees) both norms are divided by sqrt(sigma_i^2 + 1),
which cancels: the curve is the same in the paper's and in the sampler's coordinates.
"""

import argparse
import csv
import functools
import pathlib

import comfyui
import numpy as np
import pack
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import curve_fit

SEED = 1
LABELS = "face, heart, flower, fruit, building, vehicle, clock, flag"
VARIANTS = {
    "none": {"correction_steps": "none"},
    "all": {"correction_steps": "all"},
    "all, K=3": {"correction_steps": "all", "max_iterations": 3},
    "all, next": {"correction_steps": "all", "evaluation_point": "next"},
    "ends:1/10": {"correction_steps": "ends:1/10"},
}
FEW = ("none", "all")
GROWTH = (  # sampler, guidance scale, kind of disturbance, its relative norm, variants
    ("ddim", 1.0, "independent", 0.01, tuple(VARIANTS)),
    ("ddim", 1.0, "independent", 0.001, FEW),
    ("ddim", 1.0, "constant", 0.01, ("none", "all", "all, next", "ends:1/10")),
    ("ddim", 1.0, "smooth", 0.01, FEW),
    ("ddim", 1.0, "smooth constant", 0.01, FEW),
    ("ddpm", 1.0, "independent", 0.01, (*FEW, "all, next")),
    ("ddpm", 1.0, "constant", 0.01, FEW),
    ("ddpm", 1.0, "smooth", 0.01, FEW),
    ("euler_ancestral", 1.0, "independent", 0.01, FEW),
    ("ddim", 3.0, "independent", 0.01, FEW),
)
IMPULSE_SIZE = 0.05
IMPULSE_AT = (0.0, 0.1, 0.5, 0.9)  # shares of the steps
IMPULSES = (  # sampler, kind of disturbance, variants
    ("ddim", "constant", FEW),
    ("ddim", "smooth constant", FEW),
    ("ddim", "independent", (*FEW, "all, K=3", "all, next")),
    ("ddpm", "independent", FEW),
)
COLOURS = {"none": "#000000", "all": "#D55E00", "all, K=3": "#CC79A7", "all, next": "#0072B2", "ends:1/10": "#009E73"}
SAMPLER_LINES = {  # the curves of ddpm and euler_ancestral coincide
    "ddim": {"color": "#000000"},
    "ddpm": {"color": "#E69F00", "linewidth": 5, "alpha": 0.5},
    "euler_ancestral": {"color": "#0072B2"},
}
STYLES = {"none": "-", "all": "--"}
STEP_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")


def with_wrapper(model, wrapper):
    """Return a clone of a MODEL whose network output, [B, ...], is that of wrapper(network, place, conditionings).

    network(): returns the original output. place: (step, iteration), as the pack reports it. conditionings: a number for each
    part of the batch, 0 with the label and 1 without.
    """
    from comfy.patcher_extension import WrappersMP

    def wrapped(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        def network():
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

        place = transformer_options["iec"]["step"], transformer_options["iec"]["iteration"]
        return wrapper(network, place, tuple(transformer_options["cond_or_uncond"]))

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "error_growth", wrapped)
    return model


def recording(model, record):
    """Return a clone of a MODEL that stores the network's outputs, [B, ...], in `record` by (step, iteration)."""

    def keep(network, place, conditionings):
        record[place, conditionings] = network()
        return record[place, conditionings]

    return with_wrapper(model, keep)


def direction(shape, kind, place, conditioning):
    """Return a random tensor of this shape, [B, C, H, W], the same in every run.

    independent: a different tensor at every place, (step, iteration). constant: one tensor for all places. Both are white
    noise. smooth and smooth constant: the same two with low spatial frequency, 4 x 4 values enlarged to H x W.
    """
    step, iteration = (0, 0) if "constant" in kind else place
    seed = 1_000_003 + 1000 * step + 10 * iteration + conditioning  # far from the seeds of the sampler's noise
    generator = torch.Generator().manual_seed(seed)
    if "smooth" in kind:
        return torch.nn.functional.interpolate(torch.randn((*shape[:2], 4, 4), generator=generator), shape[2:], mode="bicubic")
    return torch.randn(shape, generator=generator)


def disturbance(output, size, kind, place, conditionings):
    """Return the disturbance of the network's output [B, ...]: per item, of `size` times the output's Euclidean norm."""
    parts = [direction(part.shape, kind, place, which) for part, which in zip(output.chunk(len(conditionings)), conditionings)]
    noise = torch.cat(parts)
    norms = torch.linalg.vector_norm(output.flatten(1), dim=1) / torch.linalg.vector_norm(noise.flatten(1), dim=1)
    return size * norms.reshape(-1, *[1] * (output.ndim - 1)) * noise


def disturbed(model, size, kind):
    """Return a clone of a MODEL with a disturbance of relative norm `size` at every evaluation."""

    def disturb(network, place, conditionings):
        output = network()
        return output + disturbance(output, size, kind, place, conditionings)

    return with_wrapper(model, disturb)


def disturbed_once(model, size, kind, at, record):
    """Return a clone of a MODEL that is disturbed at every evaluation of the step `at`, and at no other step.

    A constant kind then gives the same error with and without correction. Before step `at`, the network's outputs are the
    recorded ones.
    """

    def disturb(network, place, conditionings):
        if place[0] < at:
            return record[place, conditionings]
        output = network()
        return output + disturbance(output, size, kind, place, conditionings) if place[0] == at else output

    return with_wrapper(model, disturb)


def sample(known, model, sampler, cfg, variant, steps, batch):
    """Return the RunReport of an IECKSampler run; known: node classes by id."""
    inputs = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0, **VARIANTS[variant]}
    positive, negative = (known["IECClassLabel"].execute(labels=labels).result[0] for labels in (LABELS, "none"))
    outputs = known["IECKSampler"].execute(
        model=model, seed=SEED, steps=steps, cfg=cfg, sampler_name=sampler, scheduler="ddim_uniform", positive=positive,
        negative=negative, latent_image={"samples": torch.zeros(batch, 3, 32, 32)}, denoise=1.0, keep_latents=True, **inputs,
    )  # fmt: skip
    return outputs.result[1][0]


def error(x, reference):
    """Return ||x - reference|| / ||reference|| of two latents [B, ...], the mean over the batch."""
    return pack.load("iec_core.metrics").relative_error(x, reference).mean().item()


def error_curve(report, reference):
    """Return e_0 ... e_n of a run against its reference, as [n + 1]."""
    return np.array([error(*pair) for pair in zip(report.latents, reference.latents)])


def fell_back(report):
    """Return the share of corrections (items of the batch times corrected steps) that did not converge and fell back."""
    flags = [flag for step in report.steps for flag in step.fell_back]
    return sum(flags) / len(flags) if flags else 0.0


def r_squared(values, fitted):
    """Return the share of the variance of `values` that a fit explains; both are [n]."""
    return 1 - np.square(values - fitted).sum() / np.square(values - values.mean()).sum()


def fit_linear(i, e):
    """Return ((a, b), R^2) of the least-squares fit e = a + b i; i, e: [n]."""
    b, a = np.polyfit(i, e, 1)
    return (a, b), r_squared(e, a + b * i)


def refine(law, i, e, start):
    """Return ((a, b), R^2) of the least-squares fit of law(i, a, b) to e, from a starting point found on a log scale; i, e:
    [n].
    """
    with np.errstate(over="ignore"):
        (a, b), _ = curve_fit(law, i, e, p0=start, maxfev=10_000)
    return (a, b), r_squared(e, law(i, a, b))


def fit_exponential(i, e):
    """Return ((a, b), R^2) of the least-squares fit e = a exp(b i), on the scale of e, which is positive; i, e: [n]."""
    b, log_a = np.polyfit(i, np.log(e), 1)
    return refine(lambda i, a, b: a * np.exp(b * i), i, e, (np.exp(log_a), b))


def fit_power(i, e):
    """Return ((a, p), R^2) of the least-squares fit e = a i^p, on the scale of e; i, e: [n], positive."""
    p, log_a = np.polyfit(np.log(i), np.log(e), 1)
    return refine(lambda i, a, p: a * i**p, i, e, (np.exp(log_a), p))


def fit(curve, share=1.0):
    """Fit the laws to the first `share` of an error curve [n + 1]; the first point is 0 and left out.

    Returns {"linear": ((a, b), R^2), "exponential": ((a, b), R^2), "power": ((a, p), R^2), "better": linear or exponential,
    whichever has the higher R^2}.
    """
    last = round((len(curve) - 1) * share)
    i, e = np.arange(1, last + 1), np.asarray(curve)[1 : last + 1]
    fits = {"linear": fit_linear(i, e), "exponential": fit_exponential(i, e)}
    return {**fits, "better": max(fits, key=lambda name: fits[name][1]), "power": fit_power(i, e)}


def fit_columns(curve):
    """Return the columns of the growth table that describe which law an error curve [n + 1] follows, {column: value}."""
    fits, early = fit(curve), fit(curve, 0.9)
    return {
        "R2 linear": fits["linear"][1],
        "R2 exponential": fits["exponential"][1],
        "better": fits["better"],
        "R2 power": fits["power"][1],
        "power": fits["power"][0][1],
        "R2 linear, to 90 %": early["linear"][1],
        "R2 exponential, to 90 %": early["exponential"][1],
        "better, to 90 %": early["better"],
    }


def growth_row(case, curve, report, reference, uncorrected):
    """Return a row of the growth table, {column: value}. reference, uncorrected: the undisturbed runs with the variant and
    without correction.
    """
    n = len(curve) - 1
    return {
        **dict(zip(("sampler", "cfg", "disturbance", "size", "variant"), case)),
        "nfe": report.nfe,
        **{f"e_{i}": curve[i] for i in (n // 10, n // 2, n * 9 // 10, n)},
        f"e_{n}/e_{n // 2}": curve[n] / curve[n // 2],
        **fit_columns(curve),
        "bias": error(reference.latents[-1], uncorrected.latents[-1]),
        "total error": error(report.latents[-1], uncorrected.latents[-1]),
        "fell back": fell_back(report),
    }


def impulse_row(case, at, curve):
    """Return a row of the impulse table, {column: value}: the error right after the disturbed step, and at the end."""
    after, final = curve[at + 1], curve[-1]
    names = ("sampler", "disturbance", "variant", "step")
    return {**dict(zip(names, (*case, at))), "after": after, "final": final, "final/after": final / after}


def growth(run, reference):
    """Measure every growth case; yield (row of the table, its curve [n + 1]). run, reference: as in `measure`."""
    for *setting, variants in GROWTH:
        sampler, cfg, kind, size = setting
        for variant in variants:
            undisturbed, _ = reference(sampler, cfg, variant)
            report = run(lambda model: disturbed(model, size, kind), sampler, cfg, variant)  # noqa: B023
            curve = error_curve(report, undisturbed)
            yield growth_row((*setting, variant), curve, report, undisturbed, reference(sampler, cfg, "none")[0]), curve


def impulses(run, reference, steps):
    """Measure every disturbance of a single step; yield (row of the table, its curve [n + 1])."""
    for sampler, kind, variants in IMPULSES:
        for variant in variants:
            undisturbed, record = reference(sampler, 1.0, variant)
            for at in (round(share * steps) for share in IMPULSE_AT):
                report = run(lambda model: disturbed_once(model, IMPULSE_SIZE, kind, at, record), sampler, 1.0, variant)  # noqa: B023
                curve = error_curve(report, undisturbed)
                yield impulse_row((sampler, kind, variant), at, curve), curve


def measure(steps, batch):
    """Return (growth, impulses), two lists of (row of the table, its curve [n + 1])."""
    known = comfyui.load_nodes(cpu=True)
    model = known["IECLoadBuiltinModel"].execute(precision="float32").result[0]

    def run(change, *case):
        return sample(known, change(model), *case, steps, batch)

    @functools.cache
    def reference(*case):
        record = {}
        return run(lambda model: recording(model, record), *case), record

    with torch.inference_mode():
        return shown(growth(run, reference)), shown(impulses(run, reference, steps))


def shown(results):
    """Return the list of (row, curve), printing each row when it is known."""
    taken = []
    for row, curve in results:
        if not taken:
            print("  ".join(row), flush=True)
        print("  ".join(text(value) for value in row.values()), flush=True)
        taken.append((row, curve))
    return taken


def text(value):
    """Return a table's value as text, a float with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_table(path, rows):
    """Write rows, {column: value}, as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([text(value) for value in row.values()] for row in rows)


def write_curves(path, results):
    """Write curves as CSV: the settings, from the first columns of its table, then e_0 ... e_n."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for row, curve in results:
            name = [text(value) for value in list(row.values())[: list(row).index("variant") + 1]]
            name += [f"step {row['step']} alone"] if "step" in row else []
            writer.writerow([" ".join(name), *(f"{value:.6g}" for value in curve)])


def variant_lines(results, kind):
    """Return the lines for `draw` of the variants of ddim with this kind of disturbance."""
    case = ("ddim", 1.0, kind, 0.01)
    chosen = [(row["variant"], curve) for row, curve in results if tuple(row.values())[:4] == case]
    widths = {"none": 3.2}  # wide, because the other curves can coincide with it
    return [
        ({"label": f"IEC {name}", "color": COLOURS[name], "linewidth": widths.get(name, 1.5)}, curve) for name, curve in chosen
    ]


def sampler_lines(results):
    """Return the lines for `draw` of the samplers with independent disturbances, with and without IEC."""
    return [
        ({"label": f"{sampler}, IEC {row['variant']}", "linestyle": STYLES[row["variant"]], **style}, curve)
        for sampler, style in SAMPLER_LINES.items()
        for row, curve in results
        if tuple(row.values())[:4] == (sampler, 1.0, "independent", 0.01) and row["variant"] in FEW
    ]


def impulse_lines(results, kind):
    """Return the lines for `draw` of ddim's disturbances in one step only."""
    chosen = [(row, curve) for row, curve in results if tuple(row.values())[:2] == ("ddim", kind) and row["variant"] in FEW]
    colours = dict(zip(dict.fromkeys(row["step"] for row, _ in chosen), STEP_COLOURS))
    lines = []
    for row, curve in chosen:
        style = {"color": colours[row["step"]], "linestyle": STYLES[row["variant"]]}
        lines.append(({"label": f"step {row['step']}, IEC {row['variant']}", **style}, curve))
    return lines


def draw_fits(axes, curve, colour):
    """Draw the fits of an error curve [n + 1] as thin lines: the linear one dashed, the exponential one dotted."""
    i = np.arange(1, len(curve))
    fits = fit(curve)
    (a, b), (c, d) = fits["linear"][0], fits["exponential"][0]
    line = a + b * i
    axes.plot(i, np.where(line > 0, line, np.nan), color=colour, linewidth=0.9, linestyle="--")
    axes.plot(i, c * np.exp(d * i), color=colour, linewidth=0.9, linestyle=":")


def draw(axes, title, scale, lines, with_fits=False):
    """Draw error curves with this scale of y. lines: list of (keywords of Axes.plot, curve [n + 1]). with_fits: also draw the
    fits of IEC none and all.
    """
    for style, curve in lines:
        axes.plot(np.where(curve > 0, curve, np.nan), **{"linewidth": 1.8, **style})
        if with_fits and style["label"] in ("IEC none", "IEC all"):
            draw_fits(axes, curve, style["color"])
    if with_fits:
        axes.plot([], [], color="gray", linewidth=0.9, linestyle="--", label="linear fit")
        axes.plot([], [], color="gray", linewidth=0.9, linestyle=":", label="exponential fit")
    axes.set_yscale(scale)
    points = np.concatenate([curve[curve > 0] for _, curve in lines])
    axes.set_ylim(*((points.min() / 1.5, points.max() * 1.5) if scale == "log" else (0, points.max() * 1.1)))
    axes.set_title(f"{title} ({scale} scale)", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("relative error of the latent")
    axes.grid(True, alpha=0.3)


def plot(results, impulse_results):
    """Return the picture of the curves, uint8 [H, W, 3]. Growth has a log scale on the left and a linear one on the right."""
    rows = [
        ("ddim, white noise, fresh at every evaluation", variant_lines(results, "independent"), True),
        ("ddim, white noise, the same at every evaluation", variant_lines(results, "constant"), True),
        ("ddim, smooth noise, fresh at every evaluation", variant_lines(results, "smooth"), True),
        ("white noise, fresh at every evaluation", sampler_lines(results), False),
    ]
    figure = Figure(figsize=(12, 4 * (len(rows) + 1)), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    *pairs, last = figure.subplots(len(rows) + 1, 2)
    for (left, right), (title, lines, with_fits) in zip(pairs, rows):
        draw(left, title, "log", lines, with_fits)
        draw(right, title, "linear", lines, with_fits)
        right.legend(fontsize=9, loc="upper left")
    for axes, noise, kind in zip(last, ("white", "smooth"), ("constant", "smooth constant")):
        draw(axes, f"ddim, {noise} noise in one step alone", "log", impulse_lines(impulse_results, kind))
        axes.legend(fontsize=8, loc="upper left", ncols=2)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=comfyui.ROOT / "output" / "error_growth")
    parser.add_argument("--steps", type=int, default=100, help="steps of every run")
    parser.add_argument("--batch", type=int, default=8, help="images of every run, each of another class")
    arguments = parser.parse_args()
    growth_results, impulse_results = measure(arguments.steps, arguments.batch)
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / "table.csv", [row for row, _ in growth_results])
    write_table(output / "impulse.csv", [row for row, _ in impulse_results])
    write_curves(output / "curves.csv", growth_results + impulse_results)
    picture = Image.fromarray(plot(growth_results, impulse_results))
    picture.quantize(256).save(output / "error_growth.png", optimize=True)
    print(f"\nWritten to {output}: table.csv, impulse.csv, curves.csv, error_growth.png")


if __name__ == "__main__":
    main()
