"""What a sampling run will do, told before it runs: which steps are corrected and cached, and what that costs."""

import asyncio
import functools
import json
from dataclasses import replace

import comfy.model_sampling
import comfy.samplers
import torch
from aiohttp import web

from ...iec_core.cachequant import CacheProfile
from ...iec_core.caching import CacheSchedule, parse_cache_schedule
from ...iec_core.correction import CorrectionSettings
from ...iec_core.schedule import parse_correction_steps
from .caching import CacheSettings
from .correction import check_sampler
from .events import running_server
from .profiles import PROFILES
from .rehearsal import CannotRehearse, rehearse

ALL = parse_correction_steps("all")
MOST_STEPS = 500  # that are drawn


class _Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """The noise levels of SD 1.5, which stand for those of a model that is not loaded yet."""


class _NoModel:
    """Stands for a MODEL that is not loaded yet, in the places where the host and its samplers look for the noise levels."""

    def __init__(self):
        self.model_sampling = _Sampling()
        self.inner_model = self.model_patcher = self

    def get_model_object(self, _):
        return self.model_sampling


def _sigmas(model, steps, sampler_name="euler", scheduler="normal", denoise=1.0, start_step=0, last_step=None):
    """Return the sigmas of a run as the host's samplers make them, n + 1 on the CPU."""
    sigmas = comfy.samplers.KSampler(model, steps, "cpu", sampler_name, scheduler, denoise).sigmas
    return sigmas[start_step : None if last_step is None else last_step + 1]


def _full_steps(sampling, sigmas, interval=1, schedule="uniform", start_percent=0.0, end_percent=1.0, profile_name=None):
    """Return the steps that a cache evaluates in full, sorted."""
    if profile_name is not None:
        schedule = CacheSchedule("steps", PROFILES.read("profile_name", profile_name, CacheProfile.load).full_steps)
        return sorted(schedule.full_steps(len(sigmas) - 1, 1))
    start, end = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return sorted(CacheSettings(interval, 0, parse_cache_schedule(schedule), start, end).full_steps(sigmas))


@functools.lru_cache(maxsize=32)
def _rehearsed(sampler_name, sigmas):
    """Return (sigmas of the steps, number of evaluations) of a run over `sigmas` (a tuple) without corrections."""
    sampler, x = comfy.samplers.sampler_object(sampler_name), torch.zeros(1, 1, 1, 1)
    rehearsal = rehearse(sampler.sampler_function, _NoModel(), x, torch.tensor(sigmas), {}, sampler.extra_options, False)
    return rehearsal.sigmas, len(rehearsal.evaluations)


def step_plan(correction, sampling, cache=None):
    """Return what a run will do, for a model with SD 1.5's noise levels; another's may differ in what depends on them.

    correction: inputs of `CorrectionSettings.parse`. sampling: steps, sampler_name, scheduler, denoise, start_step,
    last_step, as the host's samplers have them. cache: interval, schedule, start_percent, end_percent of IECDeepCache, or
    profile_name.

    The answer: steps; corrected, a list of their numbers; correctable, those of the steps that can be; full, those that the
    cache evaluates in full, or None; evaluations without corrections, and nfe with them, an upper bound where iterations can
    converge early. Raises ValueError, with a sentence, for what a run would be refused for.
    """
    settings = CorrectionSettings.parse(**correction)
    if sampling["steps"] > MOST_STEPS:
        raise ValueError(f"steps: more than {MOST_STEPS} are not drawn.")
    check_sampler(sampling["sampler_name"], settings, "sampler_name")
    sigmas = _sigmas(_NoModel(), **sampling)
    if len(sigmas) < 2:
        return {"steps": 0, "corrected": [], "correctable": [], "full": None, "evaluations": 0, "nfe": 0}
    try:
        begins, evaluations = _rehearsed(sampling["sampler_name"], tuple(sigmas.tolist()))
    except CannotRehearse as reason:
        raise ValueError(f"sampler_name: its steps are not known before it runs, because {reason}.") from reason
    corrected = settings.corrected_steps(begins)
    return {
        "steps": len(begins) - 1,
        "corrected": sorted(corrected),
        "correctable": sorted(replace(settings, steps=ALL).corrected_steps(begins)),
        "full": None if cache is None else _full_steps(_Sampling(), begins, **cache),
        "evaluations": evaluations,
        "nfe": evaluations + settings.max_iterations * len(corrected),
    }


def _answer(question):
    """Return the step plan for a client's JSON text, or {"error": sentence}."""
    try:
        return step_plan(**json.loads(question))
    except ValueError as error:
        return {"error": str(error)}
    except (TypeError, KeyError, AttributeError) as error:
        return {"error": f"the question is not one for a step plan ({error})."}


def serve_step_plans():
    """Let the server of this process answer POST /iec/step_plan, for the frontend extension; where there is one."""
    server = running_server()
    if server is None:
        return

    @server.routes.post("/iec/step_plan")
    async def answer(request):
        # A thread of its own: a rehearsal of many steps takes a moment, in which the server has others to answer.
        return web.json_response(await asyncio.to_thread(_answer, await request.text()))
