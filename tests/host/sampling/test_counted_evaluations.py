"""A report counts the evaluations that the network ran, and corrections are evaluated by the network.

This also holds after the host's own caches, which answer evaluations instead of the network.
"""

import pytest
import torch

CACHE = {"reuse_threshold": 0.6, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
IEC = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
STEPS = 8


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def seen(model):
    """Return seen(model), which gives a clone and a list of (step, iteration) of each evaluation that reaches the network
    itself.
    """
    from comfy.patcher_extension import WrappersMP

    def watched(model):
        found = []

        def note(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
            told = transformer_options.get("iec", {})
            found.append((told.get("step"), told.get("iteration")))
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "zz_note", note)
        return model, found

    return watched


@pytest.mark.fast
@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("point", ["paper", "next", "ahead"])
def test_corrections_run_the_network_and_nfe_counts_its_runs(host, sample, model, seen, node, point):
    model, calls = seen(host.run(node, model=model, **CACHE)[0])
    reports = []
    sample(model, reports, steps=STEPS, evaluation_point=point, **IEC)
    (report,) = reports
    assert report.nfe == len(calls) == sum(step.nfe for step in report.steps)
    if point == "ahead":  # each evaluation but the first corrects the step before
        assert len(calls) == STEPS
        return
    corrections = [step for step, iteration in calls if iteration == 1]
    assert corrections == list(range(STEPS - (point == "next")))
    assert len(calls) - len(corrections) < STEPS  # the cache does answer some of the steps' own evaluations


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("is_first", [True, False])
def test_either_order_of_apply_iec_and_a_cache(host, stock_sample, model, seen, node, is_first):
    if not is_first:
        model = host.run(node, model=model, **CACHE)[0]
    model, reports = host.run("IECApply", model=model, **IEC)
    if is_first:
        model = host.run(node, model=model, **CACHE)[0]
    model, calls = seen(model)
    stock_sample(model, steps=STEPS)
    assert reports[0].nfe == len(calls) < 2 * STEPS
    assert [step for step, iteration in calls if iteration == 1] == list(range(STEPS))


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_without_a_correction_the_cached_run_is_the_stock_run(host, sample, stock_sample, model, seen, node):
    cached, calls = seen(host.run(node, model=model, **CACHE)[0])
    reports = []
    assert torch.equal(sample(cached, reports, steps=STEPS), stock_sample(cached, steps=STEPS))
    assert 2 * reports[0].nfe == len(calls) and reports[0].nfe < STEPS
