"""An experiment: the separate effects of a correction of a quantized model.

    python tools/separate_effects.py [--output FOLDER] [--steps 10,20,50,100] [--seeds N]

A correction with lambda 1/2 gives the sampler the mean of two evaluations, at the step's latent x and at the next latent. This
has two effects. The errors of two evaluations are averaged; the more they differ, the more the mean lowers them. And the second
evaluation is at another point, which would change the full-precision result too. In one step of the full-precision trajectory
the two effects are the terms of an identity. eps is the full-precision prediction, eps_q = eps + e the quantized model's, and
x_in the point of the second evaluation, at the same timestep (`paper`) or at the next (`next`):

    (eps_q(x) + eps_q(x_in)) / 2 - eps(x) = (e(x) + e(x_in)) / 2  +  (eps(x_in) - eps(x)) / 2
                                                  noise                       shift

Leaves `steps.csv` (these terms in each step, relative to ||eps(x)||), `runs.csv` and `separate_effects.png`. `runs.csv` has
whole runs: the final latent's error relative to full precision of the same steps and to the exact solution, for one evaluation,
two at the same point, and both rules, with rounding to nearest and stochastic rounding. All results are for the built-in U-Net
with DDIM without guidance.
"""

import argparse
import csv
import pathlib

import comfyui
import pack
import torch
from effects import Rounding, evaluated
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = "face, heart, flower, fruit, building, vehicle, clock, flag"
EXACT_SAMPLER, EXACT_STEPS = "heun", 200
BITS = {"full precision": None, "W8A8": ("8", "8"), "W4A8": ("4", "8")}
ONCE, TWICE = {"correction_steps": "none"}, {"correction_steps": "all"}
RULES = {  # name: (IECKSampler's inputs, evaluations of the network at each point)
    "one evaluation": (ONCE, 1),
    "two at the same point": (ONCE, 2),
    "paper": (TWICE, 1),
    "next": ({**TWICE, "evaluation_point": "next"}, 1),
}
COLOURS = {"one evaluation": "#000000", "two at the same point": "#009E73", "paper": "#D55E00", "next": "#0072B2"}


