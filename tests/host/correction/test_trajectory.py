"""Corrected trajectories through the real host compared with the paper's VP formula, written out here in float64.

The expected values use nothing of the pack: the network is called directly, in its own coordinates, and the schedule is built
from the betas.
"""

import math

import pytest
import torch
from pack import pack_module

STEPS = 8
CFG = 2.0
LABELS = ("face", "flag")


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def alpha_bars():
    """Return the cumulative products of 1 - beta of Stable Diffusion's schedule: sqrt(beta) linear from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def timesteps(n):
    """Return the paper's uniform DDIM timesteps (every (1000 // n)-th from 1), from high to low."""
    return list(range(1, 1000, 1000 // n))[:n][::-1] if n else []


@pytest.fixture
def empty_latent():
    """A quarter of the model's own size, which is enough for these tests."""
    return {"samples": torch.zeros(2, 3, 8, 8)}


@pytest.fixture(scope="module")
def guided_eps(model, host):
    """Return guided_eps(x_vp, t), which gives the classifier-free guided noise prediction of the network, in float64."""
    classes = _classes(host)
    labels = torch.zeros(2, len(classes))
    for i, name in enumerate(LABELS):
        labels[i, classes.index(name)] = 1
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    network = model.model.diffusion_model
    bars = alpha_bars()

    def eps(x, t):
        x2, y = torch.cat([x, x]).float(), torch.cat([labels, torch.zeros_like(labels)])
        v = network(x2, torch.full((4,), float(t)), context=y[:, None], y=y, transformer_options={}).double()
        alpha, sigma = bars[t].sqrt(), (1 - bars[t]).sqrt()
        both = alpha * v + sigma * torch.cat([x, x])  # eps from v = alpha eps - sigma x0
        return both[2:] + CFG * (both[:2] - both[2:])

    return eps


def _classes(host):
    import json

    import comfyui
    import safetensors

    with safetensors.safe_open(comfyui.ROOT / "nodes/assets/emoji32.safetensors", "pt") as file:
        return json.loads(file.metadata()["iec.classes"])


def start(seed=7):
    """Return x_T as the host makes it if the first timestep is below the last of the 1000: an empty latent with the noise of
    that first timestep.
    """
    noise = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(seed)).double()
    return (1 - alpha_bars()[timesteps(STEPS)[0]]).sqrt() * noise


def paper_trajectory(eps, corrected, lambda_, iterations, evaluation_point="paper"):
    """Run DDIM with IEC as in the paper, and return the final x_0 (where the cumulative product is 1).

    x'_0 = A_t x + B_t eps(x, t), and x'_{k+1} = (1 - lam) x'_k + lam (A_t x + B_t eps(x'_k, t)).
    """
    bars, steps = alpha_bars(), timesteps(STEPS)
    x = start()
    for i, t in enumerate(steps):
        bar, bar_next = bars[t], bars[steps[i + 1]] if i + 1 < len(steps) else torch.tensor(1.0, dtype=torch.float64)
        a = (bar_next / bar).sqrt()
        b = (1 - bar_next).sqrt() - (bar_next * (1 - bar) / bar).sqrt()
        x_next = a * x + b * eps(x, t)
        place = t
        if evaluation_point == "next":
            if i + 1 == len(steps):  # the cumulative product is 1 there: no noise to predict
                return x_next
            place = steps[i + 1]
        for _ in range(iterations if i in corrected else 0):
            x_next = (1 - lambda_) * x_next + lambda_ * (a * x + b * eps(x_next, place))
        x = x_next
    return x


CORRECTED = {"all": set(range(STEPS)), "ends:1/10": {0, STEPS - 1}}


# In the formula, damping and number of iterations are independent, and a corrected step is the same in either set of steps. So
# each damping and each number of iterations is tested with both sets, and six of their nine combinations are tested.
SETTINGS = [("all", 0.3, 1), ("all", 0.5, 2), ("all", 0.7, 3)]
SETTINGS += [("ends:1/10", 0.3, 3), ("ends:1/10", 0.5, 1), ("ends:1/10", 0.7, 2)]


@pytest.mark.parametrize(("steps", "lambda_", "iterations"), SETTINGS)
def test_agrees_with_the_paper(sample, model, guided_eps, relative, steps, lambda_, iterations):
    expected = paper_trajectory(guided_eps, CORRECTED[steps], lambda_, iterations)
    settings = {"steps": STEPS, "cfg": CFG, "correction_steps": steps, "lambda_": lambda_, "max_iterations": iterations}
    euler = sample(model, sampler_name="euler", **settings)
    assert relative(euler, expected) < 1e-4
    if lambda_ == 0.5:
        assert torch.equal(sample(model, sampler_name="ddim", **settings), euler)


@pytest.mark.parametrize(("steps", "lambda_", "iterations"), [("all", 0.5, 1), ("all", 0.3, 2), ("ends:1/10", 0.3, 3)])
def test_next_evaluation_point_agrees_with_its_formula(sample, model, guided_eps, relative, steps, lambda_, iterations):
    """This holds where the iterations converge; elsewhere, images keep their best iterate."""
    expected = paper_trajectory(guided_eps, CORRECTED[steps], lambda_, iterations, "next")
    settings = {"correction_steps": steps, "lambda_": lambda_, "max_iterations": iterations, "evaluation_point": "next"}
    assert relative(sample(model, **settings), expected) < 1e-4


@pytest.mark.fast
def test_next_evaluation_point_at_one_half_is_the_hosts_heun(sample, stock_sample, model, relative):
    corrected = sample(model, correction_steps="all", evaluation_point="next")
    assert relative(corrected, stock_sample(model, sampler_name="heun")) < 1e-5


@pytest.mark.fast
def test_a_missing_c_in_ratio_is_detected(sample, model, guided_eps, relative, monkeypatch, host):
    """A careless port gives the network the latent without the c_in ratio; it must not pass the test above."""
    expected = paper_trajectory(guided_eps, CORRECTED["all"], 0.5, 1)
    module = pack_module("nodes.host.sampling.rehearsal")
    monkeypatch.setattr(module, "input_scale", lambda sampling, sigma: 1.0)
    monkeypatch.setattr(module, "_kept", {})  # rehearsals with the right one
    assert relative(sample(model, steps=STEPS, correction_steps="all"), expected) > 1e-2


def test_corrections_differ_from_none_and_from_each_other(sample, model, relative):
    plain = sample(model)
    ends, every = sample(model, correction_steps="ends:1/10"), sample(model, correction_steps="all")
    assert min(relative(ends, plain), relative(every, plain), relative(every, ends)) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "heun", "euler_ancestral", "uni_pc"])
