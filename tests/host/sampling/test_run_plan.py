"""The plan of a run: the table of the host's samplers, what is rehearsed and when, and that each run has its own plan."""

import collections
import dataclasses
import functools
import itertools
import threading
import types

import pytest
import torch
from pack import pack_module
from toy import ToyGuider, run

SETTINGS = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
SIGMAS = [14.6, 8.0, 5.0, 3.0, 1.5, 0.5, 0.0]
STANDING = [14.6, 7.0, 7.0, 1.0, 0.0]
RISING = [14.6, 7.0, 3.0, 1.0, 5.0, 2.0, 0.5, 0.0]
OF_THEIR_OWN = {"dpm_fast", "dpm_adaptive"}  # samplers that choose their own steps


@pytest.fixture
def module(host):
    """Return module(name), which gives one of the pack's modules under nodes/host/sampling."""
    return lambda name: pack_module(f"nodes.host.sampling.{name}")


def known_samplers():
    import comfy.samplers

    return [name for name in comfy.samplers.KSampler.SAMPLERS if name not in OF_THEIR_OWN]


class Recorder(ToyGuider):
    """Record in which evaluation each callback comes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.callbacks = []

    def record(self, sampler, sigmas):
        sigmas = torch.tensor(sigmas)
        run(sampler, self, sigmas, dtype=torch.float32, callback=lambda step, *_: self.callbacks.append(len(self.calls)))
        return self

    def __call__(self, x, sigma, model_options=None, seed=None):
        denoised = super().__call__(x, sigma)
        for function in (model_options or {}).get("sampler_post_cfg_function", []):
            arguments = {"denoised": denoised, "uncond_denoised": denoised, "model_options": model_options}
            denoised = function({**arguments, "cond_denoised": denoised, "input": x, "sigma": sigma, "model": self.inner_model})
        return denoised


SCHEDULES = {
    "EPS": [
        SIGMAS, SIGMAS[:-1], [14.6, 3.0, 0.0], [14.6, 0.0], [14.6, 3.0], STANDING, RISING,
    ],
    "FLOW": [[1.0, 0.9, 0.75, 0.5, 0.2, 0.0], [0.8, 0.5, 0.2], [1.0, 0.0]],
}  # fmt: skip


def test_the_hosts_samplers_evaluate_as_in_the_table(host, module):
    """The table is compared with runs over schedules that end at 0, that do not, that are short, and that rise again."""
    import comfy.samplers

    seen = set()
    for name in known_samplers():
        sampler = comfy.samplers.sampler_object(name)
        for kind, schedules in SCHEDULES.items():
            for sigmas in schedules:
                plan = module("run_plan").RunPlan.of_stock(sampler.sampler_function, sampler.extra_options, sigmas)
                if plan is None:
                    assert sigmas in (RISING, STANDING), name
                    continue
                expected = plan.evaluations
                try:
                    found = Recorder(kind).record(sampler, sigmas)
                except (RecursionError, torch.linalg.LinAlgError):
                    continue  # dpmpp_sde and sa_solver cannot take a step of zero width
                first = [number for number, (step, _) in enumerate(expected) if step not in dict(expected[:number])]
                case = f"{name} on {sigmas}"
                assert (len(found.calls), found.callbacks) == (len(expected), [number + 1 for number in first]), case
                seen.add((name, kind))
    assert len(seen) == 2 * len(known_samplers())


def test_the_table_agrees_with_rehearsals(host, module, monkeypatch):
    """The rehearsals treat each sampler as unknown.

    They also agree on the evaluation with which a step is taken, and on the reason why a step's result is not known from its
    prediction.
    """
    import comfy.samplers

    rehearsal, known = module("rehearsal"), module("stock_samplers").evaluations_of
    compared = 0
    for name, sigmas in itertools.product(known_samplers(), (SIGMAS, SIGMAS[:-1])):
        sampler = comfy.samplers.sampler_object(name)
        line = known(sampler.sampler_function, sampler.extra_options)
        table, shorter = line.of_steps(sigmas), rehearsal.rehearse_by_name.__wrapped__
        try:
            by_table = shorter(name, tuple(sigmas))
            with monkeypatch.context() as patch:
                patch.setattr(rehearsal, "evaluations_of", lambda *_: None)
                at_length = shorter(name, tuple(sigmas))
        except rehearsal.CannotRehearse:
            assert "cfg_pp" in name
            continue
        assert at_length.evaluations == by_table.evaluations == table, name
        assert at_length.why_no_end_is_known() == line.why_no_end_is_known(sigmas), name
        assert at_length.levels == by_table.levels
        for one, other in zip(at_length.steps, by_table.steps):
            assert dataclasses.astuple(one.step) == pytest.approx(dataclasses.astuple(other.step), rel=1e-4, abs=1e-5)
            factors = [[draw.factor for draw in rehearsed.draws] for rehearsed in (one, other)]
            assert factors[0] == pytest.approx(factors[1], rel=1e-4, abs=1e-5)
            assert one.gain == pytest.approx(other.gain, rel=1e-3)
        compared += 1
    assert compared > 50


@pytest.mark.parametrize(
    ("name", "options", "sigmas", "is_known"),
    [
        ("sa_solver", {"use_pece": True}, SIGMAS, False), ("dpm_2_ancestral", {"eta": 2.0}, SIGMAS, False),
        ("euler", {"s_churn": 3.0}, SIGMAS, True), ("euler_ancestral", {"eta": 0.3}, SIGMAS, True),
        ("euler", {"unheard_of": 1}, SIGMAS, False), ("heunpp2", {}, [10.0, 6.0, 3.0, 1.0, 1.0], False),
        ("dpm_2_ancestral", {}, [4500.0, 0.1, 0.0], False), ("dpm_2_ancestral", {}, [45.0, 0.1, 0.0], True),
        ("heun", {}, RISING, False), ("euler", {}, RISING, True),
    ],
)  # fmt: skip
def test_options_that_may_change_the_number_of_evaluations_are_not_in_the_table(host, module, name, options, sigmas, is_known):
    import comfy.samplers

    function = comfy.samplers.sampler_object(name).sampler_function
    assert (module("stock_samplers").evaluations_of(function, options, sigmas) is not None) == is_known


def test_rehearsal_batch_size_is_constant_and_noise_factors_are_exact(host, module, monkeypatch):
    """euler_ancestral: sigma_up = min(s', sqrt(s'^2 (s^2 - s'^2) / s^2)), in each of 60 steps."""
    rehearsal, sizes = module("rehearsal"), []
    play = rehearsal._play

    def playing(*args, **kwargs):
        sizes.append(len(args[7]))
        return play(*args, **kwargs)

    monkeypatch.setattr(rehearsal, "_play", playing)
    found = {}
    for steps in (6, 60):
        sigmas = [*torch.linspace(2.6, -3, steps).exp().tolist(), 0.0]
        found[steps] = sigmas, rehearsal.rehearse_by_name.__wrapped__("euler_ancestral", tuple(sigmas))
    assert len(set(sizes)) == 1
    sigmas, long = found[60]
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas[:-1])):
        (draw,) = long.steps[step].draws
        assert draw.number == step
        expected = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
        assert draw.factor == pytest.approx(expected, rel=1e-4)
    assert long.steps[-1].draws == ()


