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
            description="Measures two things along a run with Euler (DDIM): how much each step multiplies errors, and how fast "
            "its correction converges with dampings of 0.1 to 0.9. Both are spectral norms computed from the network's "
            "Jacobian. Outputs the damping with the smallest norm for each step.",
            search_aliases=["jacobian", "spectral norm", "lipschitz", "convergence", "lambda schedule", "contraction"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to measure, quantized or not; without a cache and without Apply IEC (model)."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the run's noise, and of the directions that are tried. Use the sampler's seed.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Euler (DDIM) steps. Use what you sample with, so that lambdas has the same number of values.",
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance. Use what you sample with: the node measures the guided prediction.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise level falls. Use what you sample with; ddim_uniform is the paper's.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should have."),
                io.Conditioning.Input("negative", tooltip="What the image should not have."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to denoise. Start with a batch of one or two: each image has its own "
                    "norms, and adds to the time.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the denoising is done. Use what you sample with.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=10000,
                    tooltip="Measure every n-th step, starting with the first; a step in between gets the damping of the last "
                    "measured step before it. Start with 4 for a first look.",
                ),
                io.Int.Input(
                    "iterations",
                    default=24,
                    min=2,
                    max=200,
                    tooltip="The largest number of products with the Jacobian, for each of the two norms of a step. Start with "
                    "24, and use more if the node says that norms are only lower bounds.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.02,
                    min=1e-4,
                    max=0.5,
                    step=0.001,
                    round=False,
                    tooltip="The relative error at which a norm counts as converged. Start with 0.02, which is enough for a "
                    "plot.",
                ),
                io.Float.Input(
                    "perturbation",
                    default=0.01,
                    min=1e-5,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="The size of the perturbations that measure the network itself, with all roundings, as a fraction "
                    "of the latent's norm. Start with the error that you expect in the latent.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The norms of every measured step, and the suggested dampings."),
                io.String.Output(
                    display_name="lambdas",
                    tooltip="The damping with the smallest norm, for every step. Connect it to lambdas of an IEC sampler.",
                ),
                io.String.Output(display_name="json", tooltip="All numbers as JSON text, with one entry per measured step."),
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
