"""IEC with everything that makes a prediction in a user's graph: guiders, ControlNet, areas, LoRA, hooks, attention patches.

Each graph is run by SamplerCustomAdvanced, without the pack, with IECApply and with IECSampler. With no step corrected, the
runs equal the stock run bit for bit; with all steps corrected, they agree with the correction written out as a sampler
function.
"""

import itertools

import pytest
import torch
from reference import iec_euler

SETTINGS = {"lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def cfg(host, model, positive, negative, cfg=2.0):
    return host.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)[0]


def without_negative(host, model, positive, negative):
    return cfg(host, model, positive, negative, 1.0)


def basic(host, model, positive, negative):
    return host.run("BasicGuider", model=model, conditioning=positive)[0]


def dual(style):
    def make(host, model, positive, negative):
        other = host.run("IECClassLabel", labels="clock, fruit")[0]
        return host.run(
            "DualCFGGuider", model=model, cond1=positive, cond2=other, negative=negative, cfg_conds=1.5,
            cfg_cond2_negative=2.0, style=style,
        )[0]  # fmt: skip

    return make


def perpendicular(host, model, positive, negative):
    unwanted = host.run("IECClassLabel", labels="clock, fruit")[0]
    return host.run(
        "PerpNegGuider", model=model, positive=positive, negative=unwanted, empty_conditioning=negative, cfg=2.0, neg_scale=1.0
    )[0]


def control_net(model):
    """Return a ControlNet of random weights for the network's configuration."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {name: value for name, value in model.model.model_config.unet_config.items() if name != "dtype"}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(weight.shape, generator=generator) / max(1, weight[0].numel()) ** 0.5
        for name, weight in network.state_dict().items()
    }
    network.load_state_dict(weights)
    return comfy.controlnet.ControlNet(network, load_device=model.load_device)


def controlled(host, model, positive, negative):
    """Apply a ControlNet to both conditionings, until half of the denoising is done."""
    image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = host.run(
        "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=control_net(model), image=image,
        strength=0.5, start_percent=0.0, end_percent=0.5,
    )  # fmt: skip
    return cfg(host, model, positive, negative)


def area(host, model, positive, negative):
    """Use another class on the left half: areas are in pixels, and a latent element is eight pixels."""
    other = host.run("IECClassLabel", labels="clock, fruit")[0]
    left = host.run("ConditioningSetArea", conditioning=other, width=64, height=128, x=0, y=0, strength=2.0)[0]
    return cfg(host, model, host.run("ConditioningCombine", conditioning_1=positive, conditioning_2=left)[0], negative)


def timestep_range(host, model, positive, negative):
    """Use another class from the middle of the denoising on."""
    other = host.run("IECClassLabel", labels="clock, fruit")[0]
    first = host.run("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.5)[0]
    then = host.run("ConditioningSetTimestepRange", conditioning=other, start=0.5, end=1.0)[0]
    return cfg(host, model, host.run("ConditioningCombine", conditioning_1=first, conditioning_2=then)[0], negative)


def random_lora(model, name="diffusion_model.middle_block.1.proj_in"):
    generator = torch.Generator().manual_seed(0)
    out, into = model.model.state_dict()[name + ".weight"].shape[:2]
    return {
        name + ".lora_up.weight": torch.randn(out, 8, generator=generator),
        name + ".lora_down.weight": torch.randn(8, into, generator=generator),
    }


def lora(host, model, positive, negative):
    """Apply a LoRA like Load LoRA once it has read its file."""
    import comfy.sd

    return cfg(host, comfy.sd.load_lora_for_models(model, None, random_lora(model), 1.0, 0.0)[0], positive, negative)


def hook(host, model, positive, negative):
    """Apply a LoRA to the positive conditioning only."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(random_lora(model), 1.0, 0.0)
    return cfg(host, model, comfy.hooks.set_hooks_for_conditioning(positive, hooks), negative)


def perturbed_attention(host, model, positive, negative):
    return cfg(host, host.run("PerturbedAttentionGuidance", model=model, scale=1.0)[0], positive, negative)


def rescaled(host, model, positive, negative):
    return cfg(host, host.run("RescaleCFG", model=model, multiplier=0.7)[0], positive, negative)


GUIDERS = {
    "CFG": cfg, "CFG 1": without_negative, "basic": basic, "dual CFG": dual("regular"), "nested dual CFG": dual("nested"),
    "PerpNeg": perpendicular, "ControlNet": controlled, "area": area, "timestep range": timestep_range, "LoRA": lora,
    "hook": hook, "PAG": perturbed_attention, "rescaled CFG": rescaled,
}  # fmt: skip


@pytest.fixture(params=GUIDERS)
def guider(request, host, conditioning):
    """Return guider(model), which gives the host's guider over the graph's conditionings."""
    return lambda model: GUIDERS[request.param](host, model, *conditioning)


@pytest.fixture
def with_iec(host, model, advanced):
    """Return with_iec(guider, correction_steps), which gives [(latents, RunReport)] with IECApply and with IECSampler."""

    def run(guider, correction_steps):
        settings = {"correction_steps": correction_steps, **SETTINGS}
        applied, reports = host.run("IECApply", model=model, **settings)
        sampler, more = host.run("IECSampler", sampler=host.run("KSamplerSelect", sampler_name="euler")[0], **settings)
        latents = [advanced(guider(applied)), advanced(guider(model), sampler)]
        return list(zip(latents, [*reports, *more]))

    return run


def test_it_is_the_stock_run_or_the_correction_written_out(advanced, with_iec, model, guider, relative):
    stock, expected = advanced(guider(model)), advanced(guider(model), iec_euler)
    for latent, report in with_iec(guider, "none"):
        assert torch.equal(latent, stock) and report.nfe == 3
    for latent, report in with_iec(guider, "all"):
        assert relative(latent, expected) < 1e-5 and report.nfe == 6
        assert not any("did not converge" in warning for warning in report.warnings)
    assert relative(stock, expected) > 0.1


def test_graphs_differ_from_each_other(advanced, host, model, conditioning, relative):
    latents = {name: advanced(make(host, model, *conditioning), steps=2) for name, make in GUIDERS.items()}
    equal = [{"CFG 1", "basic"}]
    for one, other in itertools.combinations(latents, 2):
        assert (relative(latents[one], latents[other]) < 5e-3) == ({one, other} in equal), (one, other)


def test_at_cfg_1_only_the_positive_is_evaluated(host, sample, model, conditioning, count_evaluations):
    """Corrections, too, evaluate only the positive; the negative has no effect."""
    counted, sizes = count_evaluations(model)
    alone = sample(counted, steps=3, cfg=1.0, correction_steps="all")
    assert sizes == [2] * 6
    other = host.run("IECClassLabel", labels="clock, fruit")[0]
    assert torch.equal(sample(model, steps=3, cfg=1.0, correction_steps="all", negative=other), alone)
    sizes.clear()
    sample(counted, steps=3, cfg=2.0, correction_steps="all")
    assert sizes == [4] * 6


def test_guidance_in_split_batches(sample, stock_sample, model, count_evaluations, relative, monkeypatch):
    """Positive and negative are evaluated separately, because the memory does not suffice for both at once."""
    import comfy.model_base

    together = sample(model, steps=3, correction_steps="all")
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30)
    counted, sizes = count_evaluations(model)
    assert relative(sample(counted, steps=3, correction_steps="all"), together) < 1e-5
    assert sizes == [2] * 12
    assert torch.equal(sample(model, steps=3), stock_sample(model, steps=3))
