"""What sits around a sampler in a user's graph: masks, start and end steps, hooks, guidance that evaluates more."""

import pytest
import torch


def latent_image():
    image = torch.linspace(-1, 1, 32).expand(2, 3, 32, 32).clone()
    return image


@pytest.mark.parametrize("steps", ["none", "ends:1/10", "all"])
def test_inpainting_keeps_the_outside_as_the_stock_run_does(host, sample, model, conditioning, steps):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    latent = {"samples": latent_image(), "noise_mask": mask}
    ours = sample(model, latent_image=latent, correction_steps=steps, scheduler="simple")
    stock = host.common_ksampler(model, 7, 8, 2.0, "euler", "simple", *conditioning, latent)[0]["samples"]
    outside = (mask == 0).expand(2, 3, 32, 32)
    assert torch.equal(ours[outside], stock[outside])
    assert torch.equal(ours, stock) == (steps == "none")


def test_start_and_end_step_count_from_the_first_step_that_is_run(host, model, conditioning):
    settings = {"lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}

    def run(model):
        return host.run(
            "KSamplerAdvanced", model=model, add_noise="enable", noise_seed=7, steps=8, cfg=2.0, sampler_name="euler",
            scheduler="normal", positive=conditioning[0], negative=conditioning[1],
            latent_image={"samples": latent_image()}, start_at_step=2, end_at_step=6, return_with_leftover_noise="enable",
        )[0]["samples"]  # fmt: skip

    plain = run(model)
    last = run(host.run("IECApply", model=model, correction_steps="steps:3", **settings)[0])
    assert not torch.equal(last, plain)
    assert torch.equal(run(host.run("IECApply", model=model, correction_steps="last:1", **settings)[0]), last)
    assert torch.equal(run(host.run("IECApply", model=model, correction_steps="none", **settings)[0]), plain)
    with pytest.raises(ValueError, match="names step 4, but the run has 4 steps"):
        run(host.run("IECApply", model=model, correction_steps="steps:4", **settings)[0])


def test_weight_hooks_reach_quantized_layers(host, sample, model, conditioning, relative):
    """A LoRA on the positive conditioning alone: the two halves of guidance are evaluated with different weights."""
    import comfy.hooks

    name, generator = "diffusion_model.middle_block.1.proj_in", torch.Generator().manual_seed(0)
    out, into = model.model.state_dict()[name + ".weight"].shape[:2]
    lora = {
        name + ".lora_up.weight": torch.randn(out, 8, generator=generator),
        name + ".lora_down.weight": torch.randn(8, into, generator=generator),
    }
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning[0], hooks)
    bits = {"weight_bits": "8", "activation_bits": "16", "keep_sensitive_layers": True}
    quantized = host.run("IECQuantizeModel", model=model, **bits)[0]
    expected, without = sample(model, positive=hooked), sample(model)
    effect = relative(expected, without)
    assert effect > 0.05
    assert relative(sample(quantized, positive=hooked), expected) < 0.2 * effect
    assert relative(sample(quantized), without) < 0.2 * effect


def test_perturbed_attention_guidance_keeps_its_two_passes_apart(host, sample, model):
    """It evaluates the positive conditioning a second time, with another attention: each pass has a feature of its own."""
    features = {False: [], True: []}

    def note(h, hsp, options):
        if options["block"] == ("output", 0):
            features["attn1" in options.get("patches_replace", {})].append(h.clone())
        return h, hsp

    guided = host.run("PerturbedAttentionGuidance", model=model, scale=3.0)[0]
    cached = host.run("IECDeepCache", model=guided, interval=2, branch=7)[0]
    cached.set_model_output_block_patch(note)
    sample(cached, steps=2, cfg=1.0)
    (plain, plain_cached), (perturbed, perturbed_cached) = features[False], features[True]
    assert torch.equal(plain_cached, plain) and torch.equal(perturbed_cached, perturbed)
    assert not torch.equal(plain, perturbed)


def test_samplers_that_step_with_the_unguided_prediction_are_refused(sample, model):
    sample(model, sampler_name="euler_cfg_pp")
    with pytest.raises(ValueError, match=r"^sampler: euler_cfg_pp steps with the unguided prediction"):
        sample(model, sampler_name="euler_cfg_pp", correction_steps="all")


def test_foreign_conditioning_is_refused_by_the_built_in_model(sample, model):
    with pytest.raises(ValueError, match=r"^conditioning: the built-in model takes that of Class Label"):
        sample(model, positive=[[torch.zeros(1, 77, 768), {}]])
