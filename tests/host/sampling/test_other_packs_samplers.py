"""SAMPLERs of other packs that contain the pack's, or that the pack's contains; written out here as such packs write them."""

import itertools

import pytest
import torch
from toy import Listener, ToyGuider, run

SETTINGS = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
SIGMAS = (10.0, 6.0, 3.0, 1.5, 0.6, 0.0)


def bent(x):
    return torch.sin(1.3 * x) / 2 + 0.2 * x


def stock(name="euler"):
    import comfy.samplers

    return comfy.samplers.sampler_object(name)


def around(inner, share=1.0):
    """Return a SAMPLER like Detail Daemon's: its function calls another SAMPLER's function with a denoiser that changes
    sigma.
    """
    import comfy.samplers

    def daemon(model, x, sigmas, *, wrapped, **kwargs):
        def denoise(x, sigma, **extra_args):
            return model(x, sigma * share, **extra_args)

        denoise.inner_model, denoise.sigmas = model.inner_model, model.sigmas
        return wrapped.sampler_function(denoise, x, sigmas, **kwargs, **wrapped.extra_options)

    return comfy.samplers.KSAMPLER(daemon, {"wrapped": inner})


def by_sample(inner):
    """Return a SAMPLER of its own class that calls another SAMPLER's `sample`."""
    import comfy.samplers

    class Passing(comfy.samplers.Sampler):
        def sample(self, *args, **kwargs):
            return inner.sample(*args, **kwargs)

    return Passing()


def by_copy(inner):
    """Return a SAMPLER made from another SAMPLER's public attributes."""
    import comfy.samplers

    return comfy.samplers.KSAMPLER(inner.sampler_function, dict(inner.extra_options), dict(inner.inpaint_options))


@pytest.mark.fast
@pytest.mark.parametrize("wrap", [around, by_sample, by_copy])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_an_iec_sampler_inside_another_sampler_is_corrected(host, wrap, name):
    sigmas = torch.tensor(SIGMAS)
    ours, reports = host.run("IECSampler", sampler=stock(name), **SETTINGS)
    guider, alone, plain = (ToyGuider("EPS", network=bent) for _ in range(3))
    expected = run(ours, alone, sigmas)
    run(stock(name), plain, sigmas)
    assert torch.equal(run(wrap(ours), guider, sigmas), expected)
    assert len(guider.calls) == len(plain.calls) + 5
    assert reports[-1].nfe == len(guider.calls)
    assert [step.corrected for step in reports[-1].steps] == [True] * 5


def test_applying_twice_is_detected_inside_another_sampler(host):
    ours = host.run("IECSampler", sampler=stock(), **SETTINGS)[0]
    for wrapped in (around(ours), by_copy(ours)):
        guider = ToyGuider("EPS")
        with pytest.raises(ValueError, match=r"^sampler: IEC is applied twice"):
            run(host.run("IECSampler", sampler=wrapped, **SETTINGS)[0], guider, torch.tensor(SIGMAS))
        assert not guider.calls
    guider = ToyGuider("EPS")
    run(ours, guider, torch.tensor(SIGMAS))  # and the refusal has no side effects
    assert len(guider.calls) == 10


def test_a_sampler_that_does_not_use_its_sampler_function_is_refused(host):
    import comfy.samplers

    class Own(comfy.samplers.KSAMPLER):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            return noise

    own = Own(stock().sampler_function)
    with pytest.raises(ValueError, match=r"^sampler: Own does not use its sampler function"):
        run(host.run("IECSampler", sampler=own, **SETTINGS)[0], ToyGuider("EPS"), torch.tensor(SIGMAS))
    run(
        host.run("IECSampler", sampler=own, **{**SETTINGS, "correction_steps": "none"})[0],
        ToyGuider("EPS"),
        torch.tensor(SIGMAS),
    )


@pytest.mark.fast
@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
@pytest.mark.parametrize("point", ["paper", "next"])
@pytest.mark.parametrize("model_type", ["EPS", "V_PREDICTION", "FLOW"])
def test_a_sampler_that_passes_another_sigma_is_corrected_at_its_next_latent(host, share, point, model_type):
    """The step follows the schedule's sigmas, x' = x + (sigma' - sigma) (x - D) / sigma; the network gets share * sigma.

    At `paper` it sees x' as in the sampler's next evaluation, whose sigma is share * sigma'.
    """
    guider = ToyGuider(model_type, network=bent)
    sigmas = torch.linspace(1, 0, 6).double() if model_type == "FLOW" else torch.tensor(SIGMAS).double()
    sampler, reports = host.run("IECSampler", sampler=around(stock(), share), evaluation_point=point, **SETTINGS)
    run(sampler, guider, sigmas)
    calls, corrected = iter(guider.calls), 0
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        x, at, iteration = next(calls)
        assert (at, iteration) == (pytest.approx(share * sigma), 0)
        if point == "next" and sigma_next == 0:
            continue
        denoised = guider.denoised(x, torch.full((2,), at, dtype=torch.float64))
        x_next = x + (sigma_next - sigma) * (x - denoised) / sigma
        x_in, where, iteration = next(calls)
        scale = guider.input_scale(share * sigma_next) / guider.input_scale(share * sigma) if point == "paper" else 1.0
        assert (where, iteration) == (pytest.approx(share * (sigma if point == "paper" else sigma_next)), 1)
        torch.testing.assert_close(x_in, scale * x_next, rtol=1e-6, atol=1e-6)
        corrected += 1
    assert next(calls, None) is None
    assert reports[0].sigmas == pytest.approx(sigmas.tolist())
    assert sum(step.corrected for step in reports[0].steps) == corrected >= 4


