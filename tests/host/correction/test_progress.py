"""What a client sees during a corrected run (the host's progress bar and its previews), and how it interrupts a run."""

import itertools

import pytest
import torch


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def bar(monkeypatch):
    """Return a list that gets (value, total, preview) of every update of the host's bar.

    The bar stops an interrupted run, as the bar in the host's main.py does.
    """
    import comfy.model_management
    import comfy.utils

    updates = []

    def hook(value, total, preview, prompt_id=None, node_id=None):
        comfy.model_management.throw_exception_if_processing_interrupted()
        updates.append((value, total, preview))

    for limit in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):  # newer hosts skip some updates
        monkeypatch.setattr(comfy.utils, limit, 0.0, raising=False)
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    yield updates
    comfy.utils.set_progress_bar_global_hook(before)


def check(bar, total):
    """Check that there is one bar, which advances with every evaluation and is full at the end."""
    values = [value for value, *_ in bar]
    assert {known for _, known, _ in bar} == {total}
    assert values == sorted(values) and values[-1] == total
    assert set(values) == set(range(1, total + 1))


STEPS = 3
RUNS = [
    ("euler", {"correction_steps": "none"}, 0),
    ("euler", {"correction_steps": "all", "max_iterations": 2}, 2 * STEPS),
    ("euler", {"correction_steps": "first:1", "max_iterations": 2}, 2),
    ("euler", {"correction_steps": "all", "evaluation_point": "next"}, STEPS - 1),
    ("euler", {"correction_steps": "all", "evaluation_point": "ahead"}, 0),
    ("euler", {"correction_steps": "all", "evaluation_point": "ahead", "max_iterations": 2}, STEPS - 1),
    ("heun", {"correction_steps": "none"}, 0),
    ("heun", {"correction_steps": "all"}, STEPS),
    ("dpmpp_2m", {"correction_steps": "all"}, STEPS),
    ("uni_pc", {"correction_steps": "last:2"}, 2),
]


@pytest.mark.parametrize(("sampler", "settings", "more"), RUNS)
def test_bar_counts_evaluations(sample, stock_sample, model, count_evaluations, bar, sampler, settings, more):
    counted, calls = count_evaluations(model)
    stock_sample(counted, steps=STEPS, sampler_name=sampler)
    stock = len(calls)
    calls.clear()
    bar.clear()
    sample(counted, steps=STEPS, sampler_name=sampler, **settings)
    assert len(calls) == stock + more
    check(bar, stock + more)


@pytest.mark.parametrize("node", ["IECApply", "IECSampler"])
def test_bar_counts_evaluations_under_the_other_nodes(host, advanced, model, conditioning, bar, node):
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    sampler = host.run("KSamplerSelect", sampler_name="heun")[0]
    if node == "IECApply":
        model = host.run("IECApply", model=model, **settings)[0]
    else:
        sampler = host.run("IECSampler", sampler=sampler, **settings)[0]
    advanced(host.run("BasicGuider", model=model, conditioning=conditioning[0])[0], sampler, steps=STEPS)
    check(bar, 2 * STEPS - 1 + STEPS)


def test_bar_is_full_if_iterations_converge_early(sample, model, bar):
    reports = []
    sample(model, reports, steps=STEPS, correction_steps="all", max_iterations=3, tolerance=1.0)
    assert 2 * STEPS <= reports[0].nfe < 4 * STEPS
    values = [value for value, *_ in bar]
    assert {total for _, total, _ in bar} == {4 * STEPS}
    assert values == sorted(values) and values[-1] == 4 * STEPS


def test_bar_of_an_adaptive_sampler_is_the_hosts(sample, stock_sample, model, bar):
    """The number of its evaluations is not known beforehand."""
    stock = stock_sample(model, steps=STEPS, cfg=1.0, sampler_name="dpm_adaptive")
    expected = bar.copy()
    bar.clear()
    assert torch.equal(sample(model, steps=STEPS, cfg=1.0, sampler_name="dpm_adaptive"), stock)
    assert bar == expected != []


@pytest.fixture
def previews(monkeypatch, bar):
    """Return previews(), which gives the images of the bar's updates as bytes, and clears the bar's list."""
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)

    def taken():
        images = [(value, preview[1].tobytes()) for value, _, preview in bar if preview is not None]
        bar.clear()
        return images

    return taken


def test_previews_arrive_at_every_step(sample, stock_sample, model, previews):
    stock_sample(model, steps=STEPS)
    stock = previews()
    assert [step for step, _ in stock] == [1, 2, 3]
    sample(model, steps=STEPS)
    assert previews() == stock
    sample(model, steps=STEPS, correction_steps="first:2", max_iterations=2)
    corrected = previews()
    assert [evaluations for evaluations, _ in corrected] == [3, 6, 7]
    assert all(one != other for (_, one), (_, other) in itertools.pairwise(corrected))


def state(model):
    """Return the state in which a patch on a MODEL or its network would be visible."""

    def copied(value, depth=2):
        return {name: copied(item, depth - 1) for name, item in value.items()} if isinstance(value, dict) and depth else value

    modules = {name: copied(module.__dict__) for name, module in model.model.named_modules()}
    return modules, *map(copied, (model.model_options, model.wrappers, model.patches, model.object_patches))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupt_in_a_correction_stops_the_run_and_leaves_no_state(host, sample, model, bar, moment):
    """The host checks for an interrupt before every layer and at every update of the bar. `after`: after the network's last
    layer.
    """
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing, processing_interrupted
    from comfy.patcher_extension import WrappersMP

    seen = []

    def interrupt(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        told = transformer_options["iec"]
        seen.append((told["step"], told["iteration"]))
        if moment == "after":
            output = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        if seen[-1] == (1, 1):
            interrupt_current_processing()
        if moment == "before":
            output = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        return output

    settings = {"steps": STEPS, "correction_steps": "all", "max_iterations": 2}
    cached = host.run("IECDeepCache", model=model, interval=2, branch=0)[0]
    bits = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True}
    patched = host.run("IECQuantizeModel", model=cached, **bits)[0]
    plain, before = sample(model, **settings), state(model)
    corrected = sample(patched, **settings)
    interrupted = patched.clone()
    interrupted.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "interrupt", interrupt)
    with pytest.raises(InterruptProcessingException):
        sample(interrupted, **settings)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert not processing_interrupted()
    for now, then in zip(state(model), before):
        assert now == then
    assert torch.equal(sample(patched, **settings), corrected)
    assert torch.equal(sample(model, **settings), plain)