@pytest.fixture
def plays(module, monkeypatch):
    """Return how often each sampler function was rehearsed: a Counter of function names."""
    rehearsal, counted = module("rehearsal"), collections.Counter()
    play = rehearsal._play

    def counting(function, *args, **kwargs):
        counted[getattr(function, "__name__", "callable")] += 1
        return play(function, *args, **kwargs)

    monkeypatch.setattr(rehearsal, "_play", counting)
    monkeypatch.setattr(rehearsal, "_kept", type(rehearsal._kept)())
    return counted


def corrected(host, sampler, **settings):
    return host.run("IECSampler", sampler=sampler, **{**SETTINGS, **settings})[0]


def test_a_run_is_rehearsed_again_only_if_something_changed(host, plays):
    import comfy.samplers

    guider, plain = ToyGuider("EPS"), comfy.samplers.sampler_object("euler")
    first = run(corrected(host, plain), guider, torch.tensor(SIGMAS))
    assert torch.equal(run(corrected(host, plain), guider, torch.tensor(SIGMAS)), first)  # another SAMPLER, the same function
    assert plays["sample_euler"] == 1
    run(corrected(host, plain), guider, torch.tensor(SIGMAS[1:]))
    assert plays["sample_euler"] == 2
    run(corrected(host, comfy.samplers.ksampler("euler", {"s_churn": 1.0})), guider, torch.tensor(SIGMAS))
    assert plays["sample_euler"] == 3
    run(corrected(host, plain), ToyGuider("FLOW"), torch.linspace(1, 0, 6))
    assert plays["sample_euler"] == 4
    run(corrected(host, plain), guider, torch.tensor(SIGMAS))
    assert plays["sample_euler"] == 4


