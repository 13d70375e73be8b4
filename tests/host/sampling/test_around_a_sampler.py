"""What surrounds a sampler in a user's graph: masks, start and end steps, hooks, guidance with additional evaluations."""

import pytest
import torch
from reference import iec_euler
from toy import ToyGuider


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def latent_image():
    image = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16).clone()
    return image


@pytest.fixture(params=["hard", "soft", "soft, thresholded"])
def masked(request, host, model):
    """Return (MODEL, LATENT, where the mask is 0) of an in-painting graph.

    DifferentialDiffusion applies a threshold to a soft mask, which falls from step to step.
    """
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    if request.param != "hard":
        mask = torch.nn.functional.avg_pool2d(mask, 5, stride=1, padding=2)
        assert mask.unique().numel() > 10
    if "thresholded" in request.param:
        model = host.run("DifferentialDiffusion", model=model)[0]
    latent = host.run("SetLatentNoiseMask", samples={"samples": latent_image()}, mask=mask)[0]
    return model, latent, (mask == 0).expand(2, 3, 16, 16)


INPAINTED = [
    ("euler", {"correction_steps": "none"}),
    ("euler", {"correction_steps": "ends:1/10"}),
    ("euler", {"correction_steps": "all", "max_iterations": 2}),
    ("euler", {"correction_steps": "all", "evaluation_point": "next"}),
    ("heun", {"correction_steps": "all"}),
    ("dpmpp_2m", {"correction_steps": "all"}),
    ("euler_ancestral", {"correction_steps": "all"}),
]


@pytest.mark.parametrize(("sampler", "settings"), INPAINTED)
def test_inpainting_keeps_the_outside_as_the_stock_run_does(host, sample, conditioning, masked, sampler, settings):
    model, latent, outside = masked
    ours = sample(model, latent_image=latent, sampler_name=sampler, scheduler="simple", steps=4, **settings)
    stock = host.common_ksampler(model, 7, 4, 2.0, sampler, "simple", *conditioning, latent)[0]["samples"]
    assert torch.equal(ours[outside], stock[outside])
    assert torch.equal(ours, stock) == (settings["correction_steps"] == "none")


def test_inpainting_agrees_with_the_correction_written_out(host, sample, advanced, conditioning, masked, relative):
    model, latent, _ = masked
    positive, negative = conditioning
    guider = host.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=2.0)[0]
    expected = advanced(guider, iec_euler, scheduler="simple", steps=4, latent=latent)
    ours = sample(model, latent_image=latent, scheduler="simple", steps=4, correction_steps="all")
    assert relative(ours, expected) < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["EPS", "EDM", "FLOW"])
def test_the_input_of_a_correction_has_one_noise_level(host, model_type):
    """At `paper` the network's input is the step's result, c_in(sigma) x_in = c_in(sigma') x'.

    This also holds outside the in-paint mask, where x' is the image with the run's own noise at sigma'.
    """
    import comfy.samplers

    guider = ToyGuider(model_type, network=torch.sin)
    sampling = guider.inner_model.model_sampling
    guider.inner_model.scale_latent_inpaint = lambda sigma, noise, latent_image, **_: sampling.noise_scaling(
        sigma.reshape(-1, 1, 1, 1), noise, latent_image
    )
    generator = torch.Generator().manual_seed(1)
    noise, image = (torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.3]], dtype=torch.float64).expand(2, 1, 2, 2)
    sigmas = torch.tensor([0.9, 0.6, 0.2, 0.0], dtype=torch.float64)
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 2, "tolerance": 0.0}
    sampler = host.run("IECSampler", sampler=comfy.samplers.sampler_object("euler"), **settings)[0]
    extra = {"model_options": {}, "seed": 1}
    sampler.sample(guider, sigmas, extra, None, noise, image, mask, True)
    assert len(guider.calls) == 9
    for step in range(3):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        kept = 1 - sigma if model_type == "FLOW" else 1, 1 - sigma_next if model_type == "FLOW" else 1
        own, *iterations = (call[0] for call in guider.calls[3 * step : 3 * step + 3])
        torch.testing.assert_close(own[mask == 0], (kept[0] * image + sigma * noise)[mask == 0])
        for x_in in iterations:
            there = guider.input_scale(sigma_next) * (kept[1] * image + sigma_next * noise)
            torch.testing.assert_close(guider.input_scale(sigma) * x_in[mask == 0], there[mask == 0])


def test_denoise_below_one_counts_the_steps_that_run(host, sample, advanced, model, conditioning, relative):
    latent, reports = {"samples": latent_image()}, []

    def run(correction_steps):
        settings = {"latent_image": latent, "denoise": 0.5, "scheduler": "normal"}
        return sample(model, reports, steps=3, correction_steps=correction_steps, **settings)

    guider = host.run("CFGGuider", model=model, positive=conditioning[0], negative=conditioning[1], cfg=2.0)[0]
    settings = {"scheduler": "normal", "denoise": 0.5, "latent": latent}
    assert torch.equal(run("none"), advanced(guider, **settings))
    assert relative(run("all"), advanced(guider, iec_euler, **settings)) < 1e-5
    assert torch.equal(run("last:1"), run("steps:2"))
    assert [report.nfe for report in reports] == [3, 6, 4, 4]
    with pytest.raises(ValueError, match="names step 3, but the run has 3 steps"):
        run("steps:3")


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