def test_a_sampler_that_passes_another_sigma_and_adds_noise_is_refused(host):
    guider = ToyGuider("EPS")
    with pytest.raises(ValueError, match=r"^sampler: the steps of daemon cannot be corrected, because it evaluates latents at"):
        run(host.run("IECSampler", sampler=around(stock("euler_ancestral"), 0.8), **SETTINGS)[0], guider, torch.tensor(SIGMAS))
    assert not guider.calls


def test_a_denoiser_that_does_not_show_its_model_is_refused(host):
    import comfy.samplers

    for steps in ("none", "auto", "all"):
        ours = host.run("IECSampler", sampler=stock(), **{**SETTINGS, "correction_steps": steps})[0]

        def bare(model, x, sigmas, ours=ours, **kwargs):
            return ours.sampler_function(lambda x, sigma, **extra: model(x, sigma, **extra), x, sigmas, **kwargs)

        guider, plain = ToyGuider("EPS"), ToyGuider("EPS")
        if steps == "all":
            with pytest.raises(ValueError, match=r"^sampler: .* because the denoiser that it gets does not expose its model"):
                run(comfy.samplers.KSAMPLER(bare), guider, torch.tensor(SIGMAS))
            assert not guider.calls
        else:
            expected = run(stock(), plain, torch.tensor(SIGMAS))
            assert torch.equal(run(comfy.samplers.KSAMPLER(bare), guider, torch.tensor(SIGMAS)), expected)


def test_a_step_with_other_factors_is_corrected_at_its_next_latent(host):
    import comfy.samplers

    def sample_half(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x = 0.5 * x + 0.3 * denoised
        return x

    guider = ToyGuider("FLOW", network=bent)
    sigmas = torch.linspace(1, 0, 5).double()
    run(host.run("IECSampler", sampler=comfy.samplers.KSAMPLER(sample_half), **SETTINGS)[0], guider, sigmas)
    for (x, at, _), (x_in, _, _) in zip(guider.calls[::2], guider.calls[1::2]):
        denoised = guider.denoised(x, torch.full((2,), at, dtype=torch.float64))
        torch.testing.assert_close(x_in, 0.5 * x + 0.3 * denoised, rtol=1e-6, atol=1e-6)


def test_steps_of_a_rising_schedule_are_counted_in_order(host):
    rising = [14.6, 7.0, 3.0, 1.0, 5.0, 2.0, 0.5, 0.0]
    sigmas = torch.tensor(rising).double()
    for point, count in (("paper", 7), ("next", 6)):
        guider = Listener("EPS")
        run(host.run("IECSampler", sampler=stock(), evaluation_point=point, **SETTINGS)[0], guider, sigmas)
        own = [(step, 0, sigma) for step, sigma in enumerate(rising[:-1])]
        again = [(step, 1, rising[step + (point == "next")]) for step in range(count)]
        assert [one[:2] for one in guider.told] == [one[:2] for one in sorted(own + again)]
        assert [one[2] for one in guider.told] == pytest.approx([one[2] for one in sorted(own + again)])
        assert all(one[2] == one[3] for one in guider.told)


def test_without_corrections_nothing_is_rehearsed(host):
    import comfy.samplers

    calls = []

    def sample_counting(model, x, sigmas, extra_args=None, callback=None, disable=None):
        calls.append(len(sigmas))
        return model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)

    guider = ToyGuider("EPS")
    settings = {**SETTINGS, "correction_steps": "none"}
    sampler, reports = host.run("IECSampler", sampler=comfy.samplers.KSAMPLER(sample_counting), **settings)
    run(sampler, guider, torch.tensor(SIGMAS))
    assert calls == [6] and reports[0].nfe == len(guider.calls) == 1


@pytest.mark.parametrize("steps", ["auto", "all"])
def test_an_interrupt_in_a_rehearsal_stops_the_run(host, steps):
    import comfy.samplers
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing, processing_interrupted
    from comfy.model_management import throw_exception_if_processing_interrupted as look

    calls = []

    def sample_looking(model, x, sigmas, extra_args=None, callback=None, disable=None):
        calls.append(len(sigmas))
        look()
        return stock().sampler_function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    guider = ToyGuider("EPS")
    sampler = host.run(
        "IECSampler", sampler=comfy.samplers.KSAMPLER(sample_looking), **{**SETTINGS, "correction_steps": steps}
    )[0]
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        run(sampler, guider, torch.tensor(SIGMAS))
    assert not processing_interrupted() and not guider.calls and len(calls) == 1
