"""Every sampler of the host over every parameterization of the host, on a network whose fixed points are known.

The network is linear, so that at a corrected step the iteration x'_k -> x'_{k+1} is linear too. With D(x) = p x + q at the
step's sigma, c = c_in(sigma') / c_in(sigma) and x' = a x + b D + noise, the paper's iteration contracts by

    1 - lam + lam J,    J = -(1 - p) c b,

towards the D at which D = x - c x' + D(c x'). All of it in float64, to 1e-10.
"""

import itertools

import pytest
import torch
from pack import pack_module
from toy import ToyGuider, run

LAMBDA, ITERATIONS, STEPS, CORRECTED = 0.5, 90, 9, (0, 3, 7)
NO_LONGER_MOVES = 1e-13  # a thousandth of the iterates' tolerance: smaller changes do not matter

DETERMINISTIC = (
    "euler", "ddim", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep",
    "gradient_estimation", "exp_heun_2_x0", "uni_pc", "uni_pc_bh2",
)  # fmt: skip
ONE_PREDICTION = ("euler_ancestral", "ddpm", "lcm")  # stochastic, and using only the step's own prediction
STOCHASTIC = (
    *ONE_PREDICTION, "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "res_multistep_ancestral", "er_sde",
    "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "exp_heun_2_x0_sde",
)  # fmt: skip
FIRST_STEP_OF_ONE_PREDICTION = ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "res_multistep_ancestral", "er_sde")
OWN_STEPS = ("dpm_fast", "dpm_adaptive")
TYPES = (
    "EPS", "V_PREDICTION", "V_PREDICTION_EDM", "STABLE_CASCADE", "EDM", "FLOW", "V_PREDICTION_CONTINUOUS", "FLUX",
    "FLOW_COSMOS", "V_PREDICTION_DDPM",
)  # fmt: skip
# The host's samplers treat flows differently from all other types: each sampler runs with a type of either kind, and with EDM,
# which changes the latent's share of the prediction. Each other type runs with every third sampler, so that each sampler runs
# with every third of these types.
OF_ALL_SAMPLERS = ("EPS", "EDM", "FLOW")
PAIRS = [
    (model_type, name)
    for i, model_type in enumerate(TYPES)
    for j, name in enumerate((*DETERMINISTIC, *STOCHASTIC))
    if model_type in OF_ALL_SAMPLERS or (i + j) % 3 == 0
]


def known(host, samplers):
    """Return the samplers of a list that this host has."""
    import comfy.samplers

    return [name for name in samplers if name in comfy.samplers.KSampler.SAMPLERS]


def guider_of(model_type, **settings):
    import comfy.model_base

    if model_type not in comfy.model_base.ModelType.__members__:
        pytest.skip(f"this ComfyUI has no {model_type}")
    return ToyGuider(model_type, **settings)


def schedule(guider, steps=STEPS):
    """Return n + 1 sigmas in float64: for a flow the model's own, otherwise Karras's over a range in which a linear network
    contracts.
    """
    from comfy.k_diffusion.sampling import get_sigmas_karras
    from comfy.samplers import calculate_sigmas

    sampling = guider.inner_model.model_sampling
    if float(sampling.sigma_max) <= 1:
        return calculate_sigmas(sampling, "simple", steps).double()
    return get_sigmas_karras(steps, max(float(sampling.sigma_min), 0.05), min(float(sampling.sigma_max), 10.0)).double()


def corrected(host, name, **settings):
    """Return (the host's sampler of this name, wrapped by IECSampler; the list of its reports)."""
    import comfy.samplers

    inputs = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0, **settings}
    return host.run("IECSampler", sampler=comfy.samplers.sampler_object(name), **inputs)


def groups(calls):
    """Return the evaluations of each corrected step: a list of (x, sigma) for the step's own and the iterations."""
    found = []
    for number, (x, sigma, iteration) in enumerate(calls):
        if iteration == 0 and number + 1 < len(calls) and calls[number + 1][2] == 1:
            found.append([(x, sigma)])
        elif iteration:
            found[-1].append((x, sigma))
    return found


