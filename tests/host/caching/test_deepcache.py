"""IECDeepCache compared with the host's uncached run and with DeepCache restated over the host's blocks."""

import itertools
import types

import pytest
import torch
from pack import pack_module
from reference import carried_forward

STEPS = 8


@pytest.fixture
def cached(host, model):
    return lambda interval, branch=0, source=None, **settings: host.run(
        "IECDeepCache", model=source or model, interval=interval, branch=branch, **{"schedule": "uniform", **settings}
    )[0]


@pytest.mark.parametrize("corrected", ["none", "all"])
def test_interval_one_is_bit_identical_to_no_cache(sample, model, cached, corrected):
    plain = sample(model, steps=4, correction_steps=corrected)
    for branch in (0, 3, 7):
        assert torch.equal(sample(cached(1, branch), steps=4, correction_steps=corrected), plain)


@pytest.fixture(scope="module")
def plain_runs():
    """Return {cfg: the latents of the uncached run}, filled by the tests."""
    return {}


def shallow_and_deep(unet, x, timesteps, y, branch, deep):
    """Run the U-Net's forward pass as in its definition; `deep`, if given, replaces everything that the branch does not run.

    Returns (output, the feature that enters the first output block of the branch).
    """
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

    emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels).to(x.dtype)) + unet.label_emb(y)
    h, skips, last = x, [], branch + 1 if deep is not None else len(unet.input_blocks)
    for block in unet.input_blocks[:last]:
        h = forward_timestep_embed(block, h, emb, y[:, None], {})
        skips.append(h)
    if deep is None:
        h = forward_timestep_embed(unet.middle_block, h, emb, y[:, None], {})
    first = len(unet.output_blocks) - 1 - branch
    for number, block in enumerate(unet.output_blocks):
        if number == first:
            h = deep = h if deep is None else deep
        if number >= first or len(skips) > branch + 1:
            h = torch.cat([h, skips.pop()], dim=1)
            shape = skips[-1].shape if skips else None
            h = forward_timestep_embed(block, h, emb, y[:, None], {}, shape)
    return unet.out(h), deep


@pytest.mark.parametrize(
    ("interval", "branch", "cfg", "settings", "full"),
    [
        (2, 0, 2.0, {}, {0, 2, 4, 6}),
        (3, 2, 2.0, {}, {0, 3, 6}),
        (5, 0, 1.0, {"forecast": "hold"}, {0, 5}),
        (2, 2, 2.0, {"forecast": "hold"}, {0, 2, 4, 6}),
        (3, 7, 2.0, {}, {0, 3, 6}),
        (4, 4, 2.0, {}, {0, 4}),
        (2, 0, 2.0, {"forecast": "linear"}, {0, 2, 4, 6}),
        (3, 1, 2.0, {"forecast": "quadratic", "schedule": "steps:1,3,4,7"}, {0, 1, 3, 4, 7}),
        (3, 0, 1.0, {"schedule": "steps:2,5"}, {0, 2, 5}),
        (3, 0, 2.0, {"schedule": "power:2,1.6"}, {0, 1, 3}),
        (
            4,
            0,
            2.0,
            {"start_percent": 0.4, "end_percent": 0.8},
            {0, 1, 2, 4, 6, 7},
        ),  # timesteps 876, 751 ... 1, of which those from 599 down to above 200 are cached
    ],
)
def test_equals_deepcache_restated(
    host, sample, model, cached, plain_runs, conditioning, relative, interval, branch, cfg, settings, full
):  # fmt: skip
    result = sample(cached(interval, branch, **settings), steps=STEPS, cfg=cfg)
    degree = {"hold": 0, "linear": 1, "quadratic": 2}.get(settings.get("forecast"))  # the default tries the straight line

    unet, sampling = model.model.diffusion_model, model.get_model_object("model_sampling")
    labels = [entry[0][1]["pooled_output"] for entry in conditioning]
    y = torch.cat([labels[0], labels[1].expand(2, -1)])
    sigmas = host.run("BasicScheduler", model=model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)[0]
    x = torch.randn(2, 3, 16, 16, generator=torch.manual_seed(7)) * sigmas[0]
    features = []
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x2 = torch.cat([x, x]) / (sigma**2 + 1).sqrt()
        timestep = sampling.timestep(sigma).expand(4).float()
        reuse = None if step in full else carried_forward(features, step, degree)
        v, feature = shallow_and_deep(unet, x2, timestep, y, branch, reuse)
        features += [(step, feature)] if step in full else []
        denoised = torch.cat([x, x]) / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt()
        guided = denoised[2:] + cfg * (denoised[:2] - denoised[2:])
        x = x + (sigma_next - sigma) * (x - guided) / sigma
    assert relative(result, x) < 1e-4
    if cfg not in plain_runs:
        plain_runs[cfg] = sample(model, steps=STEPS, cfg=cfg)
    assert relative(result, plain_runs[cfg]) > 1e-3