@pytest.mark.fast
def test_start_and_end_step_agree_with_the_correction_written_out(host, model, conditioning, relative):
    """The run begins after the schedule's first step, and leaves noise in its latent."""
    import comfy.samplers

    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    latent = {"samples": latent_image()}
    wiring = {"positive": conditioning[0], "negative": conditioning[1], "latent_image": latent, "cfg": 2.0, "noise_seed": 7}
    applied, reports = host.run("IECApply", model=model, **settings)
    ours = host.run(
        "KSamplerAdvanced", model=applied, add_noise="enable", steps=8, sampler_name="euler", scheduler="normal",
        start_at_step=3, end_at_step=6, return_with_leftover_noise="enable", **wiring,
    )[0]["samples"]  # fmt: skip
    sigmas = host.run("BasicScheduler", model=model, scheduler="normal", steps=8, denoise=1.0)[0][3:7]
    sampler = comfy.samplers.KSAMPLER(iec_euler)
    custom = host.run("SamplerCustom", model=model, add_noise=True, sampler=sampler, sigmas=sigmas, **wiring)
    assert relative(ours, custom[0]["samples"]) < 1e-5
    assert (reports[0].sigmas, reports[0].nfe) == (sigmas.tolist(), 6)


@pytest.mark.parametrize("correction_steps", ["none", "ends:1/10", "all"])
def test_run_of_no_steps_is_the_stock_run(host, model, conditioning, correction_steps):
    """The schedule is the part before SplitSigmas' step 0, the node's default: one sigma."""
    settings = {"correction_steps": correction_steps, "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    sigmas = host.run("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0)[0]
    wiring = {
        "model": model, "add_noise": True, "noise_seed": 7, "cfg": 2.0, "positive": conditioning[0],
        "negative": conditioning[1], "sigmas": host.run("SplitSigmas", sigmas=sigmas, step=0)[0],
        "latent_image": {"samples": latent_image()},
    }  # fmt: skip
    sampler = host.run("KSamplerSelect", sampler_name="euler")[0]
    wrapped, reports = host.run("IECSampler", sampler=sampler, **settings)
    ours, stock = (host.run("SamplerCustom", sampler=one, **wiring)[0]["samples"] for one in (wrapped, sampler))
    assert torch.equal(ours, stock)
    assert (reports[0].nfe, reports[0].steps) == (0, [])


@pytest.mark.parametrize(("mode", "tolerance"), [("fixed", 0.035), ("anderson", 0.029)])
def test_items_of_a_batch_are_iterated_independently(host, sample, model, relative, mode, tolerance):
    """The two items reach the tolerance at different iterations."""
    settings = {"steps": 4, "correction_steps": "all", "max_iterations": 3, "tolerance": tolerance, "lambda_mode": mode}
    reports, batch = [], {"samples": torch.zeros(2, 3, 16, 16)}
    together = sample(model, reports, latent_image=batch, **settings)
    for item, label in enumerate(("face", "flag")):
        positive = host.run("IECClassLabel", labels=label)[0]
        latent = host.run("LatentFromBatch", samples=batch, batch_index=item, length=1)[0]
        alone = sample(model, reports, positive=positive, latent_image=latent, **settings)
        assert relative(together[item : item + 1], alone) < 1e-5
    iterations = [[[row[item] > 0 for row in step.lambdas].count(True) for step in reports[0].steps] for item in (0, 1)]
    alone = [[len(step.lambdas) for step in report.steps] for report in reports[1:]]
    assert iterations == alone
    assert (alone[0][0], alone[1][0]) == (3, 2)


def test_weight_hooks_reach_quantized_layers(host, sample, model, conditioning, relative):
    """A LoRA is on the positive conditioning only: the two halves of guidance are evaluated with different weights."""
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


def test_the_two_passes_of_perturbed_attention_have_separate_features(host, sample, model):
    """The guidance evaluates the positive conditioning a second time, with another attention: each pass has its own feature."""
    features = {False: [], True: []}

    def note(h, hsp, options):
        if options["block"] == ("output", 0):
            features["attn1" in options.get("patches_replace", {})].append(h.clone())
        return h, hsp

    guided = host.run("PerturbedAttentionGuidance", model=model, scale=3.0)[0]
    cached = host.run("IECDeepCache", model=guided, interval=2, branch=3)[0]
    cached.set_model_output_block_patch(note)
    sample(cached, steps=2, cfg=1.0)
    (plain, plain_cached), (perturbed, perturbed_cached) = features[False], features[True]
    assert torch.equal(plain_cached, plain) and torch.equal(perturbed_cached, perturbed)
    assert not torch.equal(plain, perturbed)


def test_samplers_that_step_with_the_unguided_prediction_are_refused(sample, model):
    sample(model, sampler_name="euler_cfg_pp")
    with pytest.raises(ValueError, match=r"^sampler_name: euler_cfg_pp uses the unguided prediction"):
        sample(model, sampler_name="euler_cfg_pp", correction_steps="all")


def test_foreign_conditioning_is_refused_by_the_built_in_model(sample, model):
    with pytest.raises(ValueError, match=r"^conditioning: it is not from Class Label"):
        sample(model, positive=[[torch.zeros(1, 77, 768), {}]])