@pytest.mark.fast
def test_every_sampler_of_the_host_is_accounted_for(host):
    import comfy.samplers

    names = {name for name in comfy.samplers.KSampler.SAMPLERS if "cfg_pp" not in name}
    assert names <= {*DETERMINISTIC, *STOCHASTIC, *OWN_STEPS}


def test_every_parameterization_of_the_host_is_accounted_for(host):
    import comfy.model_base

    not_sampled = {"IMG_TO_IMG", "IMG_TO_IMG_FLOW", "FLOW_AV"}  # one step from an image; flow over two packed latents
    assert set(comfy.model_base.ModelType.__members__) <= {*TYPES, *not_sampled}


@pytest.mark.filterwarnings("ignore:Should have t")  # torchsde compares the path's ends in float32
@pytest.mark.parametrize(("model_type", "name"), PAIRS)
def test_iteration_converges_to_the_fixed_point_at_the_predicted_rate(host, model_type, name):
    if not known(host, [name]):
        pytest.skip(f"this ComfyUI has no {name}")
    if name.startswith("uni_pc"):
        pytest.skip("the host's uni_pc does not run in float64; see test_history_has_the_corrected_prediction")
    guider, taken = guider_of(model_type), {}
    sigmas = schedule(guider)
    sampler = corrected(host, name, correction_steps="steps:0,3,7", max_iterations=ITERATIONS, tolerance=NO_LONGER_MOVES)[0]
    run(sampler, guider, sigmas, callback=lambda step, denoised, x, total: taken.setdefault(len(taken), denoised))
    steps = groups(guider.calls)
    assert len(steps) == len(CORRECTED)
    own = [number for number, call in enumerate(guider.calls) if call[2] == 0]
    for step, evaluations in zip(CORRECTED, steps):
        (x, sigma), inputs = evaluations[0], [x_in for x_in, _ in evaluations[1:]]
        sigma_next = sigmas[step + 1].item()
        assert 2 < len(inputs) <= ITERATIONS and all(at == sigma for _, at in evaluations)  # fewer if it no longer moved
        p, q = guider.line(sigma)
        scale = guider.input_scale(sigma_next) / guider.input_scale(sigma)
        a, b = sigma_next / sigma, 1 - sigma_next / sigma
        last = inputs[-1]
        denoised = x - last + p * last + q
        if name in DETERMINISTIC:
            rate = 1 - LAMBDA - LAMBDA * (1 - p) * scale * b
            assert abs(rate) < 1
            first, second, third = ((after - before).norm() for before, after in itertools.pairwise(inputs[:4]))
            if first > 1e-6 * x.norm():
                assert (second / first).item() == pytest.approx(abs(rate), abs=2e-6)  # the host's sigmas are float32
            if second > 1e-6 * x.norm():
                assert (third / second).item() == pytest.approx(abs(rate), abs=2e-6)
            closed = (x + q - (1 - p) * scale * a * x) / (1 + (1 - p) * scale * b)
            torch.testing.assert_close(denoised, closed, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(last, inputs[-2], rtol=1e-10, atol=1e-10)
        if name in ONE_PREDICTION or (step == 0 and name in FIRST_STEP_OF_ONE_PREDICTION):
            # the run continues from the latent, with its noise, to which the iteration converged
            begin = own[own.index(_number(guider.calls, x)) + 1]
            torch.testing.assert_close(last, guider.calls[begin][0] * scale, rtol=1e-6, atol=1e-6)
        if name != "sa_solver_pece":
            torch.testing.assert_close(taken[step], denoised, rtol=1e-10, atol=1e-10)


def _number(calls, x):
    return next(number for number, call in enumerate(calls) if call[0] is x)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("model_type", ["EPS", "V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_every_schedule(host, name, model_type, iterations):
    """After K iterations a linear network is at fixed point + rate^K (start - fixed point), at every step of every schedule."""
    import comfy.samplers

    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        guider = ToyGuider(model_type, {"shift": 1.5})
        sigmas = comfy.samplers.calculate_sigmas(guider.inner_model.model_sampling, scheduler, 12).double()
        taken = []
        sampler, reports = corrected(host, name, max_iterations=iterations)
        run(sampler, guider, sigmas, callback=lambda step, denoised, x, total, taken=taken: taken.append(denoised))
        own = [evaluations[0] for evaluations in groups(guider.calls)]
        assert len(own) == len(taken) == len(sigmas) - 1, scheduler
        for step, ((x, sigma), denoised) in enumerate(zip(own, taken)):
            if any(reports[0].steps[step].fell_back):
                continue
            a = sigmas[step + 1].item() / sigma
            p, q = guider.line(sigma)
            pull = (1 - p) * guider.input_scale(a * sigma) / guider.input_scale(sigma)
            fixed = (x + q - pull * a * x) / (1 + pull * (1 - a))
            rate = 1 - LAMBDA - LAMBDA * pull * (1 - a)
            torch.testing.assert_close(denoised, fixed + rate**iterations * (p * x + q - fixed), rtol=1e-8, atol=1e-8)
        assert sum(any(step.fell_back) for step in reports[0].steps) <= 1, scheduler


class SilentGuider(ToyGuider):
    """A guider that predicts zero and has no residual: the latents change only by the sampler's own step and its noise."""

    def denoised(self, x, sigma):
        if self.calls[-1][2]:  # a correction at x_in has no residual if D(x_in) = x_in - x
            return x - next(call[0] for call in reversed(self.calls) if call[2] == 0)
        return torch.zeros_like(x)


@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("model_type", ["EPS", "EDM", "FLOW"])
def test_iterates_include_the_steps_noise(host, model_type, name):
    """Each step draws noise once and keeps it through the iterations: the step's result, with its noise, is known before the
    step.
    """
    import comfy.samplers

    if not known(host, [name]):
        pytest.skip(f"this ComfyUI has no {name}")
    guider, stock = SilentGuider(model_type), SilentGuider(model_type)
    sigmas = schedule(guider)
    final = run(corrected(host, name)[0], guider, sigmas)
    torch.testing.assert_close(final, run(comfy.samplers.sampler_object(name), stock, sigmas), rtol=1e-9, atol=1e-9)
    steps = groups(guider.calls)
    assert len(steps) == STEPS
    for ((_, sigma), (x_in, _)), ((x_next, sigma_next), _) in itertools.pairwise(steps):
        scale = guider.input_scale(sigma_next) / guider.input_scale(sigma)
        torch.testing.assert_close(x_in, scale * x_next, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_evaluations_are_the_samplers_plus_the_corrections(host, name):
    import comfy.samplers

    if not known(host, [name]):
        pytest.skip(f"this ComfyUI has no {name}")
    guider, stock, none = ToyGuider("EPS"), ToyGuider("EPS"), ToyGuider("EPS")
    sigmas, single = schedule(guider), {"dtype": torch.float32}
    sampler, reports = corrected(host, name, max_iterations=2)
    run(sampler, guider, sigmas, **single)
    plain = run(comfy.samplers.sampler_object(name), stock, sigmas, **single)
    assert len(guider.calls) == reports[0].nfe == len(stock.calls) + 2 * STEPS
    assert torch.equal(run(corrected(host, name, correction_steps="none")[0], none, sigmas, **single), plain)
    assert len(none.calls) == len(stock.calls)


ONE_EVALUATION = (
    "euler", "ddim", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation", "uni_pc",
    "uni_pc_bh2",
)  # fmt: skip


@pytest.mark.parametrize("name", ONE_EVALUATION)
def test_history_has_the_corrected_prediction(host, name):
    """The stock sampler over a denoiser that corrects each prediction by the written-out iteration gives the same result."""
    import comfy.samplers

    class WrittenOut(ToyGuider):
        def __call__(self, x, sigma, **_):
            step = int((sigmas - sigma[0]).abs().argmin())
            now, then = sigma[0].item(), sigmas[step + 1].item()
            x_next = x + (then - now) * (x - self.denoised(x, sigma)) / now
            first = x_next
            for _ in range(2):
                x_in = x_next * self.input_scale(then) / self.input_scale(now)
                eps = (x_in - self.denoised(x_in, sigma)) / now
                x_next = (1 - LAMBDA) * x_next + LAMBDA * (x + (then - now) * eps)
            assert not torch.equal(first, x_next)
            return x - now * (x_next - x) / (then - now)

    def network(x):
        return torch.tanh(x) + 0.1

    guider = ToyGuider("V_PREDICTION", network=network)
    sigmas = schedule(guider).float()
    expected = run(
        comfy.samplers.sampler_object(name), WrittenOut("V_PREDICTION", network=network), sigmas.clone(), dtype=torch.float32
    )
    result = run(corrected(host, name, max_iterations=2)[0], guider, sigmas.clone(), dtype=torch.float32)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_a_heun_step_is_corrected_once_at_its_own_sigma(host):
    """The second evaluation of a step, at the next sigma, is the sampler's; only the first prediction is corrected."""

    def network(x):
        return torch.tanh(x) + 0.1

    guider = ToyGuider("EPS", network=network)
    sigmas = schedule(guider)
    result = run(corrected(host, "heun")[0], guider, sigmas)
    x = guider.calls[0][0]
    for now, then in itertools.pairwise(sigmas.tolist()):
        at, scale = torch.full((2,), now, dtype=torch.float64), guider.input_scale(then) / guider.input_scale(now)
        eps = (x - guider.denoised(x, at)) / now
        x_in = (x + (then - now) * eps) * scale
        eps = (1 - LAMBDA) * eps + LAMBDA * (x_in - guider.denoised(x_in, at)) / now
        x_next = x + (then - now) * eps
        if then:
            at = torch.full((2,), then, dtype=torch.float64)
            x_next = x + (then - now) * (eps + (x_next - guider.denoised(x_next, at)) / then) / 2
        x = x_next
    torch.testing.assert_close(result, x, rtol=1e-9, atol=1e-9)


def test_dpm_fast_is_corrected_at_its_own_steps(host):
    """dpm_fast chooses its own steps, of up to three evaluations each: it takes four steps for nine steps of the schedule."""
    guider = ToyGuider("EPS")
    sampler, reports = corrected(host, "dpm_fast", correction_steps="steps:3")
    run(sampler, guider, schedule(guider))
    assert [step.corrected for step in reports[0].steps] == [False, False, False, True]
    assert len(guider.calls) == 10


def test_dpm_adaptive_is_refused_and_runs_uncorrected(host):
    import comfy.samplers

    with pytest.raises(ValueError, match=r"^sampler: dpm_adaptive chooses its steps"):
        corrected(host, "dpm_adaptive")
    guider, stock = ToyGuider("EPS"), ToyGuider("EPS")
    sampler, reports = corrected(host, "dpm_adaptive", correction_steps="none")
    single = {"dtype": torch.float32}
    expected = run(comfy.samplers.sampler_object("dpm_adaptive"), stock, schedule(stock), **single)
    assert torch.equal(run(sampler, guider, schedule(guider), **single), expected)
    assert reports[0].nfe == len(stock.calls)


def test_a_sampler_with_steps_that_depend_on_the_latent_is_refused(host):
    import comfy.samplers

    def sample_by_size(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(1 + int(x.abs().max() > 5)):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]))
            callback({"x": x, "i": i, "denoised": denoised})
        return denoised

    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0}
    sampler = host.run("IECSampler", sampler=comfy.samplers.KSAMPLER(sample_by_size), **settings)[0]
    guider = ToyGuider("EPS")
    with pytest.raises(
        ValueError, match=r"^sampler: the steps of by_size cannot be corrected, because it chooses its steps while it runs"
    ):
        run(sampler, guider, schedule(guider))
    assert not guider.calls


def test_a_sampler_of_another_pack_is_corrected(host):
    """The sampler function is not the host's and draws its own noise: the iterates do not include the noise."""
    import comfy.samplers

    def sample_foreign(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            noise = torch.ones_like(x) if noise_sampler is None else noise_sampler(sigmas[i], sigmas[i + 1])
            x = denoised + sigmas[i + 1] * noise
        return x

    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0}
    sampler, reports = host.run("IECSampler", sampler=comfy.samplers.KSAMPLER(sample_foreign), **settings)
    guider = ToyGuider("EPS")
    sigmas = schedule(guider)
    run(sampler, guider, sigmas)
    assert reports[0].nfe == len(guider.calls) == 2 * STEPS
    for ((x, sigma), (x_in, _)), sigma_next in zip(groups(guider.calls), sigmas[1:].tolist()):
        euler = x + (sigma_next - sigma) * (x - guider.denoised(x, torch.full((2,), sigma, dtype=torch.float64))) / sigma
        torch.testing.assert_close(x_in, euler * guider.input_scale(sigma_next) / guider.input_scale(sigma))


def test_churn_noise_is_part_of_the_latent_at_the_steps_start(host):
    """Noise that is added before a step is part of the latent with which the step begins, at the sigma that was evaluated."""
    import comfy.samplers

    stock = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0}
    sampler = host.run("IECSampler", sampler=stock, **settings)[0]
    guider = ToyGuider("EPS")
    sigmas = schedule(guider)
    with torch.random.fork_rng(devices=[]):
        run(sampler, guider, sigmas)
    for ((x, sigma), (x_in, at)), start, sigma_next in zip(groups(guider.calls), sigmas.tolist(), sigmas[1:].tolist()):
        assert at == sigma > start
        euler = x + (sigma_next - sigma) * (x - guider.denoised(x, torch.full((2,), sigma, dtype=torch.float64))) / sigma
        torch.testing.assert_close(x_in, euler * guider.input_scale(sigma_next) / guider.input_scale(sigma), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_schedule_without_steps_returns_the_latent(host, name):
    import comfy.samplers

    sigmas, single = torch.tensor([1.5]), {"dtype": torch.float32}
    if name == "uni_pc":
        sigmas = torch.tensor([1.5, 0.0])  # it takes at least one step
    stock = run(comfy.samplers.sampler_object(name), ToyGuider("EPS"), sigmas.clone(), **single)
    sampler, reports = corrected(host, name)
    result = run(sampler, ToyGuider("EPS"), sigmas.clone(), **single)
    assert len(reports[0].steps) == len(sigmas) - 1
    assert result.isfinite().all() and (len(sigmas) > 1 or torch.equal(result, stock))


@pytest.mark.parametrize("model_type", ["EPS", "V_PREDICTION", "FLOW"])
@pytest.mark.parametrize("point", ["paper", "next"])
def test_unsampling_steps_are_corrected(host, model_type, point):
    """The sigmas are flipped, as by FlipSigmas: from a small sigma instead of 0 up to the highest."""
    guider = guider_of(model_type)
    sigmas = schedule(guider).flip(0)
    sigmas[0] = 0.0001
    sigmas[-1] *= 0.99  # at a flow's 1 no latent is left that the host could return
    sampler, reports = corrected(host, "euler", evaluation_point=point)
    assert run(sampler, guider, sigmas).isfinite().all()
    assert all(step.corrected and 0 < step.residuals[0][0] < 10 for step in reports[0].steps)
    for (x, sigma), (x_in, at) in groups(guider.calls):
        step = (sigmas - sigma).abs().argmin().item()
        sigma_next = sigmas[step + 1].item()
        euler = x + (sigma_next - sigma) * (x - guider.denoised(x, torch.full((2,), sigma, dtype=torch.float64))) / sigma
        scale = guider.input_scale(sigma_next) / guider.input_scale(sigma) if point == "paper" else 1
        torch.testing.assert_close(x_in, scale * euler, rtol=1e-6, atol=1e-6)
        assert at == pytest.approx(sigma if point == "paper" else sigma_next)


@pytest.mark.parametrize("model_type", ["EPS", "FLOW"])
def test_unsampling_iterates_on(host, model_type):
    """When the noise increases, the factor of the prediction is negative; a residual is a norm and stays positive."""
    guider = guider_of(model_type)
    sampler, reports = corrected(host, "euler", max_iterations=4, tolerance=1e-9)
    run(sampler, guider, torch.linspace(0.3, 0.9, 7))
    assert all(step.nfe == 5 for step in reports[0].steps)
    assert all(value > 0 for step in reports[0].steps for row in step.residuals for value in row)


def test_dpm_adaptive_runs_uncorrected_over_any_range(host):
    """Over a short range its error estimate is so small that it can be the same for many latents."""
    import comfy.samplers

    for high, low in itertools.product((0.4, 1.0, 2.0), (0.2, 0.35)):
        sigmas, single = torch.tensor([high, (high + low) / 2, low, 0.0]), {"dtype": torch.float32}
        stock = run(comfy.samplers.sampler_object("dpm_adaptive"), ToyGuider("EPS"), sigmas, **single)
        sampler = corrected(host, "dpm_adaptive", correction_steps="none")[0]
        assert torch.equal(run(sampler, ToyGuider("EPS"), sigmas, **single), stock)


def test_cfg_pp_samplers_are_detected_by_their_steps(host):
    """A CFG++ sampler of the host without cfg_pp in its name is recognized."""
    sampler = host.run("SamplerEulerCFGpp", version="alternative")[0]
    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0}
    guider = ToyGuider("EPS")
    with pytest.raises(ValueError, match=r"^sampler: the steps of euler_pp .* because it uses the unguided"):
        run(host.run("IECSampler", sampler=sampler, **settings)[0], guider, schedule(guider))
    assert not guider.calls


