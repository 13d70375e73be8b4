"""Which steps IECDeepCache evaluates in full: by the noise levels of the run, and as many as a speed leaves time for."""

import math
import re

import pytest
import torch
from pack import pack_module
from torch.utils.flop_counter import FlopCounterMode

from iec_core.caching.placement import full_steps_by_noise, reuse_costs

ARCHITECTURES = ("unet", "transformer")
STEPS = 12


@pytest.fixture(scope="module")
def builtin(host):
    """Return {architecture: the built-in MODEL}."""
    load = host.nodes["IECLoadBuiltinModel"].execute
    return {name: load(precision="float32", architecture=name).result[0] for name in ARCHITECTURES}


@pytest.fixture
def run(host, conditioning):
    """Return run(model, seed, **settings), which gives latents [2, 3, 32, 32] of the host's KSampler."""
    latent = {"samples": torch.zeros(2, 3, 32, 32)}

    def sample(model, seed=5, steps=STEPS, sampler="euler", scheduler="simple", cfg=1.0, latent=latent):
        return host.common_ksampler(model, seed, steps, cfg, sampler, scheduler, *conditioning, latent)[0]["samples"]

    return sample


@pytest.fixture
def cached(host):
    return lambda model, interval=2, branch=-1, **settings: host.run(
        "IECDeepCache", model=model, interval=interval, branch=branch, **settings
    )[0]


@pytest.fixture(scope="module")
def cache_run(host):
    return pack_module("nodes.host.caching.cache_run")


def sigmas_of(model, steps=STEPS, scheduler="simple"):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).tolist()


