"""What the calibrating nodes share: the inputs of their sampling runs, and the choice of a profile."""

import comfy.samplers
from comfy_api.latest import io

from ..iec_core.choices import unknown_choice
from .host.profiles import PROFILES
from .host.sampling.calibration_runs import Runs

PROMPTS = ("positive", "positive_2", "positive_3", "positive_4")
SAMPLING = ("steps", "cfg", "sampler_name", "scheduler")


def run_inputs(of_schedule):
    """Return the inputs of the runs; of_schedule: what the tooltips of steps and scheduler add."""
    prompts = [
        io.Conditioning.Input(name, optional=name != "positive", tooltip="A prompt for the runs; more are better.")
        for name in PROMPTS
    ]
    samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
    seed_tip = "The seed of the first run's noise; each further run has the next one."
    return [
        *prompts,
        io.Conditioning.Input("negative", tooltip="The negative prompt of the runs."),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size that you sample at."),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip=seed_tip),
        io.Int.Input("runs", default=2, min=1, max=64, tooltip="How many runs a prompt, each with noise of its own."),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=f"Steps of a run.{of_schedule}"),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale of the runs."),
        io.Combo.Input("sampler_name", options=samplers, tooltip="The sampler of the runs; as you sample."),
        io.Combo.Input("scheduler", options=schedulers, tooltip=f"The scheduler of the runs; as you sample.{of_schedule}"),
    ]


def wrong_run_choice(sampler_name, scheduler):
    """Return the sentence for a sampler or scheduler that does not exist, else None."""
    wrong = unknown_choice(comfy.samplers.KSampler.SAMPLERS, sampler_name=sampler_name)
    return wrong or unknown_choice(comfy.samplers.KSampler.SCHEDULERS, scheduler=scheduler)


def taken_runs(inputs):
    """Return the Runs that a node's inputs say, and take these out of them."""
    prompts = [prompt for name in PROMPTS if (prompt := inputs.pop(name, None)) is not None]
    others = [inputs.pop(name) for name in ("negative", "latent_image", "seed", "runs")]
    return Runs(prompts, *others, {name: inputs.pop(name) for name in SAMPLING})


def profile_name_input():
    """Return the input of a profile's file, by name."""
    tip = "A file of models/iec_profiles. One that was just saved is listed after a refresh of the page (R)."
    return io.Combo.Input("profile_name", options=PROFILES.names(), tooltip=tip)