@pytest.mark.fast
def test_cached_steps_run_the_shallow_blocks_only(host, sample, model, cached):
    calls = []
    unet = model.model.diffusion_model
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in (("input 0", unet.input_blocks[0][0]), ("input 1", unet.input_blocks[1][0]),
                             ("middle", unet.middle_block[0]), ("output 6", unet.output_blocks[6][0]),
                             ("output 7", unet.output_blocks[7][0]))
    ]  # fmt: skip
    try:
        sample(cached(3), correction_steps="steps:3,4")  # a full and a cached step, each evaluated twice
    finally:
        for hook in hooks:
            hook.remove()
    assert {name: calls.count(name) for name in sorted(set(calls))} == {
        "input 0": 10, "output 7": 10, "input 1": 4, "middle": 4, "output 6": 4,
    }  # fmt: skip


@pytest.mark.fast
def test_correction_of_a_full_step_refreshes_the_feature(host, sample, model, cached):
    """The step after a corrected full step reuses the deep feature of the correction, not of the first pass."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def entering(h, hsp, options):
        if options["block"] == ("output", 7):
            seen.append((options.get("iec"), h.clone()))
        return h, hsp

    patched = cached(3)
    patched.set_model_output_block_patch(entering)
    sample(patched, correction_steps="steps:0", steps=3)
    assert [(note["step"], note["iteration"]) for note, _ in seen] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    (_, first), (_, correction), (_, reused), (_, last) = seen
    assert not torch.equal(first, correction)
    assert torch.equal(reused, correction) and torch.equal(last, correction)
    assert WrappersMP.DIFFUSION_MODEL not in model.wrappers


@pytest.mark.parametrize(("correction_pass", "full_passes", "fed_on"), [("refresh", 2, 1), ("keep", 2, 0), ("reuse", 1, 0)])
def test_correction_pass(host, sample, model, correction_pass, full_passes, fed_on):
    """Check how often the deep blocks run for a corrected full step, and which pass's feature the next step reuses."""
    unet, entering, deep = model.model.diffusion_model, [], []

    def note(h, hsp, options):
        if options["block"] == ("output", 7):
            entering.append(h.clone())
        return h, hsp

    cache = {"interval": 3, "branch": 0, "correction_pass": correction_pass}
    patched = host.run("IECDeepCache", model=model, **cache)[0]
    patched.set_model_output_block_patch(note)
    hook = unet.middle_block[0].register_forward_hook(lambda *_: deep.append(1))
    try:
        sample(patched, correction_steps="steps:0", steps=2)
    finally:
        hook.remove()
    first, correction, reused = entering
    assert len(deep) == full_passes
    assert torch.equal(reused, (first, correction)[fed_on])
    assert torch.equal(first, correction) == (correction_pass == "reuse")


