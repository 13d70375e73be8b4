"""IECContractionProbe: measure by how much steps amplify errors, and which damping makes their correction converge."""

import comfy.samplers
from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ..host.correction.contraction import probe_contraction
from ..host.inputs import CheckedNode, known_values
from ..host.schema import schema
from ..reports import plots
from ..types import as_image, shown_on


class IECContractionProbe(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECContractionProbe",
            display_name="Contraction Probe (IEC)",
            category="sampling/IEC",
            description="Measures along a sampling run by how much each step amplifies errors, and how its correction "
            "contracts for dampings 0.1 to 0.9: spectral norms of the network's Jacobian, and the best damping of each step.",
            search_aliases=["jacobian", "spectral norm", "lipschitz", "convergence", "lambda schedule", "contraction"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that is measured, quantized or not; without a cache."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the run's noise and of the random directions.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of Euler (DDIM) steps, as you sample."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale, as you sample."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise level falls over the steps, as you sample. ddim_uniform is the paper's.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should have."),
                io.Conditioning.Input("negative", tooltip="What the image should not have."),
                io.Latent.Input(
                    "latent_image", tooltip="The latent image to denoise. Norms are measured for each image of a batch."
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Share of the denoising that is done."
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=10000,
                    tooltip="Measure every n-th step, from the first; the steps between get the suggestion before them.",
                ),
                io.Int.Input(
                    "iterations",
                    default=24,
                    min=2,
                    max=200,
                    tooltip="At most so many products with the Jacobian and its transpose, twice for each measured step. "
                    "Increase it if norms do not converge.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.02,
                    min=1e-4,
                    max=0.5,
                    step=0.001,
                    round=False,
                    tooltip="Relative error at which a norm counts as converged.",
                ),
                io.Float.Input(
                    "perturbation",
                    default=0.01,
                    min=1e-5,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Size of the changes by which the true map, roundings and all, is seen: a share of the latent's "
                    "norm.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The norms of every measured step, and the suggested lambdas."),
                io.String.Output(
                    display_name="lambdas", tooltip="For every step the lambda of least norm; for lambdas of an IEC sampler."
                ),
                io.String.Output(display_name="json", tooltip="All numbers as JSON text, an entry for each measured step."),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(cls, scheduler=None):
        return unknown_choice(comfy.samplers.KSampler.SCHEDULERS, scheduler=scheduler) or True

    @classmethod
    def run(
        cls, model, seed, steps, cfg, scheduler, positive, negative, latent_image, denoise=1.0, every=1, iterations=24,
        tolerance=0.02, perturbation=0.01,
    ):  # fmt: skip
        sampling = {"steps": steps, "cfg": cfg, "scheduler": scheduler, "denoise": denoise}
        report = probe_contraction(
            model, positive, negative, latent_image, seed, sampling, every, iterations, tolerance, perturbation
        )
        plot = as_image(plots.contraction(report))
        text = report.lambdas_text()
        return io.NodeOutput(plot, text, report.to_json(), ui=shown_on(cls, plot, text))


NODES = [IECContractionProbe]