class Experiment:
    """The built-in U-Net in full precision and quantized. known: node classes by id."""

    def __init__(self, known):
        self._known = known
        self.full = known["IECLoadBuiltinModel"].execute(precision="float32").result[0]
        self.models = {name: self._quantized(bits) for name, bits in BITS.items()}

    def _quantized(self, bits):
        if bits is None:
            return self.full
        inputs = {"weight_bits": bits[0], "activation_bits": bits[1], "keep_sensitive_layers": False}
        return self._known["IECQuantizeModel"].execute(model=self.full, **inputs).result[0]

    def report(self, model, steps, seed, sampler="ddim", **settings):
        """Return the RunReport of an IECKSampler run of eight images, with its latents.

        The scheduler begins at the same sigma for any number of steps, so that all runs have one exact solution.
        """
        positive, negative = (self._known["IECClassLabel"].execute(labels=labels).result[0] for labels in (LABELS, "none"))
        inputs = {"lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0, **settings}
        outputs = self._known["IECKSampler"].execute(
            model=model, seed=seed, steps=steps, cfg=1.0, sampler_name=sampler, scheduler="simple", positive=positive,
            negative=negative, latent_image={"samples": torch.zeros(8, 3, 32, 32)}, denoise=1.0, keep_latents=True, **inputs,
        )  # fmt: skip
        return outputs.result[1][0]

    def run(self, bits, rule, steps, seed, stochastic):
        """Return the final latents, [8, 3, 32, 32], of a model of BITS with a rule of RULES."""
        settings, evaluations = RULES[rule]
        model = self.models[bits]
        rounding = Rounding(model, self.full, seed) if stochastic else None
        try:
            return self.report(evaluated(model, evaluations, rounding), steps, seed, **settings).latents[-1]
        finally:
            if rounding:
                rounding.round_weights()

    def eps(self, bits, x, sigma):
        """Return the noise that a model of BITS predicts for x, [8, 3, 32, 32] in the sampler's coordinates, at sigma."""
        base = self.models[bits].model
        label = self._known["IECClassLabel"].execute(labels=LABELS).result[0][0]
        at = torch.full((len(x),), sigma)
        return (x - base.apply_model(x, at, c_crossattn=label[0], y=label[1]["pooled_output"])) / sigma


def second_point(sampling, x, eps, sigma, sigma_next, rule):
    """Return (x_in, its sigma) of a correction's second evaluation; sampling: the host's model_sampling.

    paper: x_in = x' c_in(sigma') / c_in(sigma) at sigma, so that the network gets the paper's input. next: x' at sigma'.
    """
    moved = x + (sigma_next - sigma) * eps
    if rule == "next":
        return moved, sigma_next
    c_in = [sampling.calculate_input(torch.tensor(at), torch.ones(1)).item() for at in (sigma, sigma_next)]
    return moved * (c_in[1] / c_in[0]), sigma


def norm_share(x, reference):
    """Return ||x|| / ||reference|| of two tensors [B, ...], the mean over the batch."""
    return (x.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean().item()


def terms(experiment, bits, rule, x, sigma, sigma_next):
    """Return the terms of one step at x, a dict."""
    sampling = experiment.full.model.model_sampling
    eps = experiment.eps("full precision", x, sigma)
    x_in, at = second_point(sampling, x, eps, sigma, sigma_next, rule)
    moved = experiment.eps("full precision", x_in, at)
    errors = experiment.eps(bits, x, sigma) - eps, experiment.eps(bits, x_in, at) - moved
    noise, shift = sum(errors) / 2, (moved - eps) / 2
    cosine = torch.nn.functional.cosine_similarity(*(error.flatten(1) for error in errors)).mean().item()
    return {
        "single": norm_share(errors[0], eps), "noise": norm_share(noise, eps), "shift": norm_share(shift, eps),
        "total": norm_share(noise + shift, eps), "cosine": cosine,
    }  # fmt: skip


def measure_steps(experiment, all_steps, seed):
    """Return the rows of `steps.csv`: the terms in each step but the last, whose next sigma is 0."""
    rows = []
    for steps in all_steps:
        report = experiment.report(experiment.full, steps, seed, **ONCE)
        for i, step in enumerate(report.steps[:-1]):
            for bits in list(BITS)[1:]:
                for rule in ("paper", "next"):
                    found = terms(experiment, bits, rule, report.latents[i], step.sigma, step.sigma_next)
                    rows.append({"model": bits, "rule": rule, "steps": steps, "step": i, "sigma": step.sigma, **found})
    return rows


def measure_runs(experiment, all_steps, seeds):
    """Return the rows of `runs.csv`."""
    error = pack.load("iec_core.metrics").relative_error
    exact = {seed: experiment.report(experiment.full, EXACT_STEPS, seed, EXACT_SAMPLER, **ONCE).latents[-1] for seed in seeds}
    cases = [(bits, rule, stochastic) for bits in BITS for rule in RULES for stochastic in (False, True)]
    rows = []
    for steps in all_steps:
        same = {seed: experiment.report(experiment.full, steps, seed, **ONCE).latents[-1] for seed in seeds}
        for bits, rule, stochastic in cases:
            if (bits == "full precision" and stochastic) or (rule == "two at the same point" and not stochastic):
                continue  # full precision has no rounding: the second evaluation would equal the first
            finals = {seed: experiment.run(bits, rule, steps, seed, stochastic) for seed in seeds}
            found = {
                name: torch.cat([error(finals[seed], reference[seed]) for seed in seeds])
                for name, reference in (("same_steps", same), ("exact", exact))
            }
            row = {"model": bits, "rounding": "stochastic" if stochastic else "nearest", "rule": rule, "steps": steps}
            for name, errors in found.items():
                row[f"error_{name}"] = errors.mean().item()
                row[f"standard_error_{name}"] = (errors.std() / len(errors) ** 0.5).item()
            rows.append(row)
            print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)
    return rows


def write(path, rows):
    """Write dicts with the same keys as CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def plot(step_rows, run_rows):
    """Return a Figure: on the left the terms over the number of steps, on the right the errors of whole runs."""
    figure = Figure((12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _plot_terms(left, step_rows)
    for axes, name, title in ((middle, "same_steps", "full precision, same steps"), (right, "exact", "exact solution")):
        for rule, colour in COLOURS.items():
            rounding = "stochastic" if rule == "two at the same point" else "nearest"
            _plot_runs(axes, run_rows, rule, rounding, name, color=colour, label=rule)
        axes.set_title(f"W4A8: final error to {title}", fontsize=10)
        axes.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.set(xscale="log", yscale="log", xlabel="steps")
        axes.grid(True, which="both", alpha=0.2)
    return figure


def _plot_terms(axes, rows):
    styles = {"noise": ("W8A8", "paper", "#009E73"), "shift": ("W8A8", "paper", "#D55E00")}
    lines = [(f"{term}, W8A8", term, *rest) for term, rest in styles.items()]
    lines += [("noise, W4A8", "noise", "W4A8", "paper", "#56B4E9"), ("shift, next", "shift", "W8A8", "next", "#0072B2")]
    for label, term, bits, rule, colour in lines:
        points = {}
        for row in rows:
            if (row["model"], row["rule"]) == (bits, rule):
                points.setdefault(row["steps"], []).append(row[term])
        axes.plot(list(points), [sum(values) / len(values) for values in points.values()], "o-", color=colour, label=label)
    axes.set_title("terms of a corrected step, of ||eps||", fontsize=10)
    axes.legend(fontsize=8)


def _plot_runs(axes, rows, rule, rounding, name, **style):
    chosen = [row for row in rows if (row["model"], row["rule"], row["rounding"]) == ("W4A8", rule, rounding)]
    axes.errorbar(
        [row["steps"] for row in chosen], [row[f"error_{name}"] for row in chosen],
        [2 * row[f"standard_error_{name}"] for row in chosen], fmt="o-", **style,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=comfyui.ROOT / "output/separate_effects")
    parser.add_argument("--steps", default="10,20,50,100", help="numbers of steps, separated by commas")
    parser.add_argument("--seeds", type=int, default=4, help="runs of eight images each")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    all_steps = [int(steps) for steps in args.steps.split(",")]
    with torch.inference_mode():
        experiment = Experiment(comfyui.load_nodes(cpu=True))
        step_rows = measure_steps(experiment, all_steps, seed=1)
        write(args.output / "steps.csv", step_rows)
        run_rows = measure_runs(experiment, all_steps, range(1, 1 + args.seeds))
        write(args.output / "runs.csv", run_rows)
    plot(step_rows, run_rows).savefig(args.output / "separate_effects.png", dpi=110)


if __name__ == "__main__":
    main()
