"""What a run reports about the error that its corrections cause by themselves."""

import re

import pytest
import torch
from pack import pack_module

PAPER = {"evaluation_point": "paper", "correction_steps": "all", "scheduler": "karras"}


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def empty_latent():
    """A quarter of the model's own size, which is enough for these tests."""
    return {"samples": torch.zeros(2, 3, 8, 8)}


@pytest.fixture
def report_of(sample, model):
    """Return report_of(model, **settings), which gives the report of eight euler steps on karras, all corrected at `paper`."""

    def run(source=None, **settings):
        found = []
        sample(source or model, found, **{**PAPER, **settings})
        return found[0]

    return run


@pytest.mark.fast
def test_moved_of_one_step_is_the_relative_change_of_its_result(sample, model):
    """For a single corrected step, the share is computed from the latents after the step with and without the correction."""
    runs = []
    for steps in ("none", "steps:3"):
        sample(model, runs, keep_latents=True, **{**PAPER, "correction_steps": steps})
    stock, corrected = runs
    change = (corrected.latents[4] - stock.latents[4]).flatten(1).norm(dim=1) / stock.latents[4].flatten(1).norm(dim=1)
    assert corrected.moved == pytest.approx(change.mean().item(), rel=0.01)
    assert stock.moved == 0 and corrected.as_dict()["moved"] == corrected.moved


@pytest.mark.parametrize(
    ("sampler", "scheduler", "steps"),
    [("euler", "karras", "all"), ("euler", "simple", "ends:1/10"), ("dpmpp_2m", "normal", "ends:1/10")],
)
def test_moved_is_right_within_a_factor_of_two(sample, model, sampler, scheduler, steps):
    about, found = {"sampler_name": sampler, "scheduler": scheduler, "steps": 20}, []
    stock = sample(model, **about)
    moved = sample(model, found, evaluation_point="paper", correction_steps=steps, **about) - stock
    share = (moved.flatten(1).norm(dim=1) / stock.flatten(1).norm(dim=1)).mean().item()
    assert 0.5 < found[0].moved / share < 2


def test_runs_with_a_warning(host, report_of, model):
    quantized = host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="8", keep_sensitive_layers=True)[0]

    def said(source=quantized, **settings):
        return " ".join(report_of(source, **settings).warnings)

    report = report_of(quantized)
    own = " ".join(report.warnings)
    assert re.fullmatch(
        r"run: a correction at evaluation_point paper adds an error of its own; the corrections moved the result by about \d\d%"
        r"(, most of it in step \d)?\. correction_steps auto avoids this\.",
        own,
    )
    assert f"about {report.moved:.0%}" in own
    assert "in step 7, which ends at zero noise" in said(scheduler="simple", correction_steps="steps:6,7")
    assert "multiplies the change that a correction makes" in said(sampler_name="dpmpp_2m", evaluation_point="next")
    for nothing in ({"evaluation_point": "next"}, {"evaluation_point": "ahead"}, {"correction_steps": "steps:7"}):
        assert said(**nothing) == "", nothing
    assert said(steps=10, correction_steps="auto") == said(correction_steps="none") == ""


def test_with_a_wide_cache_there_is_no_warning_of_the_papers_rule(host, report_of, model):
    inputs = {"model": model, "branch": 0, "schedule": "uniform"}
    wide, narrow = (host.run("IECDeepCache", interval=interval, **inputs)[0] for interval in (5, 2))
    assert report_of(wide).warnings == [] and report_of(wide).moved > 0.05
    assert "an error of its own" in report_of(narrow).warnings[0]


def by_function(model):
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))


def by_wrapper(model):
    from comfy.patcher_extension import WrappersMP

    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "another_pack", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )


def by_blocks(model):
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)


@pytest.mark.parametrize("patch", [by_function, by_wrapper, by_blocks])
def test_a_model_evaluated_by_another_pack_is_not_called_exact(report_of, model, patch):
    patched = model.clone()
    patch(patched)
    assert "an error of its own" in report_of(patched).warnings[0]


def test_a_model_with_nothing_to_correct(host, report_of, model):
    futile = "this MODEL is neither quantized nor cached"
    assert futile in report_of().warnings[0]
    assert report_of(evaluation_point="next").warnings == []  # `next` makes up for coarse steps
    assert (
        f"{futile}, and the sampler is already of higher order"
        in report_of(evaluation_point="next", sampler_name="heun").warnings[0]
    )
    easy = host.run("EasyCache", model=model, reuse_threshold=0.0, start_percent=0.0, end_percent=1.0, verbose=False)[0]
    assert futile not in report_of(easy).warnings[0]


def test_layers_with_weights_in_other_dtypes_are_not_exact(host):
    module = pack_module("nodes.host.correction.exactness")
    layer = torch.nn.Linear(2, 2)
    assert module.is_exact(layer, {})
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert not module.is_exact(layer, {})


def test_on_a_flow_model_there_is_no_warning_of_the_papers_rule(host, sample):
    """A flow model's input is not scaled by the noise level; there the rule was measured to lower the error to the exact
    solution.
    """
    (flow,), found = host.run("IECLoadBuiltinModel", precision="float32", architecture="transformer"), []
    sample(flow, found, evaluation_point="paper", correction_steps="all", scheduler="simple", steps=4)
    assert found[0].warnings == [] and found[0].moved > 0.05
