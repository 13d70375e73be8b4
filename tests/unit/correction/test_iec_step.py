"""The paper's step in five lines: against DDIM of diffusers, and as the reference of the general form."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler

from iec_core import CorrectionSettings, Step, corrected_denoised, iec_step

STEPS = 10


@pytest.fixture(scope="module")
def scheduler():
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    return scheduler


def eps(x, abar):
    """A nonlinear "network" that depends on the timestep, with slopes at which no correction falls back."""
    return 0.4 * torch.sin(x) * (1 - abar) + 0.1 * x.flip(-1)


def pairs(scheduler):
    """Return (timestep, abar of the step, abar of the next) of each step of the run."""
    abars = [scheduler.alphas_cumprod[t].item() for t in scheduler.timesteps] + [scheduler.final_alpha_cumprod.item()]
    return [(t, *pair) for t, pair in zip(scheduler.timesteps, itertools.pairwise(abars))]


def factors(abar, abar_next):
    a = math.sqrt(abar_next / abar)
    return a, math.sqrt(1 - abar_next) - a * math.sqrt(1 - abar)


def start():
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_without_iterations_a_step_equals_diffusers_ddim(scheduler):
    x = expected = start()
    for t, abar, abar_next in pairs(scheduler):
        x = iec_step(lambda x: eps(x, abar), x, *factors(abar, abar_next), iterations=0)  # noqa: B023 - called at once
        expected = scheduler.step(eps(expected, abar), t, expected).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)  # its scheduler computes the last alpha in float32


@pytest.mark.parametrize("lambda_", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_the_general_form_is_the_papers_step_in_other_coordinates(scheduler, lambda_, iterations):
    settings = CorrectionSettings.parse("all", lambda_, iterations, tolerance=0)
    expected = start()
    x = expected / math.sqrt(pairs(scheduler)[0][1])  # x = x_vp / sqrt(abar), sigma = sqrt((1 - abar) / abar)
    for _, abar, abar_next in pairs(scheduler)[:-1]:  # the last step ends without noise: sigma 0
        expected = iec_step(lambda x: eps(x, abar), expected, *factors(abar, abar_next), lambda_, iterations)  # noqa: B023

        def denoised(x, sigma, _iteration, abar=abar):
            assert sigma == pytest.approx(math.sqrt((1 - abar) / abar))
            return x - sigma * eps(x * math.sqrt(abar), abar)

        sigma, sigma_next = (math.sqrt((1 - value) / value) for value in (abar, abar_next))
        step = Step.euler(sigma, sigma_next, math.sqrt(abar_next / abar))
        prediction, trace = corrected_denoised(denoised, x, step, settings)
        assert trace.fell_back is None or not trace.fell_back.any()
        x = step.x_factor * x + step.denoised_factor * prediction
    torch.testing.assert_close(x * math.sqrt(abar_next), expected, rtol=1e-10, atol=1e-12)