def test_guidance_in_two_batches_equals_one_batch(sample, cached, relative, monkeypatch):
    import comfy.model_base

    together = sample(cached(3))
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30)  # forces batches of one
    assert relative(sample(cached(3)), together) < 1e-5


def test_control_reaches_the_blocks_that_are_run(model):
    """The residuals are in the host's form: the last entry of each list belongs to the first block that pops."""
    module = pack_module("nodes.host.caching.unet_cache")
    unet = model.model.diffusion_model
    cache = module.UnetCache(types.SimpleNamespace(branch=1, full_steps=None), None)
    cache.first = len(unet.output_blocks) - 2
    control = {
        "input": [f"in {i}" for i in reversed(range(8))],
        "middle": ["mid"],
        "output": [f"out {i}" for i in reversed(range(8))],
    }
    shallow = cache._shallow_control(control)
    popped_input = [shallow["input"].pop() if shallow["input"] else None for _ in range(8)]
    popped_output = [shallow["output"].pop() if shallow["output"] else None for _ in range(8)]
    assert popped_input == ["in 0", "in 1"] + [None] * 6
    assert popped_output == [None] * 6 + ["out 6", "out 7"]
    assert shallow["middle"] == [] and control["middle"] == ["mid"] and len(control["input"]) == 8


def test_quantized_and_cached(host, sample, model, cached, relative):
    quantized = host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="8", keep_sensitive_layers=True)[0]
    one = sample(cached(3, source=quantized))
    other = sample(
        host.run("IECQuantizeModel", model=cached(3), weight_bits="8", activation_bits="8", keep_sensitive_layers=True)[0]
    )
    assert torch.equal(one, other)
    assert 0 < relative(one, sample(cached(3))) < 0.1


def test_a_schedule_outside_the_run_is_refused(host, sample, model):
    cached = host.run("IECDeepCache", model=model, interval=2, branch=0, schedule="steps:0,8")[0]
    with pytest.raises(ValueError, match=r"^schedule: it names step 8, but the run has 8 steps, numbered from 0 to 7"):
        sample(cached)


def test_a_window_without_steps_is_refused(host):
    node = host.nodes["IECDeepCache"]
    assert node.validate_inputs(start_percent=0.8, end_percent=0.2).startswith(
        "end_percent: 0.2 is not above start_percent, 0.8"
    )
    assert node.validate_inputs(start_percent=0.2, end_percent=0.8) is True


def test_the_cheapest_branch_of_a_unet_is_0(sample, cached):
    assert torch.equal(sample(cached(3, -1), steps=4), sample(cached(3, 0), steps=4))


@pytest.mark.parametrize(
    ("branch", "why"), [(-2, "-2 is outside -1 to 100"), (8, "8 is not possible with this U-Net; choose -1 to 7")]
)
def test_unknown_branch_is_refused(cached, branch, why):
    with pytest.raises(ValueError, match=rf"^branch: {why}"):
        cached(2, branch)


def test_second_cache_is_refused(cached):
    with pytest.raises(ValueError, match=r"^model: this MODEL has a cache already"):
        cached(2, source=cached(2))


def test_a_model_that_is_not_a_unet_is_refused(host, model):
    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"^model: caching needs a U-Net, .* this MODEL is a Linear"):
        host.run("IECDeepCache", model=clone, interval=2, branch=0)


@pytest.mark.fast
def test_an_error_in_the_run_leaves_no_state(host, sample, model, cached):
    expected = sample(model, steps=2)
    quantized = host.run("IECQuantizeModel", model=cached(3), weight_bits="4", activation_bits="8", keep_sensitive_layers=True)[
        0
    ]

    def fail(h, hsp, options):
        if (options["iec"]["step"], options["iec"]["iteration"]) == (3, 1):
            raise RuntimeError("stop here")
        return h, hsp

    quantized.set_model_output_block_patch(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        sample(quantized, correction_steps="all")
    assert torch.equal(sample(model, steps=2), expected)
