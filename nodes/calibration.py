"""Inputs that the calibration nodes share: those of their sampling runs, and the choice of a profile file."""

import comfy.samplers
from comfy_api.latest import io

from ..iec_core.choices import unknown_choice
from .host.profiles import PROFILES
from .host.sampling.calibration_runs import Runs

PROMPTS = ("positive", "positive_2", "positive_3", "positive_4")
SAMPLING = ("steps", "cfg", "sampler_name", "scheduler")


def run_inputs(of_schedule):
    """Return the inputs of the calibration runs. of_schedule: a text that the tooltips of steps and scheduler end with."""
    prompts = [
        io.Conditioning.Input(
            name,
            optional=name != "positive",
            tooltip="A prompt for the runs; only the first is required. Use different prompts like those that you sample with.",
        )
        for name in PROMPTS
    ]
    samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
    seed_tip = "The noise of the first run; each further run uses the next seed. Any seed will do."
    return [
        *prompts,
        io.Conditioning.Input("negative", tooltip="The negative prompt of the runs."),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size that you sample at."),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip=seed_tip),
        io.Int.Input(
            "runs",
            default=2,
            min=1,
            max=64,
            tooltip="How often each prompt is run, each time with different noise. Start with 2; more runs take "
            "proportionally longer.",
        ),
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip=f"The number of steps of a run; use what you sample with.{of_schedule}",
        ),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="The guidance scale of the runs; use what you sample with.",
        ),
        io.Combo.Input("sampler_name", options=samplers, tooltip="The sampler of the runs; use what you sample with."),
        io.Combo.Input(
            "scheduler", options=schedulers, tooltip=f"The scheduler of the runs; use what you sample with.{of_schedule}"
        ),
    ]


def wrong_run_choice(sampler_name, scheduler):
    """Return the error message for a sampler or scheduler that does not exist, else None."""
    wrong = unknown_choice(comfy.samplers.KSampler.SAMPLERS, sampler_name=sampler_name)
    return wrong or unknown_choice(comfy.samplers.KSampler.SCHEDULERS, scheduler=scheduler)


def taken_runs(inputs):
    """Return the Runs that a node's inputs describe, and remove these inputs from the dict `inputs`."""
    prompts = [prompt for name in PROMPTS if (prompt := inputs.pop(name, None)) is not None]
    others = [inputs.pop(name) for name in ("negative", "latent_image", "seed", "runs")]
    return Runs(prompts, *others, {name: inputs.pop(name) for name in SAMPLING})


def profile_name_input():
    """Return the input that names a profile file."""
    tip = "A file in models/iec_profiles. Press R to list a file that was just saved."
    return io.Combo.Input("profile_name", options=PROFILES.names(), tooltip=tip)