def full_steps(model, evaluate):
    """Return the numbers of the calls of evaluate(model) in which the network's middle ran, and the number of all calls."""
    from comfy.patcher_extension import WrappersMP

    network = model.model.diffusion_model
    middle = network.middle_block[0] if hasattr(network, "middle_block") else network.single_blocks[1]
    calls, deep = [], []

    def count(executor, *args, **kwargs):
        calls.append(True)
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "count", count)
    hook = middle.register_forward_hook(lambda *_: deep.append(len(calls) - 1))
    try:
        evaluate(model)
    finally:
        hook.remove()
    return sorted(set(deep)), len(calls)


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_goes_by_the_noise_levels(builtin, run, cached, architecture, interval):
    model = builtin[architecture]
    noise = sigmas_of(model)
    signal = [1.0] * (STEPS + 1) if architecture == "unet" else [1 - sigma for sigma in noise]
    expected = sorted(full_steps_by_noise(noise, signal, math.ceil(STEPS / interval)))
    one = cached(model, interval)
    assert full_steps(one, run) == (expected, STEPS)
    listed = cached(model, interval, schedule="steps:" + ",".join(map(str, expected)))
    assert torch.equal(run(one), run(listed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_keeps_the_steps_outside_of_start_and_end_in_full(builtin, run, cached, architecture):
    model = builtin[architecture]
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.3), sampling.percent_to_sigma(0.7)
    outside = {step for step, sigma in enumerate(sigmas_of(model)[:-1]) if not start >= sigma > end}
    full, _ = full_steps(cached(model, 2, start_percent=0.3, end_percent=0.7), run)
    assert outside < set(full) and len(full) == len(outside) + math.ceil((STEPS - len(outside)) / 2)


def test_auto_is_nearer_than_even_steps_on_a_flow_model(builtin, run, cached):
    """At as many full steps, over four seeds; measured over 24 images: 0.29 of the error, interval 0.19 to 0.45."""
    model, errors = builtin["transformer"], {"auto": [], "uniform": []}
    for seed in range(4):
        exact = run(model, seed, cfg=3.0)
        for schedule, found in errors.items():
            found.append(run(cached(model, 2, schedule=schedule), seed, cfg=3.0).sub(exact).norm() / exact.norm())
    assert sum(errors["auto"]) < 0.75 * sum(errors["uniform"])


# {kind of the host's model sampling: (settings of its levels, noise and image in a latent at sigma)}
KINDS = {
    "EPS": ("ModelSamplingDiscrete", {}, lambda sigma: (sigma, 1.0)),
    "V_PREDICTION": ("ModelSamplingDiscrete", {}, lambda sigma: (sigma, 1.0)),
    "EDM": ("ModelSamplingContinuousEDM", {"sigma_data": 0.5}, lambda sigma: (sigma, 0.5)),
    "CONST": ("ModelSamplingDiscreteFlow", {}, lambda sigma: (sigma, 1 - sigma)),
    "COSMOS_RFLOW": ("ModelSamplingCosmosRFlow", {}, lambda sigma: (sigma, 1.0)),
    "IMG_TO_IMG_FLOW": ("ModelSamplingDiscreteFlow", {}, lambda sigma: (0.0, 1.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_image_in_a_latent(host, cache_run, kind):
    import comfy.model_sampling

    levels, settings, expected = KINDS[kind]
    if not hasattr(comfy.model_sampling, kind):
        pytest.skip(f"this host has no {kind}")

    class Levels(getattr(comfy.model_sampling, levels), getattr(comfy.model_sampling, kind)):
        pass

    sampling = Levels()
    if settings:
        sampling.set_parameters(0.002, 80.0, **settings)
    sigmas = [0.9, 0.5, 0.25, 0.0]
    noise, signal = cache_run.noise_and_signal(sampling, sigmas)
    pairs = [expected(sigma) for sigma in sigmas]
    ratios = [own / image if image else math.inf for own, image in zip(noise, signal)]
    assert ratios == pytest.approx([own / image for own, image in pairs])
    assert noise == pytest.approx([own for own, _ in pairs]) or kind == "COSMOS_RFLOW"  # which scales the latent too


def test_levels_that_do_not_tell_the_noise_give_even_steps(host, cache_run):
    schedule = pack_module("iec_core.caching.feature_cache").CacheSchedule("auto")
    settings = cache_run.CacheSettings(3, 0, schedule, levels=object())
    assert settings.full_steps([1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0]) == {0, 3}


@pytest.mark.parametrize("kind", ["auto", "uniform"])
def test_a_schedule_without_a_step_is_evaluated_in_full(cache_run, kind):
    schedule = pack_module("iec_core.caching.feature_cache").CacheSchedule(kind)
    assert cache_run.CacheSettings(3, 0, schedule, levels=object()).full_steps([1.0]) == {0}


def operations(evaluate):
    with FlopCounterMode(display=False) as counter:
        evaluate()
    return counter.get_total_flops()


@pytest.mark.parametrize("speed", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_speed_is_that_of_the_operations(builtin, run, cached, architecture, speed):
    """The nearest number of full steps, so that a run has at most half a step's operations more or less than asked for."""
    model = builtin[architecture]
    share = operations(lambda: run(cached(model, 1000, speed=speed))) / operations(lambda: run(model))
    assert share == pytest.approx(1 / speed, abs=0.5 / STEPS + 0.02)


@pytest.mark.parametrize("schedule", ["auto", "uniform", "power:0,1.3"])
def test_speed_replaces_the_interval_in_every_schedule(builtin, run, cached, cache_run, schedule):
    model = builtin["unet"]
    found = [full_steps(cached(model, interval, speed=2.0, schedule=schedule), run)[0] for interval in (2, 7)]
    assert found[0] == found[1] and len(found[0]) in (5, 6)


def test_speed_counts_what_start_and_end_leave_in_full(builtin, run, cached):
    model = builtin["transformer"]
    counts = [
        len(full_steps(cached(model, speed=2.0, start_percent=start, schedule=schedule), run)[0])
        for start in (0.0, 0.2)
        for schedule in ("auto", "uniform")
    ]
    assert len(set(counts)) == 1
    end = model.get_model_object("model_sampling").percent_to_sigma(0.25)
    outside = sum(sigma <= end for sigma in sigmas_of(model)[:-1])
    assert len(full_steps(cached(model, speed=3.0, end_percent=0.25), run)[0]) == outside + 1  # too few steps may be cached


def test_a_speed_that_the_steps_do_not_allow_is_told(builtin, run, cached, caplog):
    """At least one of the 12 steps is in full. What that is in operations is counted."""
    run(cached(builtin["unet"], speed=4.0))
    assert not any("cannot be reached" in record.message for record in caplog.records)
    share = operations(lambda: run(cached(builtin["unet"], speed=9.0))) / operations(lambda: run(builtin["unet"]))
    (line,) = [record.message for record in caplog.records if "cannot be reached" in record.message]
    found = re.search(
        r"speed: 9 cannot be reached in this run of 12 steps, of which 1 have to be .*; expected is (\S+)\.$", line
    )
    assert float(found[1]) == pytest.approx(1 / share, rel=0.15)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("branch", [-1, 0, 1, 2])
def test_cached_share_is_that_of_the_operations(builtin, run, cached, architecture, branch):
    model = builtin[architecture]
    cached_model = pack_module("nodes.host.caching.cached_model")
    kind = cached_model.cache_kind(model)
    one = cached(model, branch=branch, schedule="steps:0")
    full = operations(lambda: run(model, steps=1))
    found = operations(lambda: run(one, steps=2)) - full
    branch = cached_model.branch_of(model, branch)
    assert kind.cached_share(model.model.diffusion_model, branch) == pytest.approx(found / full, abs=0.04)


def test_a_speed_that_no_run_can_have_is_refused(builtin, cached, host, monkeypatch):
    with pytest.raises(
        ValueError, match=r"^speed: 90 is not possible at branch 3 of this network, because a cached step takes 0"
    ):
        cached(builtin["unet"], branch=3, speed=90.0)
    with pytest.raises(ValueError, match=r"; choose less than [\d.]+, or a smaller branch\.$"):
        cached(builtin["unet"], branch=3, speed=90.0)
    with pytest.raises(ValueError, match=r" of a full one; choose less than [\d.]+\.$"):
        cached(builtin["unet"], speed=90.0)
    with monkeypatch.context() as patch:
        kind = pack_module("nodes.host.caching.unet_cache").UnetCache
        patch.setattr(kind, "cached_share", staticmethod(lambda unet, branch: 1.0))
        with pytest.raises(ValueError, match=r" takes 1\.00 of the time of a full one; write 0, to go by interval\.$"):
            cached(builtin["unet"], speed=1.0)
    check = host.nodes["IECDeepCache"].validate_inputs
    assert check(speed=0.5) == "speed: 0.5 would be slower than without the cache; write 1 or more, or 0 to go by interval."
    assert check(speed=0.0) is check(speed=1.0) is check(speed=2.5) is True


def test_an_error_in_the_log_line_leaves_no_features(builtin, run, cached, cache_run, monkeypatch):
    runs, clear = [], cache_run.CacheRun.clear
    monkeypatch.setattr(cache_run.CacheRun, "clear", lambda self: runs.append(self) or clear(self))
    monkeypatch.setattr(cache_run.ExpectedSteps, "__str__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(cached(builtin["unet"]), steps=2)
    assert len(runs) == 1


@pytest.mark.parametrize("schedule", ["auto", "uniform"])
def test_report_and_log_tell_what_is_expected(builtin, cached, conditioning, host, cache_run, caplog, schedule):
    model, reports = cached(builtin["unet"], 3, schedule=schedule), []
    inputs = {"positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(2, 3, 32, 32)}}
    with caplog.at_level("INFO", "comfyui-iec"):
        reports += host.run(
            "IECKSampler", model=model, seed=1, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
            correction_steps="none", lambda_=0.5, max_iterations=1, tolerance=0.0, **inputs,
        )[1]  # fmt: skip
    (report,) = reports
    full = [step.step for step in report.steps if not step.cached]
    assert len(full) == 4 and (full == [0, 3, 6, 9]) == (schedule == "uniform")
    share = pack_module("nodes.host.caching.cached_model").cache_kind(model).cached_share(model.model.diffusion_model, 0)
    assert report.cached_cost == pytest.approx((4 + share * 8) / 12, abs=1e-3)
    line = f"Cache: 4 of 12 steps in full, an expected {report.cached_cost:.2f} of the time without a cache."
    assert [record.message for record in caplog.records if "Cache" in record.message] == [f"[ComfyUI-IEC] {line}"]
    costs = reuse_costs([*report.sigmas], [1.0] * 13, STEPS)
    starts = [max(first for first in full if first <= step) for step in range(STEPS)]
    expected = [costs[start, step - start] for step, start in enumerate(starts)]
    assert [step.reuse_error for step in report.steps] == pytest.approx(expected, rel=2e-2, abs=1e-9)
    assert all((error > 0) != (step in full) for step, error in enumerate(expected))
    told = report.as_dict()
    assert told["cached_cost"] == report.cached_cost and [one["cached"] for one in told["steps"]].count(True) == 8


def test_report_without_a_cache_has_no_cached_steps(builtin, conditioning, host):
    inputs = {"positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(1, 3, 32, 32)}}
    (report,) = host.run(
        "IECKSampler", model=builtin["unet"], seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        correction_steps="none", lambda_=0.5, max_iterations=1, tolerance=0.0, **inputs,
    )[1]  # fmt: skip
    assert report.cached_cost == 1 and not any(step.cached or step.reuse_error for step in report.steps)