@pytest.mark.parametrize("settings", [{"correction_steps": "none"}, {"correction_steps": "all", "max_iterations": 0}])
def test_without_corrections_it_is_the_stock_sampler(sample, stock_sample, model, sampler, settings):
    assert torch.equal(sample(model, sampler_name=sampler, **settings), stock_sample(model, sampler_name=sampler))


def test_denoise_below_one_is_the_stock_sampler(sample, stock_sample, model):
    assert torch.equal(sample(model, denoise=0.6), stock_sample(model, denoise=0.6))


@pytest.mark.fast
def test_uncorrected_run_agrees_with_diffusers(sample, model, guided_eps, relative):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == timesteps(STEPS)
    x = start()
    for i, t in enumerate(scheduler.timesteps.tolist()):
        x = scheduler.step(guided_eps(x, t), t, x).prev_sample
        assert torch.isfinite(x).all(), i
    # diffusers steps to t - 1000 // n, which is this schedule's next timestep, and to a cumulative product of 1 at the end
    assert relative(sample(model, steps=STEPS, cfg=CFG), x) < 1e-3


@pytest.mark.fast
def test_all_three_nodes_give_the_same_latent(host, sample, model, conditioning):
    settings = {"correction_steps": "ends:1/10", "lambda_": 0.6, "max_iterations": 2, "tolerance": 0.0}
    expected = sample(model, sampler_name="ddim", **settings)

    applied = host.run("IECApply", model=model, **settings)[0]
    inputs = {"seed": 7, "steps": STEPS, "cfg": CFG, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0}
    latent = {"samples": torch.zeros(2, 3, 8, 8)}
    wiring = {"positive": conditioning[0], "negative": conditioning[1], "latent_image": latent}
    assert torch.equal(host.run("KSampler", model=applied, **inputs, **wiring)[0]["samples"], expected)

    sampler = host.run("KSamplerSelect", sampler_name="ddim")[0]
    wrapped = host.run("IECSampler", sampler=sampler, **settings)[0]
    sigmas = host.run("BasicScheduler", model=model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)[0]
    custom = host.run(
        "SamplerCustom", model=model, add_noise=True, noise_seed=7, cfg=CFG, sampler=wrapped, sigmas=sigmas, **wiring
    )
    assert torch.equal(custom[0]["samples"], expected)
    assert not hasattr(sampler.sampler_function, "corrected_by_iec")