def test_a_callback_after_a_second_evaluation_is_refused(host):
    import comfy.samplers

    def sample_late(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            s_in = x.new_ones([len(x)])
            slope = (x - model(x, sigmas[i] * s_in, **extra_args)) / sigmas[i]
            denoised = model(x + (sigmas[i + 1] - sigmas[i]) * slope, sigmas[i] * s_in, **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
        return x

    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0}
    guider = ToyGuider("EPS")
    with pytest.raises(ValueError, match="because it does not report a step right after its first evaluation"):
        run(host.run("IECSampler", sampler=comfy.samplers.KSAMPLER(sample_late), **settings)[0], guider, schedule(guider))


@pytest.mark.parametrize("steps", ["none", "all"])
def test_schedule_with_a_zero_inside(host, steps):
    """lcm runs over such a schedule; a step that begins at sigma 0 cannot be corrected."""
    import comfy.samplers

    sigmas, single = torch.tensor([5.0, 2.0, 0.0, 0.0]), {"dtype": torch.float32}
    sampler = corrected(host, "lcm", correction_steps=steps)[0]
    if steps == "none":
        stock = run(comfy.samplers.sampler_object("lcm"), ToyGuider("EPS"), sigmas, **single)
        assert torch.equal(run(sampler, ToyGuider("EPS"), sigmas, **single), stock)
    else:
        with pytest.raises(ValueError, match=r"^sigmas: .* in step 2, numbered from 0, where no noise is left"):
            run(sampler, ToyGuider("EPS"), sigmas, **single)


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_ancestral", {"s_noise": 0.0}), ("euler_ancestral", {"eta": 0.4, "s_noise": 1.1}), ("er_sde", {"s_noise": 0.5}),
        ("dpmpp_sde", {"eta": 0.3, "r": 0.7}), ("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}), ("seeds_2", {"eta": 0.5}),
    ],
)  # fmt: skip
def test_options_of_a_sampler_affect_its_steps(host, name, options):
    import comfy.samplers

    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": 1, "tolerance": 0.0}
    for model_type in ("EPS", "FLOW"):
        guider = SilentGuider(model_type)
        sampler = host.run("IECSampler", sampler=comfy.samplers.ksampler(name, options), **settings)[0]
        run(sampler, guider, schedule(guider))
        for ((_, sigma), (x_in, _)), ((x_next, sigma_next), _) in itertools.pairwise(groups(guider.calls)):
            scale = guider.input_scale(sigma_next) / guider.input_scale(sigma)
            torch.testing.assert_close(x_in, scale * x_next, rtol=2e-6, atol=2e-6)


