"""`evaluation_point: ahead`: a correction's evaluation is also the next step's own prediction.

The results are compared with the predict-evaluate-correct form of the trapezoidal rule, written out here in float64. They are
also compared with the stock sampler's own run, which has the same evaluations in the same order.
"""

import itertools
import math

import pytest
import torch
from pack import pack_module
from toy import Listener, ToyGuider, run

AHEAD = {"lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0, "evaluation_point": "ahead"}
KNOWN_ENDS = ("euler", "ddim", "euler_ancestral", "ddpm", "lcm")


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def bent(x):
    return torch.sin(1.3 * x) / 2 + 0.2 * x


def sigmas_of(steps, low=0.05, high=3.0):
    from comfy.k_diffusion.sampling import get_sigmas_karras

    return get_sigmas_karras(steps, low, high).double()


@pytest.fixture
def ahead(host):
    """Return ahead(name_or_sampler, ...), which gives (the SAMPLER, its reports), with every step corrected ahead."""
    import comfy.samplers

    def make(sampler, correction_steps="all", **settings):
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        return host.run("IECSampler", sampler=sampler, correction_steps=correction_steps, **{**AHEAD, **settings})

    return make


@pytest.fixture
def undamped(host):
    """Return undamped(name), which gives the SAMPLER with each step evaluated ahead and corrected with a lambda of 0.

    Users cannot set a lambda of 0.
    """
    import comfy.samplers

    settings = pack_module("iec_core.correction.iteration").CorrectionSettings
    steps = pack_module("iec_core.correction.correction_steps").parse_correction_steps("all")
    reports = pack_module("iec_core.run_report").RunReport
    wrap = pack_module("nodes.host.correction.sampler").with_correction

    def make(name, iterations=1):
        chosen = settings(steps, lambda_=0.0, max_iterations=iterations, tolerance=0.0, evaluation_point="ahead")
        return wrap(comfy.samplers.sampler_object(name), chosen, lambda: reports("run", "ahead"))

    return make


def predict_evaluate_correct(guider, x, sigmas, corrected, lambda_, iterations):
    """Run Euler with its steps `corrected`, in terms of eps = (x - D) / sigma; the kept D is the next step's."""

    def denoised(x, sigma):
        return guider.denoised(x, torch.full((len(x),), sigma, dtype=torch.float64))

    ahead = None
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        own = denoised(x, sigma) if ahead is None else ahead
        eps = (x - own) / sigma
        x_next, ahead = x + (sigma_next - sigma) * eps, None
        for _ in range(iterations if step in corrected and sigma_next > 0 else 0):
            ahead = denoised(x_next, sigma_next)
            x_next = (1 - lambda_) * x_next + lambda_ * (x + (sigma_next - sigma) * (x_next - ahead) / sigma_next)
        x = x_next
    return x


@pytest.mark.fast
@pytest.mark.parametrize("model_type", ["EPS", "V_PREDICTION", "STABLE_CASCADE", "FLOW"])
@pytest.mark.parametrize(("steps", "corrected"), [("all", range(9)), ("first:1/5", (0, 1)), ("steps:1,4,8", (1, 4, 8))])
@pytest.mark.parametrize(("lambda_", "iterations"), [(0.5, 1), (0.3, 1), (0.5, 2), (0.4, 3)])
def test_agrees_with_the_formula(ahead, model_type, steps, corrected, lambda_, iterations):
    guider = ToyGuider(model_type, network=bent)
    sigmas = sigmas_of(9) if model_type != "FLOW" else torch.linspace(1.0, 0.0, 10, dtype=torch.float64)
    sampler, reports = ahead("euler", steps, lambda_=lambda_, max_iterations=iterations)
    result = run(sampler, guider, sigmas)
    start = guider.calls[0][0]
    expected = predict_evaluate_correct(ToyGuider(model_type, network=bent), start, sigmas, corrected, lambda_, iterations)
    assert not any(any(step.fell_back) for step in reports[0].steps)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    ahead_steps = [step for step in corrected if step < 8]
    assert reports[0].nfe == len(guider.calls) == 9 + (iterations - 1) * len(ahead_steps)
    assert [step.step for step in reports[0].steps if step.corrected] == list(ahead_steps)


@pytest.mark.parametrize(("name", "order"), [("none", 1), ("all", 2)])
def test_is_of_second_order(ahead, name, order):
    """Halving the step widths halves the stock run's error and quarters the corrected run's, for as many evaluations."""
    errors = []
    for steps in (20, 40, 80, 1000):
        guider = ToyGuider("EPS", network=bent)
        sigmas = torch.linspace(3.0, 0.5, steps + 1, dtype=torch.float64)
        result = run(ahead("euler", name if steps < 1000 else "all")[0], guider, sigmas)
        assert len(guider.calls) == steps
        errors.append(result)
    exact = errors.pop()
    errors = [(result - exact).norm().item() for result in errors]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", KNOWN_ENDS)
@pytest.mark.parametrize("model_type", ["EPS", "FLOW"])
def test_evaluations_are_the_stock_runs_in_its_order(undamped, name, model_type):
    """With lambda 0 the evaluations are equal bit for bit if the sampler takes Euler's step, and up to rounding if it adds
    noise.
    """
    import comfy.samplers

    sigmas = sigmas_of(9) if model_type == "EPS" else torch.linspace(1.0, 0.0, 10, dtype=torch.float64)
    stock, guider = (ToyGuider(model_type, network=bent) for _ in range(2))
    expected = run(comfy.samplers.sampler_object(name), stock, sigmas)
    result = run(undamped(name), guider, sigmas)
    assert [call[1] for call in guider.calls] == [call[1] for call in stock.calls]
    assert all(call[2] == 0 for call in guider.calls)  # no evaluation says that it is a correction
    same = torch.equal if name in ("euler", "ddim") else lambda x, y: torch.allclose(x, y, rtol=1e-5, atol=1e-5)
    assert all(same(call[0], other[0]) for call, other in zip(guider.calls, stock.calls))
    assert same(result, expected)


@pytest.mark.fast
@pytest.mark.parametrize("cache", [None, {"interval": 2, "branch": 0}, {"interval": 3, "branch": 1, "forecast": "linear"}])
def test_with_lambda_zero_a_run_equals_the_stock_run(host, undamped, advanced, model, conditioning, cache):
    """The small random U-Net runs with guidance, without a cache and with two caches, which are given the same steps as in the
    stock run.
    """
    cached = model if cache is None else host.run("IECDeepCache", model=model, **cache)[0]
    guider = host.run("CFGGuider", model=cached, positive=conditioning[0], negative=conditioning[1], cfg=2.0)[0]
    assert torch.equal(advanced(guider, undamped("euler"), steps=7), advanced(guider, "euler", steps=7))
    half = host.run("CFGGuider", model=cached, positive=conditioning[0], negative=conditioning[1], cfg=2.0)[0]
    assert torch.equal(advanced(half, undamped("ddim"), steps=7, denoise=0.5), advanced(half, "ddim", steps=7, denoise=0.5))


def test_ahead_evaluations_have_step_iteration_and_sigma(ahead):
    guider, sigmas = Listener("EPS", network=bent), sigmas_of(5)
    run(ahead("euler", max_iterations=2)[0], guider, sigmas)
    at = sigmas.tolist()
    expected = [(0, 0, at[0])] + [(step, iteration, at[step]) for step in range(1, 5) for iteration in (0, 1)]
    assert [one[:2] for one in guider.told] == [one[:2] for one in expected]
    assert all(one[2] == one[3] == pytest.approx(other[2]) for one, other in zip(guider.told, expected))


def test_a_run_that_ends_above_zero_has_no_evaluation_past_its_end(ahead):
    guider = ToyGuider("EPS", network=bent)
    sampler, reports = ahead("euler")
    run(sampler, guider, sigmas_of(9)[:5])
    assert len(guider.calls) == 4 and [step.corrected for step in reports[0].steps] == [True, True, True, False]
    assert [step.nfe for step in reports[0].steps] == [2, 1, 1, 0]


def test_a_latent_evaluated_ahead_includes_the_steps_noise(ahead):
    """euler_ancestral: x' and the latent from which the sampler continues have the same noise, so that only D differs.

    The corrected D is the mean of the predictions before and after the step.
    """
    guider, seen = ToyGuider("V_PREDICTION", network=bent), []
    sampler, _ = ahead("euler_ancestral")
    sigmas = sigmas_of(6)
    taken = []
    run(sampler, guider, sigmas, callback=lambda step, denoised, x, total: taken.append((x.clone(), denoised.clone())))
    own = [guider.denoised(x, torch.full((2,), sigma, dtype=torch.float64)) for x, sigma, _ in guider.calls]
    for step in range(4):
        sigma, sigma_next = sigmas[step].item(), sigmas[step + 1].item()
        up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
        down = (sigma_next**2 - up**2) ** 0.5
        corrected, x_next = taken[step][1], taken[step + 1][0]
        predicted = x_next + (1 - down / sigma) * (own[step] - corrected)
        torch.testing.assert_close(guider.calls[step + 1][0], predicted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(corrected, (own[step] + own[step + 1]) / 2, rtol=1e-5, atol=1e-5)
        seen.append((own[step] - corrected).abs().max().item())
    assert min(seen) > 1e-3


def test_an_item_that_falls_back_equals_the_stock_run(ahead):
    """An image whose correction would not contract keeps its prediction; the evaluation ahead is the next step's prediction."""
    import comfy.samplers

    def steep(x):
        return torch.where(torch.arange(len(x)).reshape(-1, 1, 1, 1) == 1, -30 * x, bent(x))

    sigmas = sigmas_of(6, low=1.0, high=3.0)[:-1]
    stock, guider = ToyGuider("V_PREDICTION", network=steep), ToyGuider("V_PREDICTION", network=steep)
    expected = run(comfy.samplers.sampler_object("euler"), stock, sigmas)
    sampler, reports = ahead("euler")
    result = run(sampler, guider, sigmas)
    assert [step.fell_back for step in reports[0].steps if step.corrected] == 4 * [[False, True]]
    assert torch.equal(result[1], expected[1]) and not torch.equal(result[0], expected[0])


def test_nan_evaluated_ahead_is_reported_for_the_step_it_belongs_to(ahead):
    class Broken(ToyGuider):
        def denoised(self, x, sigma):
            return super().denoised(x, sigma) * (math.nan if len(self.calls) == 4 else 1.0)

    with pytest.raises(RuntimeError, match=r"^model: in step 3 of 6, numbered from 0 \(sigma "):
        run(ahead("euler")[0], Broken("EPS", network=bent), sigmas_of(6))


@pytest.mark.parametrize("shape", ["hard", "soft"])
def test_in_painting_leaves_the_outside_of_the_mask_unchanged(host, model, conditioning, stock_sample, shape):
    image = host.common_ksampler(
        model, 1, 4, 2.0, "euler", "normal", *conditioning, {"samples": torch.zeros(2, 3, 32, 32)}, 1.0
    )[0]["samples"]
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1.0 if shape == "hard" else torch.linspace(0.1, 1.0, 16)
    latent = {"samples": image, "noise_mask": mask}
    inputs = {
        "model": model, "seed": 3, "steps": 8, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": conditioning[0], "negative": conditioning[1], "latent_image": latent, "denoise": 1.0,
    }  # fmt: skip
    latents, reports = host.run("IECKSampler", **inputs, correction_steps="all", **AHEAD)
    stock = host.common_ksampler(model, 3, 8, 2.0, "euler", "normal", *conditioning, latent, 1.0)[0]["samples"]
    assert torch.equal(latents["samples"][..., :16], stock[..., :16])
    assert (latents["samples"][..., 16:] - stock[..., 16:]).norm() > 1e-3 * stock.norm()
    assert reports[0].nfe == 8


def why_not(host, name):
    rehearsal = pack_module("nodes.host.sampling.rehearsal")
    try:
        return rehearsal.rehearse_by_name(
            name, pack_module("nodes.host.correction.correctable").SOME_SIGMAS
        ).why_no_end_is_known()
    except rehearsal.CannotRehearse:
        return "cannot be rehearsed"


@pytest.mark.filterwarnings("ignore:Should have t")
def test_which_samplers_support_ahead(host):
    import comfy.samplers

    reasons = {name: why_not(host, name) for name in comfy.samplers.KSampler.SAMPLERS}
    assert {name for name, reason in reasons.items() if reason is None} == set(KNOWN_ENDS)
    several = (
        "heun",
        "heunpp2",
        "dpm_2",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "dpm_fast",
        "seeds_2",
        "seeds_3",
    )
    assert {reasons[name] for name in several} == {"evaluates more than once per step"}
    history = ("lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ipndm", "deis", "res_multistep", "er_sde", "sa_solver")
    assert {reasons[name] for name in history if name in reasons} == {"also uses predictions of earlier steps"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "reason"), [("heun", "evaluates more than once"), ("dpmpp_2m", "also uses predictions of earlier")]
)
def test_known_unsupported_samplers_are_refused_by_name(host, ahead, name, reason):
    checked = host.nodes["IECKSampler"].validate_inputs(
        steps=4, sampler_name=name, scheduler="karras", correction_steps="all", evaluation_point="ahead"
    )
    assert checked.startswith(f"sampler_name: {name} {reason}") and "evaluation_point next" in checked
    with pytest.raises(ValueError, match=f"^sampler: {name} {reason}"):
        ahead(name)
    assert ahead(name, "none") and ahead(name, max_iterations=0)
    fine = {"steps": 4, "sampler_name": name, "scheduler": "karras", "evaluation_point": "ahead"}
    assert host.nodes["IECKSampler"].validate_inputs(**fine, correction_steps="none") is True
    assert host.nodes["IECKSampler"].validate_inputs(**{**fine, "sampler_name": "ddim"}, correction_steps="all") is True


def test_unsupported_samplers_are_detected_by_their_steps(ahead):
    """Samplers are refused that add noise before a step, draw their own noise, or evaluate a latent at other sigmas than the
    steps'.
    """
    import comfy.samplers

    def sample_noisy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x = denoised + sigmas[i + 1] * torch.ones_like(x)
        return x

    def sample_daemon(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, 0.8 * sigmas[i] * x.new_ones([len(x)]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x = denoised + sigmas[i + 1] / sigmas[i] * (x - denoised)
        return x

    churned = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    own = [comfy.samplers.KSAMPLER(function) for function in (sample_noisy, sample_daemon)]
    for sampler in (churned, *own):
        guider = ToyGuider("EPS", network=bent)
        with (
            torch.random.fork_rng(devices=[]),
            pytest.raises(ValueError, match=r"^sampler: \w+ .*, but evaluation_point ahead needs a sampler"),
        ):
            run(ahead(sampler)[0], guider, sigmas_of(6))
        assert not guider.calls
