"""The corrected samplers with default inputs (`correction_steps` auto): never worse than the stock sampler, and better if
possible.
"""

import contextlib

import pytest
import torch
from pack import pack_module
from test_ahead import KNOWN_ENDS

AUTO = {"correction_steps": "auto", "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5}
NODES = ("IECKSampler", "IECApply", "IECSampler")
CORRECTED = ("euler", "ddim", "euler_ancestral", "ddpm")


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def default_of(host, node, name):
    return next(one.default for one in host.nodes[node].define_schema().inputs if one.id == name)


@pytest.mark.fast
@pytest.mark.parametrize("node", NODES)
def test_is_the_default(host, node):
    assert {name: default_of(host, node, name) for name in AUTO} == AUTO
    assert default_of(host, node, "evaluation_point") == "paper"  # used by the other values of correction_steps


@pytest.mark.fast
@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("point", ["paper", "next"])
def test_euler_is_corrected_ahead_at_no_cost(sample, model, name, point):
    reports = []
    run = {"sampler_name": name, "steps": 12, "scheduler": "karras"}
    auto = sample(model, reports, **run, **{**AUTO, "tolerance": 0.0}, evaluation_point=point)
    assert torch.equal(auto, sample(model, **run, correction_steps="all", evaluation_point="ahead"))
    assert reports[0].nfe == 12 and [step.step for step in reports[0].steps if step.corrected] == list(range(11))
    assert reports[0].correction == "auto" and reports[0].choice.startswith("auto corrects 11 of 12 steps")
    assert reports[0].as_dict()["choice"] == reports[0].choice


def test_further_iterations_are_counted_in_the_sentence(sample, model):
    reports = []
    sample(
        model, reports, sampler_name="euler", steps=12, scheduler="karras", **{**AUTO, "tolerance": 0.0, "max_iterations": 3}
    )
    assert reports[0].nfe == 12 + 2 * 11
    assert reports[0].choice.endswith("own evaluation and at most 2 more.")


def of_one_formula(model):
    """Return a clone of the MODEL whose denoised prediction is a formula, for tests that do not depend on the network."""
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply_model, given: (given["input"] + 0.2).sin() / 2)
    return model


@pytest.mark.filterwarnings("ignore:Should have t")
def test_every_other_sampler_is_the_stock_sampler(host, sample, model, conditioning):
    """Every value of correction_steps except auto and none refuses some of these: dpm_adaptive, and those with cfg_pp."""
    import comfy.samplers

    names = [name for name in comfy.samplers.KSampler.SAMPLERS if name not in (*CORRECTED, "ar_video")]
    latent, model = {"samples": torch.zeros(1, 3, 8, 8)}, of_one_formula(model)
    for name in names:
        reports = []
        auto = sample(model, reports, sampler_name=name, steps=3, scheduler="karras", cfg=1.0, latent_image=latent, **AUTO)
        stock = host.common_ksampler(model, 7, 3, 1.0, name, "karras", *conditioning, latent, 1.0)[0]["samples"]
        assert torch.equal(auto, stock), name
        assert reports[0].choice.startswith("auto corrects nothing: "), name
        assert not any(step.corrected for step in reports[0].steps), name
    assert "dpm_adaptive" in reports_of(sample, model, "dpm_adaptive")


@pytest.mark.filterwarnings("ignore:Should have t")
def test_which_samplers_it_corrects(host):
    """From 10 steps on, it corrects samplers with Euler's step or the step of the model's own stochastic equation, and no
    others.
    """
    import comfy.samplers

    rehearsal, correction = (pack_module(f"nodes.host.{name}") for name in ("sampling.rehearsal", "correction.correctable"))
    settings, sigmas = (
        pack_module("iec_core.correction.iteration").CorrectionSettings.parse("auto"),
        tuple(3.0 - step / 4 for step in range(13)),
    )
    choices = {}
    for name in set(comfy.samplers.KSampler.SAMPLERS) - {name for name in KNOWN_ENDS if name in CORRECTED}:
        with contextlib.suppress(rehearsal.CannotRehearse):
            choices[name] = correction.resolved(settings, rehearsal.rehearse_by_name(name, sigmas).plan(), None)
    assert len(choices) > 20 and "another way than euler_ancestral" in choices["lcm"][1]
    assert all(chosen.is_off for chosen, _ in choices.values())
    for name in CORRECTED:
        chosen, _ = correction.resolved(settings, rehearsal.rehearse_by_name(name, sigmas).plan(), None)
        assert (chosen.steps.numbers, chosen.evaluation_point) == (tuple(range(11)), "ahead"), name


def reports_of(sample, model, name):
    reports = []
    sample(model, reports, sampler_name=name, steps=3, **AUTO)
    return reports[0].choice