def test_noise_that_is_not_a_multiple_of_the_draw_is_omitted(host):
    """A sampler clips its noise: the step's result is not known, and the iterates do not include the noise."""
    import comfy.samplers

    def clipping(function):
        def sample_lcm(model, x, sigmas, noise_sampler=None, **kwargs):
            plain = noise_sampler or comfy.k_diffusion.sampling.default_noise_sampler(x, seed=kwargs["extra_args"]["seed"])
            return function(model, x, sigmas, noise_sampler=lambda *at: plain(*at).clamp(-0.5, 0.5), **kwargs)

        return sample_lcm

    host_module = comfy.k_diffusion.sampling
    stock = host_module.sample_lcm
    host_module.sample_lcm = clipping(stock)
    try:
        guider = ToyGuider("EPS")
        run(corrected(host, "lcm")[0], guider, schedule(guider))
    finally:
        host_module.sample_lcm = stock
    sigmas = schedule(guider)
    for ((x, sigma), (x_in, _)), sigma_next in zip(groups(guider.calls), sigmas[1:].tolist()):
        euler = x + (sigma_next - sigma) * (x - guider.denoised(x, torch.full((2,), sigma, dtype=torch.float64))) / sigma
        torch.testing.assert_close(
            x_in, euler * guider.input_scale(sigma_next) / guider.input_scale(sigma), rtol=1e-6, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore:Should have t")
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde_gpu"])
def test_noise_drawn_ahead_has_the_latents_dtype_and_is_constant(host, name):
    """The noise drawn ahead has the latent's dtype and is the same each time.

    A Brownian path's values depend on the dtype and device of the sigmas that it gets, and the rehearsal's sigmas are on the
    CPU. A step asks for its noise once per iteration.
    """
    import comfy.samplers

    noise, rehearsal = (pack_module(f"nodes.host.sampling.{name}") for name in ("noise", "rehearsal"))
    x, sigmas = torch.zeros(2, 4, 8, 8, dtype=torch.float16), torch.tensor([6.0, 4.0, 1.0])
    ahead = noise.NoiseAhead(comfy.samplers.sampler_object(name).sampler_function, x, sigmas, 3)
    first = ahead.of([rehearsal.Draw(0, sigmas[0], sigmas[1], 0.5)])
    noises = [first(), first(), first()]
    assert noises[0].dtype == torch.float16 and noises[0].any()
    assert torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])
    second = ahead.of([rehearsal.Draw(1, sigmas[1], sigmas[2], 0.5)])
    noises = [noises[0], second(), second()]
    assert torch.equal(noises[1], noises[2]) and not torch.equal(noises[0], noises[1])