def test_a_function_that_the_host_makes_for_every_run_is_rehearsed_once(host, plays):
    import comfy.samplers

    for _ in range(2):
        run(
            corrected(host, comfy.samplers.sampler_object("dpm_fast")),
            ToyGuider("EPS"),
            torch.tensor(SIGMAS),
            dtype=torch.float32,
        )
    assert plays["dpm_fast_function"] == 2  # a sampler that is not in the table is rehearsed twice


def test_another_packs_function_is_rehearsed_each_time(host, plays):
    """The function may change through its closure: here its steps do, and the rehearsal must follow."""
    import comfy.samplers

    factors = {}

    def sample_part(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x = factors["x"] * x + 0.3 * denoised
        return x

    guider = ToyGuider("FLOW")
    for factors["x"] in (0.5, 0.7):
        guider.calls.clear()
        run(corrected(host, comfy.samplers.KSAMPLER(sample_part)), guider, torch.linspace(1, 0, 5))
        x, at, _ = guider.calls[0]
        denoised = guider.denoised(x, torch.full((2,), at, dtype=torch.float64))
        torch.testing.assert_close(guider.calls[1][0], factors["x"] * x + 0.3 * denoised, rtol=1e-6, atol=1e-6)
    assert plays["sample_part"] == 4


def test_a_failed_rehearsal_is_not_cached(host, plays, monkeypatch):
    import comfy.k_diffusion.sampling
    import comfy.samplers

    sampler = corrected(host, comfy.samplers.sampler_object("euler"))
    with monkeypatch.context() as patch:
        patch.setattr(comfy.k_diffusion.sampling, "to_d", None)
        with pytest.raises(ValueError, match="the steps of euler cannot be corrected, because it fails in a trial run on num"):
            run(sampler, ToyGuider("EPS"), torch.tensor(SIGMAS))
    assert run(sampler, ToyGuider("EPS"), torch.tensor(SIGMAS)).isfinite().all()


@pytest.mark.parametrize(
    ("steps", "name", "why"),
    [
        *[("none", name, "") for name in ("euler", "heun", "dpmpp_sde", "uni_pc")],
        ("auto", "heun", "the sampler evaluates more than once per step"),
        ("auto", "uni_pc", "the sampler also uses predictions of earlier steps"),
    ],
)
def test_an_uncorrected_host_sampler_is_not_rehearsed(host, plays, steps, name, why):
    import comfy.samplers

    sampler, guider = comfy.samplers.sampler_object(name), ToyGuider("EPS")
    ours, reports = host.run("IECSampler", sampler=sampler, **{**SETTINGS, "correction_steps": steps})
    result = run(ours, guider, torch.tensor(SIGMAS), dtype=torch.float32)
    assert not plays and torch.equal(result, run(sampler, ToyGuider("EPS"), torch.tensor(SIGMAS), dtype=torch.float32))
    assert reports[0].choice == (f"auto corrects nothing: {why}." if why else "")
    assert [step.sigma for step in reports[0].steps] == pytest.approx(SIGMAS[:-1])
    assert sum(step.nfe for step in reports[0].steps) == reports[0].nfe == len(guider.calls)


def test_an_interrupt_ends_a_stock_samplers_rehearsal(host, plays):
    import comfy.samplers
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing, processing_interrupted

    guider = ToyGuider("EPS")
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        run(corrected(host, comfy.samplers.sampler_object("euler")), guider, torch.tensor(SIGMAS))
    assert not processing_interrupted() and not guider.calls and plays["sample_euler"] == 1
    run(corrected(host, comfy.samplers.sampler_object("euler")), guider, torch.tensor(SIGMAS))
    assert plays["sample_euler"] == 2 and guider.calls  # an interrupted rehearsal is not kept


def as_of_the_host(function, name):
    """Return the function as if the host's module of samplers had defined it under this name."""
    found = types.FunctionType(function.__code__, {**function.__globals__, "__name__": "comfy.k_diffusion.sampling"}, name)
    found.__kwdefaults__, found.__defaults__ = function.__kwdefaults__, function.__defaults__
    return found


def twice_a_step(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        at = sigmas[i] * x.new_ones([len(x)])
        denoised = (model(x, at, **extra_args) + model(0.9 * x, at, **extra_args)) / 2
        if callback is not None:
            callback({"x": x, "i": i, "denoised": denoised})
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
    return x


@pytest.mark.parametrize(("steps", "name"), [("none", "sample_euler"), ("auto", "sample_heun"), ("auto", "sample_dpmpp_2m")])
def test_without_corrections_a_wrong_plan_does_not_stop_a_run(host, steps, name):
    """A host's sampler that another release has changed has a wrong plan: it samples, and the report has no steps."""
    import comfy.samplers

    plain = comfy.samplers.KSAMPLER(as_of_the_host(twice_a_step, name))
    ours, reports = host.run("IECSampler", sampler=plain, **{**SETTINGS, "correction_steps": steps})
    guider = ToyGuider("EPS")
    result = run(ours, guider, torch.tensor(SIGMAS))
    assert torch.equal(result, run(plain, ToyGuider("EPS"), torch.tensor(SIGMAS)))
    assert reports[0].steps == [] and reports[0].nfe == len(guider.calls) == 12 and reports[0].seconds > 0


def test_a_wrapped_host_sampler_does_not_count_as_the_hosts(host, module):
    import comfy.samplers

    of_the_host = module("noise").is_of_the_host
    euler = comfy.samplers.sampler_object("euler").sampler_function

    @functools.wraps(euler)
    def around(*args, **kwargs):
        return euler(*args, **kwargs)

    assert around.__module__ == euler.__module__
    names = comfy.samplers.KSampler.SAMPLERS
    assert all(of_the_host(comfy.samplers.sampler_object(name).sampler_function) for name in names)
    ours = corrected(host, comfy.samplers.sampler_object("euler")).sampler_function
    assert not any(map(of_the_host, (around, torch.no_grad()(around), functools.partial(euler), ours)))


def test_concurrent_runs_have_separate_plans(host):
    """One SAMPLER runs in four threads that alternate at every evaluation, each over a schedule of another length."""
    import comfy.samplers

    lengths, turn = (4, 5, 6, 7), threading.Barrier(4)

    class Waiting(ToyGuider):
        waits = True

        def __call__(self, *args, **kwargs):
            if self.waits and len(self.calls) < 6:  # as many as the shortest run has
                turn.wait(60)
            return super().__call__(*args, **kwargs)

    sampler = corrected(host, comfy.samplers.sampler_object("euler"), evaluation_point="next")
    results = {}

    def sample(length, waits=True):
        guider = Waiting("EPS", None, torch.sin)
        guider.waits = waits
        sigmas = torch.tensor([*torch.linspace(2, 0.1, length).tolist(), 0.0])
        with torch.inference_mode():
            return run(sampler, guider, sigmas, seed=length)

    def keep(length):
        results[length] = sample(length)

    threads = [threading.Thread(target=keep, args=(length,)) for length in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for length in lengths:
        assert torch.equal(results[length], sample(length, waits=False))


def test_a_nested_run_has_its_own_plan(host):
    """Another pack's sampler samples in two parts, each as a new run of a corrected sampler's function."""
    import comfy.samplers

    inner = corrected(host, comfy.samplers.sampler_object("euler"), evaluation_point="next")
    alone = functools.partial(inner.sampler_function, disable=True)

    def sample_twice(model, x, sigmas, extra_args=None, callback=None, disable=None):
        half = alone(model, x, sigmas[:3], extra_args=extra_args)
        return alone(model, half, sigmas[2:], extra_args=extra_args)

    guider = ToyGuider("EPS", None, torch.sin)
    result = run(comfy.samplers.KSAMPLER(sample_twice), guider, torch.tensor(SIGMAS))
    whole = run(inner, ToyGuider("EPS", None, torch.sin), torch.tensor(SIGMAS))
    assert [iteration for _, _, iteration in guider.calls] == [0, 1] * 5 + [0]
    torch.testing.assert_close(result, whole, rtol=1e-9, atol=1e-9)
