"""Euler steps with IEC compared with the same steps written out in each parameterization's own coordinates.

The network is nonlinear. The references use nothing of the host or the pack: they call the network as its training would.
"""

import itertools

import pytest
import torch
from reference import iec_euler
from toy import ToyGuider, run

LAMBDA, ITERATIONS, STEPS = 0.4, 2, 12


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def network(x):
    return 0.5 * torch.tanh(x) + 0.3 * x + 0.1


def iterate(x, ordinary, step):
    """x'_0 = ordinary, x'_{k+1} = (1 - lam) x'_k + lam step(x'_k)."""
    x_next = ordinary
    for _ in range(ITERATIONS):
        x_next = (1 - LAMBDA) * x_next + LAMBDA * step(x_next)
    return x_next


def variance_preserving(eps):
    """Return the paper's DDIM on x_vp = sqrt(abar) x_0 + sqrt(1 - abar) noise; eps(x_vp, abar) is the predicted noise."""

    def step(x, sigma, sigma_next):
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        a = (bar_next / bar) ** 0.5
        b = (1 - bar_next) ** 0.5 - (bar_next * (1 - bar) / bar) ** 0.5
        x = x * bar**0.5
        x_next = iterate(x, a * x + b * eps(x, bar), lambda y: a * x + b * eps(y, bar))
        return x_next / bar_next**0.5

    return step


def preconditioned(sigma_data, sign):
    """Return EDM: D = c_skip x + c_out F(c_in x), in x = x_0 + sigma noise; c_out is negative for its v-prediction."""

    def slope(x_in, sigma):
        """Return (x - D) / sigma for the network input x_in = c_in x."""
        total = sigma**2 + sigma_data**2
        x = x_in * total**0.5
        denoised = x * sigma_data**2 / total + sign * network(x_in) * sigma * sigma_data / total**0.5
        return (x - denoised) / sigma

    def step(x, sigma, sigma_next):
        c_in, c_in_next = ((s**2 + sigma_data**2) ** -0.5 for s in (sigma, sigma_next))
        ordinary = x + (sigma_next - sigma) * slope(c_in * x, sigma)
        return iterate(x, ordinary, lambda y: x + (sigma_next - sigma) * slope(c_in_next * y, sigma))

    return step


def flow(x, sigma, sigma_next):
    """Flow: z = (1 - t) x_0 + t noise with t = sigma, and the network is the velocity: z' = z + (t' - t) v(z'_k)."""
    return iterate(x, x + (sigma_next - sigma) * network(x), lambda y: x + (sigma_next - sigma) * network(y))


def cosmos(x, sigma, sigma_next):
    """Cosmos: the network is the velocity at z = x / (1 + sigma), t = sigma / (1 + sigma); the sampler's x is x_0 + sigma
    noise.
    """
    t, t_next = sigma / (1 + sigma), sigma_next / (1 + sigma_next)

    def noise(z):
        return z + (1 - t) * network(z)  # z = (1 - t) x_0 + t noise and v = noise - x_0

    ordinary = x + (sigma_next - sigma) * noise(x * (1 - t))
    return iterate(x, ordinary, lambda y: x + (sigma_next - sigma) * noise(y * (1 - t_next)))


def unscaled_v(x, sigma, sigma_next):
    """CogVideoX in the host: the network input is x itself, and D = (x - sigma v) / sqrt(sigma^2 + 1)."""

    def slope(y):
        return (y - (y - sigma * network(y)) / (sigma**2 + 1) ** 0.5) / sigma

    return iterate(x, x + (sigma_next - sigma) * slope(x), lambda y: x + (sigma_next - sigma) * slope(y))


def eps_of_v(x, bar):
    return bar**0.5 * network(x) + (1 - bar) ** 0.5 * x


REFERENCES = {
    "EPS": variance_preserving(lambda x, bar: network(x)),
    "STABLE_CASCADE": variance_preserving(lambda x, bar: network(x)),
    "V_PREDICTION": variance_preserving(eps_of_v),
    "V_PREDICTION_CONTINUOUS": variance_preserving(eps_of_v),
    "EDM": preconditioned(0.5, 1),
    "V_PREDICTION_EDM": preconditioned(1.0, -1),
    "FLOW": flow,
    "FLUX": flow,
    "FLOW_COSMOS": cosmos,
    "V_PREDICTION_DDPM": unscaled_v,
}


def schedule(guider, steps):
    from comfy.k_diffusion.sampling import get_sigmas_karras

    sampling = guider.inner_model.model_sampling
    high = float(sampling.sigma_max)
    if high <= 1:
        return torch.linspace(high, 0, steps + 1, dtype=torch.float64)
    return get_sigmas_karras(steps, max(float(sampling.sigma_min), 0.02), min(high, 20.0)).double()