@pytest.mark.parametrize(("scheduler", "multiplied"), [("normal", "by 3.4 in step 18"), ("karras", "by 1.5 in step 18")])
def test_history_that_multiplies_a_correction_is_reported(host, scheduler, multiplied):
    """dpmpp_2m takes its step with (1 + h / (2 h_last)) D - h / (2 h_last) D_last, where h is the step's width in log sigma."""
    import comfy.samplers

    module = pack_module("nodes.host.sampling.rehearsal")
    guider = ToyGuider("EPS")
    sigmas = comfy.samplers.calculate_sigmas(guider.inner_model.model_sampling, scheduler, 20)
    function = comfy.samplers.sampler_object("dpmpp_2m").sampler_function
    wrap = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
    steps = module.rehearse(function, wrap, torch.zeros(1, 1, 2, 2), sigmas, {"seed": 1}, {}, True).steps
    widths = [(here / then).log().item() for here, then in itertools.pairwise(sigmas[:-1])]
    for number in range(1, 19):
        expected = 1 + widths[number] / (2 * widths[number - 1])
        assert steps[number].gain == pytest.approx(expected, rel=1e-2)
    assert steps[0].gain == pytest.approx(1) and steps[-1].gain == pytest.approx(1)
    for name, warned in (("dpmpp_2m", True), ("euler", False), ("heun", False)):
        sampler, reports = corrected(host, name, correction_steps="ends:1/10")
        run(sampler, ToyGuider("EPS"), sigmas)
        assert (
            any(f"so multiplies the change that a correction makes ({multiplied})" in text for text in reports[0].warnings)
            == warned
        )
