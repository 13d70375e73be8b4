"""Corrected runs of the host's samplers on a GPU. Run with `make test-gpu`."""

import comfyui
import pytest
import torch
from toy import ToyGuider, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde_gpu", "dpmpp_3m_sde", "lcm", "uni_pc", "heun")


@pytest.fixture(scope="module")
def nodes():
    return comfyui.load_nodes(cpu=not torch.cuda.is_available())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_sampler_is_corrected_on_the_device(nodes, name, iterations):
    import comfy.samplers

    class OnDevice(ToyGuider):
        def __call__(self, x, sigma, **kwargs):
            assert x.device == sigma.device and x.is_cuda == torch.cuda.is_available()
            return self.denoised(x, sigma)

    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": iterations, "tolerance": 0.0}
    sampler, reports = nodes["IECSampler"].execute(sampler=comfy.samplers.sampler_object(name), **settings).result
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = run(sampler, OnDevice("EPS"), torch.linspace(9, 0, 9, device=device), dtype=torch.float32)
    assert result.isfinite().all() and result.device.type == device
    assert all(step.corrected and step.seconds > 0 and step.residuals for step in reports[0].steps)
