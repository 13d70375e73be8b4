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
            tooltip=f"Which steps are corrected, counted from 0: {FORMS}. Start with auto: it chooses steps and an "
            "evaluation_point that were measured to help. full: the steps that a cache evaluates in full, or every step "
            "without a cache. Each corrected step adds max_iterations evaluations, or one less with auto or with "
            "evaluation_point ahead; so auto adds none with max_iterations 1. The paper's own setting is ends:1/10, the first "
            "and the last tenth, with evaluation_point paper.",
        ),
        io.Float.Input(
            "lambda_",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Damping, above 0 and at most 1: the weight of the new prediction in the blend. Start with 0.5, the "
            "paper's value; the paper found that 0.1 to 0.7 converge.",
        ),
        io.Int.Input(
            "max_iterations",
            default=1,
            min=0,
            max=100,
            tooltip="The largest number of corrections per step (the paper's K); 0 turns IEC off. Start with 1: each further "
            "correction costs one more evaluation.",
        ),
        io.Float.Input(
            "tolerance",
            default=1e-5,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="With two or more iterations, the iteration stops for an image whose latent changes by less than this "
            "fraction. Keep the default; with one iteration it has no effect.",
        ),
        io.Combo.Input(
            "evaluation_point",
            options=list(EVALUATION_POINTS),
            default="paper",
            optional=True,
            tooltip="The timestep at which the network evaluates a step's result. With correction_steps auto this value has "
            "no effect: the node chooses it. paper: at the step's own timestep. next: at the timestep that the result belongs "
            "to (Heun's rule with lambda_ 0.5 and one iteration); a last step to zero noise is not corrected. ahead: as next, "
            "and this evaluation is also the next step's own, so that one iteration costs nothing; only for euler, ddim, "
            "euler_ancestral, ddpm and lcm. Start with ahead for the first four. Leave lcm and any other sampler uncorrected, "
            "as auto does.",
        ),
        io.Combo.Input(
            "lambda_mode",
            options=list(LAMBDA_MODES),
            default="fixed",
            optional=True,
            tooltip="How the damping is chosen. fixed: always lambda_, as in the paper. contractive: at most lambda_, set "
            "from the convergence that each iteration shows. anderson: lambda_, with Anderson acceleration from the second "
            "iteration on. Start with fixed; the other two are for two or more iterations.",
        ),
    ]


def lambdas_input():
    """Return the input for the damping of each step. It must be a node's last input: older workflows then keep their values."""
    return io.String.Input(
        "lambdas",
        default="",
        optional=True,
        tooltip="One damping per step, used instead of lambda_: as many numbers as the run has steps, above 0 and at most 1, "
        "separated by commas. Contraction Probe (IEC) outputs such a text. Leave it empty to use lambda_ for all steps.",
    )


def later_report():
    """Return the report output of a node whose runs take place after the node itself has run."""
    return Report.Output(
        display_name="report",
        tooltip="What the runs did and cost, for IEC Report. Connect the last "
        "sampler's latent to 'after' of that node, so that it waits for the runs.",
    )


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
        tooltip=f"With Apply IEC (model) and IEC Sampler (wrap): the latent of the last sampler whose run is in {option}, so "
        "that this node waits for it. KSampler (IEC) does not need it.",
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
            description="The stock KSampler with Iterative Error Correction (IEC): after a chosen step, the network also "
            "evaluates the step's result, and the step is taken again with a blend of both predictions. With its defaults, "
            "the node takes no more evaluations than the stock KSampler.",
            search_aliases=["iec sampler", "iterative error correction", "error correction", "corrected sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample; the node does not change it."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise. Use the same seed for runs that you compare.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Sampling steps. Start with 20: the correction's bias shrinks with the step size.",
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance: use what your model needs; the built-in model needs 3. At 1, only the positive "
                    "conditioning is evaluated.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The sampling algorithm. Start with euler or ddim: auto corrects their steps, and with "
                    "evaluation_point paper their correction is exactly the paper's.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise level falls. Start with karras, or with simple for a flow model; ddim_uniform is "
                    "the paper's.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should have."),
                io.Conditioning.Input("negative", tooltip="What the image should not have."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the denoising is done. Start with 1 from an empty latent. Below 1 the result keeps "
                    "part of the input latent, and only the steps that are run are counted, from 0.",
                ),
                *correction_inputs(),
                io.String.Input(
                    "label",
                    default="",
                    optional=True,
                    tooltip="The run's name in reports and plots. Give one to each run that you compare.",
                ),
                io.Boolean.Input(
                    "keep_latents",
                    default=False,
                    optional=True,
                    tooltip="Keep every step's latent in the report. Switch it on for Compare Runs (IEC).",
                ),
                lambdas_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The denoised latent."),
                Report.Output(
                    display_name="report", tooltip="What the run did and cost, for IEC Report and Compare Runs (IEC)."
                ),
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
        # Two schedulers can make a number of steps other than `steps`: ddim_uniform takes every (timesteps // steps)-th
        # timestep of the model, which can be more; beta takes each timestep at most once, which can be fewer.
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
            description="Gives a MODEL Iterative Error Correction (IEC): any sampler node that the model is connected to then "
            "corrects the chosen steps.",
            search_aliases=["iterative error correction", "error correction", "correct model", "model patch"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose sampling runs are corrected; the node does not change it."),
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
            description="Wraps a SAMPLER in Iterative Error Correction (IEC), for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["iterative error correction", "error correction", "wrap sampler", "SamplerCustom"],
            inputs=[
                io.Sampler.Input(
                    "sampler",
                    tooltip="The sampler whose steps are corrected; the node does not change it. Start with euler or ddim.",
                ),
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