@pytest.mark.parametrize(
    "cache", [{"interval": 3}, {"interval": 3, "forecast": "linear"}, {"interval": 2, "schedule": "steps:2,3"}]
)
def test_after_a_cache_the_step_before_each_full_step_is_corrected(host, sample, model, cache):
    cached = host.run("IECDeepCache", model=model, **{"interval": 3, "branch": 0, **cache})[0]
    reports = []
    run = {"steps": 12, "scheduler": "karras"}
    auto = sample(cached, reports, **run, **{**AUTO, "tolerance": 0.0})
    before = {2, 5, 8} if "schedule" not in cache else {1, 2}
    assert {step.step for step in reports[0].steps if step.corrected} == before
    assert reports[0].nfe == 12 and "cache" in reports[0].choice
    listed = f"steps:{','.join(map(str, before))}"
    assert torch.equal(auto, sample(cached, **run, correction_steps=listed, evaluation_point="ahead"))


def test_the_other_nodes_choose_for_each_run(host, advanced, model, conditioning):
    sampler = host.run("KSamplerSelect", sampler_name="euler")[0]
    patched, runs = host.run("IECApply", model=model, **AUTO)
    wrapped, others = host.run("IECSampler", sampler=sampler, **AUTO)
    guider = host.run("BasicGuider", model=patched, conditioning=conditioning[0])[0]
    plain = host.run("BasicGuider", model=model, conditioning=conditioning[0])[0]
    run = {"steps": 10, "scheduler": "karras"}
    corrected = advanced(guider, "euler", **run)
    assert torch.equal(advanced(plain, wrapped, **run), corrected)
    assert torch.equal(advanced(guider, "dpmpp_2m", steps=4), advanced(plain, "dpmpp_2m", steps=4))
    assert [report.choice.split(":")[0] for report in runs] == [
        "auto corrects 9 of 10 steps, each with the next step's own evaluation, at no extra cost.",
        "auto corrects nothing",
    ]
    assert others[0].choice == runs[0].choice and not torch.equal(corrected, advanced(plain, "euler", **run))


@pytest.fixture(scope="module")
def as_added(host, builtin_model, conditioning):
    """Return as_added(model, scheduler, steps, size), which gives the errors of stock euler and of IECApply with default
    inputs.

    Errors are for images of this size, relative to `exact_steps` steps of heun on the model `exact_of`, by default the
    full-precision one.
    """
    kept = {}

    def run(sampler, steps, model, scheduler, size):
        latent = {"samples": torch.zeros(2, 3, size, size)}
        return host.common_ksampler(model, 5, steps, 2.0, sampler, scheduler, *conditioning, latent, 1.0)[0]["samples"]

    def compare(variant, scheduler, steps, size, exact_of=builtin_model, exact_steps=24):
        key = exact_of, scheduler, exact_steps, size
        if key not in kept:
            kept[key] = run("heun", exact_steps, exact_of, scheduler, size)
        exact = kept[key]
        auto = host.run("IECApply", model=variant, **AUTO)[0]
        results = [run("euler", steps, one, scheduler, size) for one in (variant, auto)]
        return [((result - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean().item() for result in results]

    return compare


@pytest.mark.parametrize("scheduler", ["simple", "karras"])
@pytest.mark.parametrize("variant", ["full precision", "W8A8", "DeepCache 3"])
def test_no_default_hurts(host, as_added, builtin_model, variant, scheduler):
    """The images have another seed than the ones with which the choices were made.

    After a cache, where the improvement is smaller, they have the model's own size.
    """
    model, size = builtin_model, 32 if variant == "DeepCache 3" else 8
    if variant == "W8A8":
        bits = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True}
        model = host.run("IECQuantizeModel", model=model, **bits)[0]
    if variant == "DeepCache 3":
        model = host.run("IECDeepCache", model=model, interval=3, branch=0)[0]
    for steps, most in ((10, 0.9), (20, 0.85)) if size == 32 else ((10, 0.6), (20, 0.5)):
        stock, auto = as_added(model, scheduler, steps, size)
        assert auto <= most * stock, steps


@pytest.mark.parametrize("scheduler", ["normal", "sgm_uniform"])
def test_zero_terminal_snr_is_not_hurt(host, as_added, builtin_model, scheduler):
    """The first step goes from sigma 4518 to about 20; corrected like the others, it would leave 15 times the error.

    The model was not trained for such a schedule; 96 images do not show whether the correction of the other steps helps it.
    """
    patched = host.run("ModelSamplingDiscrete", model=builtin_model, sampling="v_prediction", zsnr=True)[0]
    stock, auto = as_added(patched, scheduler, 12, size=8, exact_of=patched, exact_steps=40)
    assert auto < 1.2 * stock


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_after_the_hosts_own_cache_auto_is_the_stock_sampler(host, sample, stock_sample, model, node):
    """The host's cache decides during the run which evaluations it reuses."""
    settings = {"reuse_threshold": 0.3, "start_percent": 0.1, "end_percent": 0.9, "verbose": False}
    cached = host.run(node, model=model, **settings)[0]
    reports = []
    run = {"steps": 12, "scheduler": "karras"}
    assert torch.equal(sample(cached, reports, **run, **AUTO), stock_sample(cached, **run))
    assert reports[0].choice.startswith(f"auto corrects nothing: {node} is on the MODEL")