def test_applying_it_twice_is_refused(host, sample, model):
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    with pytest.raises(ValueError, match="IEC is applied twice"):
        sample(host.run("IECApply", model=model, **settings)[0], **settings)


def test_foreign_sampler_is_refused(host):
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    with pytest.raises(ValueError, match=r"^sampler: .* object is of another kind"):
        host.run("IECSampler", sampler=object(), **settings)


COUNTED = [("none", 1), ("ends:1/10", 1), ("all", 1), ("first:3", 2), ("all", 3)]
# All of these are counted with the plain model and with all patches together; with a single patch only some of them are.
VARIANTS = [(variant, *counted) for variant in ("full", "W8A8+DeepCache") for counted in COUNTED]
VARIANTS += [(variant, *counted) for variant in ("W8A8", "W4A8", "DeepCache") for counted in (COUNTED[1], COUNTED[4])]


@pytest.mark.parametrize(("variant", "steps", "iterations"), VARIANTS)
def test_the_number_of_network_evaluations_equals_the_formula(
    host, sample, count_evaluations, model, variant, steps, iterations
):
    if "W" in variant:
        some = {"weight_bits": variant[1], "activation_bits": "8", "keep_sensitive_layers": True, "include": "output_blocks.*"}
        model = host.run("IECQuantizeModel", model=model, **some)[0]
    if "DeepCache" in variant:
        model = host.run("IECDeepCache", model=model, interval=3, branch=0)[0]
    model, calls = count_evaluations(model)
    reports = []
    latent = {"samples": torch.zeros(2, 3, 8, 8)}
    sample(model, reports, correction_steps=steps, max_iterations=iterations, latent_image=latent)
    corrected = {"none": 0, "ends:1/10": 2, "first:3": 3, "all": STEPS}[steps]
    assert len(calls) == reports[0].nfe == STEPS + iterations * corrected


def test_report_has_the_trajectory(sample, model):
    reports = []
    final = sample(model, reports, correction_steps="all", keep_latents=True)
    report = reports[0]
    assert len(report.sigmas) == len(report.latents) == STEPS + 1
    assert report.sigmas[-1] == 0 and math.isclose(
        report.sigmas[0], ((1 - alpha_bars()[timesteps(8)[0]]) / alpha_bars()[timesteps(8)[0]]).sqrt(), rel_tol=1e-5
    )
    assert torch.equal(report.latents[-1], final)
    assert report.seconds > 0


def test_correction_steps_count_the_steps_that_run(host, sample, model):
    """ddim_uniform gives seven steps when six are requested: 1000 // 6 = 166, and 1 + 6 * 166 is below 1000."""
    assert host.nodes["IECKSampler"].validate_inputs(steps=6, scheduler="ddim_uniform", correction_steps="steps:6") is True
    reports = []
    sample(model, reports, steps=6, correction_steps="steps:6")
    assert reports[0].nfe == 8
    with pytest.raises(ValueError, match="names step 7, but the run has 7 steps"):
        sample(model, steps=6, correction_steps="steps:7")
