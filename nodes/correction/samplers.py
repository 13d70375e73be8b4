"""The corrected samplers: IECKSampler, IECApply, IECSampler."""

import comfy.samplers
import nodes as host_nodes
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ...iec_core.choices import unknown_choice
from ...iec_core.correction.correction_steps import FORMS
from ...iec_core.correction.iteration import EVALUATION_POINTS, LAMBDA_MODES, CorrectionSettings
from ...iec_core.run_report import RunReport
from ..host.correction.sampler import apply_correction, check_sampler, with_correction
from ..host.inputs import CheckedNode, known_values
from ..host.schema import schema
from ..types import Report


def correction_inputs():
    """Return the inputs of the correction, which are the same on every node."""
    return [
        io.String.Input(
            "correction_steps",
            default="auto",
            tooltip=f"Which of the run's steps are corrected, counted from 0: {FORMS}. auto chooses steps and "
            "evaluation_point that were measured to help and cost nothing. full: the steps that a cache evaluates in full, "
            "or every step without a cache. ends:1/10: the first and the last tenth, as in the paper. Each corrected step "
            "costs max_iterations more evaluations, one less at evaluation_point ahead.",
        ),
        io.Float.Input(
            "lambda_",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Damping of the iteration, above 0 and at most 1. The paper uses 0.5 and found 0.1 to 0.7 to converge.",
        ),
        io.Int.Input(
            "max_iterations",
            default=1,
            min=0,
            max=100,
            tooltip="Corrections of a step at most (the paper's K). 0 turns the correction off.",
        ),
        io.Float.Input(
            "tolerance",
            default=1e-5,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="With two or more iterations: an image whose latent changes by less than this share is not iterated on.",
        ),
        io.Combo.Input(
            "evaluation_point",
            options=list(EVALUATION_POINTS),
            default="paper",
            optional=True,
            tooltip="Where a step's result is evaluated again; correction_steps auto chooses its own. paper: at the step's own "
            "timestep. next: at the timestep of the result (Heun's rule at lambda 0.5, one iteration); not for the last "
            "step, which ends at no noise. ahead: as next, but the evaluation also serves as the next step's own, so that one "
            "iteration costs nothing; for euler, ddim, euler_ancestral, ddpm.",
        ),
        io.Combo.Input(
            "lambda_mode",
            options=list(LAMBDA_MODES),
            default="fixed",
            optional=True,
            tooltip="How the damping is chosen. fixed: lambda_, as in the paper. contractive: at most lambda_, reduced so "
            "that the measured iteration converges. anderson: lambda_, accelerated from the second iteration.",
        ),
    ]


def lambdas_input():
    """Return the input for the damping of each step. It must be a node's last input: older workflows then keep their values."""
    return io.String.Input(
        "lambdas",
        default="",
        optional=True,
        tooltip="The damping of each step in place of lambda_: one number per step, above 0 and at most 1, separated by "
        "commas, as Contraction Probe (IEC) returns them. Empty: lambda_ for all steps.",
    )


def later_report():
    """Return the report output of a node whose runs take place after the node itself has run."""
    return Report.Output(display_name="report", tooltip="What the runs did and cost; for IEC Report, which waits for them.")


MOST_RUNS = 100  # the most that a RunLog keeps if no prompt groups the runs, as in a script


class RunLog(list):
    """The RunReports of one prompt's runs, in order, filled while they run. The node that asks for the correction makes it."""

    def __init__(self, settings):
        super().__init__()
        self._settings = settings
        self._prompt = None
        self._begun = 0
        context = get_executing_context()
        self._node = context.node_id if context else ""

    def begin(self):
        """Return the report of a run that begins. Drop the runs of an earlier prompt or, without a prompt, the oldest."""
        context = get_executing_context()
        prompt = context and context.prompt_id
        if prompt != self._prompt:
            self.clear()
            self._begun = 0
        if context is None:
            del self[: 1 - MOST_RUNS]
        self._prompt = prompt
        self._begun += 1
        self.append(RunReport(f"run {self._begun}", self._settings.summary(), source=self._node))
        return self[-1]


def after_input(option):
    """Return the input that makes a node wait for the runs of the report at its input `option`."""
    return io.Latent.Input(
        "after",
        optional=True,
        tooltip=f"With Apply IEC and IEC Sampler: the latent of the last sampler that {option} covers, so that it is read "
        "after the run. KSampler (IEC) needs none.",
    )


def check_is_done(option, report, after):
    """Raise ValueError if the runs of the report at the input `option` have not taken place yet, or were in another prompt.

    after: the value of the input that `after_input` makes.
    """
    if isinstance(report, RunLog) and after is None:
        raise ValueError(
            f"{option}: its runs have not been sampled yet; connect the latent of the last sampler that it covers to 'after', "
            "so that this node waits for it."
        )
    if not report:
        raise ValueError(
            f"{option}: it has no run in this prompt; connect the latent of a sampler that it covers to 'after', and change "
            "that sampler's seed if ComfyUI did not run it again."
        )


def check(total=None, sampler_name=None, **given):
    """Return True, or the error message for a wrong value.

    total: the number of steps, None if it is not known. given: inputs of the correction; None: not known yet.
    """
    try:
        settings = CorrectionSettings.parse(**{name: value for name, value in given.items() if value is not None})
        if total is not None and not settings.is_off:
            settings.steps.of(total)
            settings.check_lambdas(total)
        if sampler_name is not None:
            check_sampler(sampler_name, settings, "sampler_name")
    except ValueError as error:
        return str(error)
    return True


