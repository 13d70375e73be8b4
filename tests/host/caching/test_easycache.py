"""The host's EasyCache as the pack applies it."""

import benchmark
import torch
from pack import pack_module


def test_easycache_keeps_the_latent_of_a_flow_model(host):
    """The expected run has EasyCache's formula: on a skipped step the output is the input plus the last difference.

    Guidance is linear in the outputs, so that the formula holds for the guided output too.
    """
    import comfy.sample
    import comfy.samplers

    builtin, full, steps = benchmark.Builtin(host.nodes, "transformer"), 3, 8
    model = pack_module("nodes.host.easycache").with_easycache(builtin.model, 1e6, 0.0, 1.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps).float()
    noise, latents = torch.randn(8, 3, 32, 32, generator=torch.manual_seed(0)), []
    run = comfy.sample.sample_custom(
        model, noise, 3.0, comfy.samplers.sampler_object("euler"), sigmas, *builtin.conditioning, torch.zeros_like(noise),
        callback=lambda step, denoised, x, total: latents.append((x.clone(), denoised.clone())),
    )  # fmt: skip
    x, denoised = latents[full - 1]
    output = (x - denoised) / sigmas[full - 1]
    difference = output - x
    x = x + (sigmas[full] - sigmas[full - 1]) * output
    for start, end in zip(sigmas[full:], sigmas[full + 1 :]):
        x = x + (end - start) * (x + difference)
    torch.testing.assert_close(run, model.model.process_latent_out(x), rtol=1e-4, atol=1e-4)