def guider_of(model_type):
    import comfy.model_base

    if model_type not in comfy.model_base.ModelType.__members__:
        pytest.skip(f"this ComfyUI has no {model_type}")
    return ToyGuider(model_type, {"sigma_data": 0.5} if model_type == "EDM" else None, network)


@pytest.mark.parametrize("model_type", REFERENCES)
def test_euler_agrees_with_the_parameterizations_own_formula(host, model_type):
    import comfy.samplers

    guider = guider_of(model_type)
    sigmas = schedule(guider, STEPS)
    settings = {"correction_steps": "all", "lambda_": LAMBDA, "max_iterations": ITERATIONS, "tolerance": 0.0}
    sampler, reports = host.run("IECSampler", sampler=comfy.samplers.sampler_object("euler"), **settings)
    result = run(sampler, guider, sigmas)
    assert not any(any(step.fell_back) for step in reports[0].steps)
    x = plain = guider.calls[0][0]
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        x = REFERENCES[model_type](x, sigma, sigma_next)
        at = torch.full((2,), sigma, dtype=torch.float64)
        plain = plain + (sigma_next - sigma) * (plain - guider.denoised(plain, at)) / sigma
    torch.testing.assert_close(result, x, rtol=1e-8, atol=1e-8)
    assert (result - plain).norm() > 1e-3 * x.norm()


@pytest.mark.parametrize("model_type", REFERENCES)
def test_next_at_one_half_is_the_hosts_heun(host, model_type):
    import comfy.samplers

    guider, stock = guider_of(model_type), guider_of(model_type)
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0, "evaluation_point": "next"}
    sampler, reports = host.run("IECSampler", sampler=comfy.samplers.sampler_object("euler"), **settings)
    sigmas = schedule(guider, 3 * STEPS)  # fine enough for the guard to leave every correction unchanged
    expected = run(comfy.samplers.sampler_object("heun"), stock, sigmas)
    torch.testing.assert_close(run(sampler, guider, sigmas), expected, rtol=1e-9, atol=1e-9)
    assert len(guider.calls) == len(stock.calls) and not reports[0].warnings


@pytest.mark.parametrize("sampling", ["eps", "v_prediction", "x0", "lcm"])
def test_a_nodes_parameterization_agrees_with_the_written_out_sampler(host, model, conditioning, advanced, relative, sampling):
    """A small network with random weights is used with several parameterizations: the images are meaningless, but the
    correction is the same rule.
    """
    read = host.run("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False)[0]
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}

    def guider(patched):
        return host.run("CFGGuider", model=patched, positive=conditioning[0], negative=conditioning[1], cfg=1.5)[0]

    plain, expected = advanced(guider(read), "euler", steps=6), advanced(guider(read), iec_euler, steps=6)
    patched, reports = host.run("IECApply", model=read, **settings)
    assert relative(advanced(guider(patched), "euler", steps=6), expected) < 1e-5 < 1e-3 < relative(plain, expected)
    assert not any(any(step.fell_back) for step in reports[0].steps)


@pytest.mark.parametrize("model_type", ["EPS", "EDM", "FLOW"])
@pytest.mark.parametrize("point", ["paper", "next"])
def test_start_and_end_at_the_ends_of_the_range(host, model_type, point):
    """The run goes from the host's sigma for infinity, or a flow's 1, down to 0: nothing is divided by zero."""
    import comfy.samplers

    guider = guider_of(model_type)
    high = 1.0 if model_type == "FLOW" else 999999999.9
    sigmas = torch.tensor([high, min(high, 14.0) * 0.9, 0.4, 0.05, 0.0], dtype=torch.float64)
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 2, "tolerance": 0.0, "evaluation_point": point}
    for name in ("euler", "dpmpp_2m", "euler_ancestral", "lcm"):
        sampler, reports = host.run("IECSampler", sampler=comfy.samplers.sampler_object(name), **settings)
        assert run(sampler, guider, sigmas).isfinite().all(), name
        assert [step.corrected for step in reports[0].steps] == [True, True, True, point == "paper"]
        assert all(step.nfe == 1 for step in reports[0].steps if not step.corrected)


def test_zero_terminal_snr_start_does_not_blow_up(host, sample, model, relative):
    """The paper's rule has no finite limit there: the guard keeps the ordinary prediction, and the report says so."""
    zsnr = host.run("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)[0]
    reports, plain = [], sample(zsnr, scheduler="simple")
    assert sample(zsnr, scheduler="simple").isfinite().all()
    corrected = sample(zsnr, reports, scheduler="simple", correction_steps="all")
    report = reports[0]
    assert report.sigmas[0] > 4000 and all(report.steps[0].fell_back)
    assert not torch.equal(corrected, plain) and relative(corrected, plain) < 1
    assert report.warnings and report.warnings[0].startswith("run: the correction of step")
    contractive = []
    assert sample(zsnr, contractive, scheduler="simple", correction_steps="all", lambda_mode="contractive").isfinite().all()
    assert max(contractive[0].steps[0].lambdas[0]) < 0.5