class IECKSampler(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECKSampler",
            display_name="KSampler (IEC)",
            category="sampling/IEC",
            description="The stock KSampler with Iterative Error Correction: evaluates the chosen steps again at their own "
            "result, which damps the error of quantized and cached models.",
            search_aliases=["iec sampler", "iterative error correction", "error correction", "corrected sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising the input latent."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed used for creating the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale. 1 evaluates the positive conditioning alone.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The sampling algorithm. For euler and ddim the correction is the paper's, exactly.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise level falls over the steps. ddim_uniform is the paper's.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should have."),
                io.Conditioning.Input("negative", tooltip="What the image should not have."),
                io.Latent.Input("latent_image", tooltip="The latent image to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the denoising that is done; below 1, the first step that is run has number 0.",
                ),
                *correction_inputs(),
                io.String.Input("label", default="", optional=True, tooltip="The run's name in reports and plots."),
                io.Boolean.Input(
                    "keep_latents",
                    default=False,
                    optional=True,
                    tooltip="Keep the latent of every step in the report, for Compare Runs (IEC).",
                ),
                lambdas_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The denoised latent."),
                Report.Output(display_name="report", tooltip="What the run did and cost; for IEC Report and Compare Runs."),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, steps=None, sampler_name=None, scheduler=None, correction_steps=None, lambda_=None, evaluation_point=None,
        lambda_mode=None, lambdas=None, max_iterations=None,
    ):  # fmt: skip
        known = comfy.samplers.KSampler
        wrong_choice = unknown_choice(known.SAMPLERS, sampler_name=sampler_name)
        wrong_choice = wrong_choice or unknown_choice(known.SCHEDULERS, scheduler=scheduler)
        # Two schedulers may not make `steps` steps: ddim_uniform takes every (timesteps // steps)-th timestep of the model,
        # which can be more; beta takes each timestep at most once, which can be fewer.
        total = None if scheduler in (None, "ddim_uniform", "beta") else steps
        return wrong_choice or check(
            total, sampler_name, correction_steps=correction_steps, lambda_=lambda_, max_iterations=max_iterations,
            evaluation_point=evaluation_point, lambda_mode=lambda_mode, lambdas=lambdas,
        )  # fmt: skip

    @classmethod
    def run(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
        correction_steps, lambda_, max_iterations, tolerance, evaluation_point="paper", lambda_mode="fixed", label="",
        keep_latents=False, lambdas="",
    ):  # fmt: skip
        settings = CorrectionSettings.parse(
            correction_steps, lambda_, max_iterations, tolerance, evaluation_point, lambda_mode, lambdas
        )
        report = RunReport(label or "run", settings.summary(), keep_latents)
        model = apply_correction(model, settings, lambda: report)
        (latent,) = host_nodes.common_ksampler(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        report.result = latent["samples"] if keep_latents else None
        return io.NodeOutput(latent, [report])


class IECApply(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECApply",
            display_name="Apply IEC (model)",
            category="sampling/IEC",
            description="Iterative Error Correction for every sampler node that this MODEL is wired to.",
            search_aliases=["iterative error correction", "error correction", "correct model", "model patch"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose sampling runs are corrected."),
                *correction_inputs(),
                lambdas_input(),
            ],
            outputs=[io.Model.Output(tooltip="A clone of the model that carries the correction."), later_report()],
            not_idempotent=True,  # else the host reuses one node's runs for another node with the same inputs
        )

    @classmethod
    @known_values
    def validate_inputs(cls, correction_steps=None, lambda_=None, evaluation_point=None, lambda_mode=None, lambdas=None):
        return check(
            correction_steps=correction_steps, lambda_=lambda_, evaluation_point=evaluation_point, lambda_mode=lambda_mode,
            lambdas=lambdas,
        )  # fmt: skip

    @classmethod
    def run(cls, model, **settings):
        settings = CorrectionSettings.parse(**settings)
        runs = RunLog(settings)
        return io.NodeOutput(apply_correction(model, settings, runs.begin), runs)


class IECSampler(CheckedNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="IECSampler",
            display_name="IEC Sampler (wrap)",
            category="sampling/IEC",
            description="Iterative Error Correction around a SAMPLER, for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["iterative error correction", "error correction", "wrap sampler", "SamplerCustom"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler whose steps are corrected."),
                *correction_inputs(),
                lambdas_input(),
            ],
            outputs=[io.Sampler.Output(tooltip="The corrected sampler."), later_report()],
            not_idempotent=True,  # else the host reuses one node's runs for another node with the same inputs
        )

    @classmethod
    @known_values
    def validate_inputs(cls, correction_steps=None, lambda_=None, evaluation_point=None, lambda_mode=None, lambdas=None):
        return check(
            correction_steps=correction_steps, lambda_=lambda_, evaluation_point=evaluation_point, lambda_mode=lambda_mode,
            lambdas=lambdas,
        )  # fmt: skip

    @classmethod
    def run(cls, sampler, **settings):
        settings = CorrectionSettings.parse(**settings)
        runs = RunLog(settings)
        return io.NodeOutput(with_correction(sampler, settings, runs.begin), runs)


NODES = [IECKSampler, IECApply, IECSampler]
