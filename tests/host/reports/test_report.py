"""What a run reports, and how it handles a failing network."""

import json

import pytest
import torch
from toy import ToyGuider, run

SETTINGS = {"correction_steps": "steps:0,2", "lambda_": 0.4, "max_iterations": 3, "tolerance": 0.0}


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.mark.fast
def test_report_agrees_with_the_iteration(host):
    """On a linear network, every number of the report is compared with the network's own inputs and the closed form."""
    import comfy.samplers

    guider = ToyGuider("V_PREDICTION")
    sigmas = torch.tensor([6.0, 4.0, 2.5, 1.0, 0.0], dtype=torch.float64)
    sampler, reports = host.run("IECSampler", sampler=comfy.samplers.sampler_object("euler"), **SETTINGS)
    run(sampler, guider, sigmas)
    text, _ = host.run("IECReport", report=reports, after={"samples": torch.zeros(1)})
    (told,) = json.loads(text)
    assert (told["nfe"], told["correction"]) == (10, "steps:0,2 lambda 0.4 K 3")
    steps = [torch.tensor(told["steps"][number]["residuals"]) for number in (0, 2)]
    assert told["moved"] == pytest.approx(0.4 * sum(residuals.sum(0).mean().item() for residuals in steps), rel=0.01)
    assert [f"about {told['moved']:.0%}" in warning for warning in told["warnings"]] == [True]
    assert [step["sigma"] for step in told["steps"]] == sigmas[:-1].tolist()
    assert [step["sigma_next"] for step in told["steps"]] == sigmas[1:].tolist()
    assert [step["corrected"] for step in told["steps"]] == [True, False, True, False]
    assert [step["nfe"] for step in told["steps"]] == [4, 1, 4, 1]
    assert sum(step["seconds"] for step in told["steps"]) == pytest.approx(told["seconds"])
    assert all(step["seconds"] > 0 for step in told["steps"])
    for number, begin in ((0, 0), (2, 5)):
        step, inputs = told["steps"][number], [call[0] for call in guider.calls[begin + 1 : begin + 4]]
        sigma, sigma_next = sigmas[number].item(), sigmas[number + 1].item()
        p, _ = guider.line(sigma)
        scale = guider.input_scale(sigma_next) / guider.input_scale(sigma)
        rate = 1 - 0.4 - 0.4 * (1 - p) * scale * (1 - sigma_next / sigma)
        assert step["lambdas"] == [[0.4, 0.4]] * 3 and step["fell_back"] == [False, False]
        assert torch.allclose(torch.tensor(step["contraction"]), torch.tensor(abs(rate)).expand(3, 2), atol=1e-6)
        for found, here, then in zip(step["residuals"], inputs, inputs[1:]):  # x'_{k+1} - x'_k = lam (T(x'_k) - x'_k)
            expected = ((then - here).flatten(1).norm(dim=1) / 0.4 / here.flatten(1).norm(dim=1)).tolist()
            assert found == pytest.approx(expected, rel=1e-5)
    for step in (told["steps"][1], told["steps"][3]):
        assert step["lambdas"] == step["residuals"] == step["contraction"] == step["fell_back"] == []


def test_plot_has_a_picture_for_every_run(host, sample, model):
    reports = []
    sample(model, reports, steps=3, correction_steps="all", max_iterations=2)
    sample(model, reports, steps=3)
    _, plot = host.run("IECReport", report=reports)
    assert plot.ndim == 4 and plot.shape[0] == 2 and plot.shape[-1] == 3
    assert 0 <= plot.min() < plot.max() <= 1 and not torch.equal(plot[0], plot[1])


def test_report_of_no_run_is_refused(host, model):
    reports = host.run("IECApply", model=model, **SETTINGS)[1]
    later = {"samples": torch.zeros(1, 3, 32, 32)}
    with pytest.raises(ValueError, match=r"^report: it has no run in this prompt"):
        host.run("IECReport", report=reports, after=later)
    reports.begin()
    with pytest.raises(ValueError, match=r"^report: its runs have not been sampled yet"):
        host.run("IECReport", report=reports)


@pytest.fixture
def failing(model):
    """Return failing(where, value), which gives the model with a failing network.

    The network returns `value` in one pixel of the first image at the evaluations (step, iteration) in `where`.
    """
    from comfy.patcher_extension import WrappersMP

    def patched(where, value):
        def forward(executor, x, timesteps, *args, **kwargs):
            out = executor(x, timesteps, *args, **kwargs)
            told = args[3]["iec"]
            if (told["step"], told["iteration"]) in where:
                out = out.clone()
                out[0, 0, 0, 0] = value
            return out

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "failing", forward)
        return clone

    return patched


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", ["none", "all"])
def test_network_that_is_not_finite_is_reported_with_its_step(sample, failing, value, steps):
    with pytest.raises(RuntimeError, match=r"^model: in step 2 of 4, numbered from 0 \(sigma 0\.\d+\), .* NaN or infinity"):
        sample(failing({(2, 0)}, value), steps=4, correction_steps=steps)


@pytest.mark.parametrize("iterations", [1, 2])
def test_correction_that_is_not_finite_keeps_the_prediction(sample, failing, model, relative, iterations):
    reports = []
    result = sample(failing({(2, 1)}, float("nan")), reports, steps=4, correction_steps="all", max_iterations=iterations)
    assert result.isfinite().all()
    assert [step.fell_back for step in reports[0].steps] == [[step == 2, False] for step in range(4)]
    assert reports[0].steps[2].residuals[0][0] is None and reports[0].steps[2].contraction[0][0] is None
    expected = sample(model, steps=4, correction_steps="steps:0,1,3", max_iterations=iterations)
    untouched = sample(model, steps=4, correction_steps="all", max_iterations=iterations)
    assert relative(result[0], expected[0]) < 1e-5 < relative(expected[0], untouched[0])
    assert relative(result[1], untouched[1]) < 1e-5
    assert "step 2 did not converge for image 0 of the batch (numbered from 0)" in reports[0].warnings[0]


@pytest.mark.parametrize(("mode", "lambda_"), [("contractive", 0.9), ("anderson", 0.5)])
def test_modes_leave_less_of_the_residual_than_fixed_damping(sample, model, mode, lambda_):
    latent = {"samples": torch.zeros(2, 3, 8, 8)}

    def last_residuals(**settings):
        reports = []
        sample(model, reports, steps=6, correction_steps="all", max_iterations=4, latent_image=latent, **settings)
        return torch.tensor([step.residuals[-1] for step in reports[0].steps]).mean().item()

    assert last_residuals(lambda_mode=mode, lambda_=lambda_) < 0.7 * last_residuals(lambda_=0.5)


class Unread(ToyGuider):
    """A guider that does not itself read anything from the device."""

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.calls.append(1)
        return self.denoised(x, sigma)


def test_loop_reads_nothing_back_at_one_iteration(host):
    """On torch's meta device nothing can be read: with one iteration a run makes all its evaluations before it fails; with two
    it fails after the first correction.

    The schedule stays on the CPU, which dpmpp_2m supports.
    """
    import comfy.samplers

    def evaluations(iterations):
        guider = Unread("EPS")
        settings = {**SETTINGS, "correction_steps": "all", "max_iterations": iterations}
        sampler, _ = host.run("IECSampler", sampler=comfy.samplers.sampler_object("dpmpp_2m"), **settings)
        noise = torch.empty(2, 1, 4, 4, device="meta")
        sigmas = torch.tensor([6.0, 4.0, 2.5, 1.0, 0.0])
        with pytest.raises(RuntimeError, match="meta"):
            sampler.sample(guider, sigmas, {"model_options": {}, "seed": 1}, None, noise, noise.clone(), None, True)
        return len(guider.calls)

    assert evaluations(1) == 8
    assert evaluations(2) == 2  # the first step's own and one correction, then it reads whether to continue


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "lcm"])
@pytest.mark.parametrize("masked", [False, True])
def test_corrections_read_nothing_more_from_the_device(host, name, masked):
    """The number of scalars read while the sampler runs is the same with every step corrected as with none."""
    import comfy.samplers
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(steps):
        guider = Unread("EPS")
        guider.inner_model.scale_latent_inpaint = lambda latent_image, **_: latent_image
        settings = {**SETTINGS, "correction_steps": steps, "max_iterations": 1}
        sampler, _ = host.run("IECSampler", sampler=comfy.samplers.sampler_object(name), **settings)
        noise, mask = torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4) if masked else None
        sigmas = torch.tensor([6.0, 4.0, 2.5, 1.0, 0.0])
        for _ in range(2):  # the first one is rehearsed on the CPU
            guider.calls.clear()
            with Reads() as counted:
                sampler.sample(guider, sigmas, {"model_options": {}, "seed": 1}, None, noise, noise.clone(), mask, True)
        return counted.count, len(guider.calls)

    with torch.inference_mode(False):  # in inference mode reads are not dispatched to modes
        (none, evaluations), (every, corrected) = reads("none"), reads("all")
    assert corrected == evaluations + 4 and every == none > 0


def test_a_log_without_prompts_keeps_its_last_runs(host):
    """A script that samples continuously has no prompts, whose end would drop the earlier runs."""
    import comfy.samplers

    log = host.run("IECSampler", sampler=comfy.samplers.sampler_object("euler"), **SETTINGS)[1]
    for _ in range(250):
        log.begin()
    assert len(log) <= 100
    assert [report.label for report in log[-2:]] == ["run 249", "run 250"]


class Failing(ToyGuider):
    """A guider that predicts `value` from its `begin`-th evaluation on."""

    def __init__(self, begin, value=float("nan")):
        super().__init__("EPS")
        self._begin, self._value = begin, value

    def denoised(self, x, sigma):
        return super().denoised(x, sigma) * (self._value if len(self.calls) > self._begin else 1.0)


NONE, AT_ONE = ({**SETTINGS, "correction_steps": steps} for steps in ("none", "steps:1"))


@pytest.mark.parametrize("settings", [NONE, AT_ONE])
def test_nan_from_a_zero_width_step_is_reported_for_sigmas(host, settings):
    """dpmpp_2m divides by the width of its last step in log sigma; the stock run is NaN too."""
    import comfy.samplers

    sigmas = torch.tensor([14.0, 7.0, 7.0, 3.0, 1.0, 0.0])
    stock, guider = comfy.samplers.sampler_object("dpmpp_2m"), ToyGuider("EPS")
    assert run(stock, ToyGuider("EPS"), sigmas).isnan().all()
    with pytest.raises(RuntimeError, match=r"^sigmas: step 1, numbered from 0, leads from 7 to 7, where dpmpp_2m produces"):
        run(host.run("IECSampler", sampler=stock, **settings)[0], guider, sigmas)
    assert all(guider.denoised(torch.ones(1, 1), torch.ones(1)).isfinite())


def test_nan_errors_name_the_input_that_caused_them(host):
    import comfy.samplers

    def sample_dividing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "denoised": denoised})
            x = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i] / (0 if i == 1 else 1)
        return x

    euler, own = comfy.samplers.sampler_object("euler"), comfy.samplers.KSAMPLER(sample_dividing)
    sigmas = torch.tensor([6.0, 4.0, 2.5, 1.0, 0.0])
    for settings in (NONE, {**SETTINGS, "correction_steps": "steps:0"}):
        with pytest.raises(RuntimeError, match="the network returned NaN or infinity") as caught:
            run(host.run("IECSampler", sampler=euler, **settings)[0], Failing(2), sigmas)
        assert str(caught.value).startswith("model:")
        with pytest.raises(RuntimeError, match=r"^sampler:.* dividing itself produced NaN or infinity from finite pred"):
            run(host.run("IECSampler", sampler=own, **settings)[0], ToyGuider("EPS"), sigmas)
        unguided = Failing(0)
        unguided.cfg = float("nan")
        with pytest.raises(RuntimeError, match=r"^cfg: nan is not a finite number"):
            run(host.run("IECSampler", sampler=euler, **settings)[0], unguided, sigmas)
        with pytest.raises((RuntimeError, ValueError), match=r"^sigmas: the schedule contains NaN or infinity"):
            run(host.run("IECSampler", sampler=euler, **settings)[0], ToyGuider("EPS"), sigmas.clone().fill_(float("nan")))


def test_a_schedule_that_continues_after_zero_is_reported_for_sigmas(host):
    import comfy.samplers

    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([6.0, 2.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"^sigmas: .* in step 2, numbered from 0, where no noise is left"):
        run(host.run("IECSampler", sampler=sampler, **AT_ONE)[0], ToyGuider("EPS"), sigmas)
    with pytest.raises(RuntimeError, match=r"^sigmas: .* after its first 0, in step 2, .* also without IEC"):
        run(host.run("IECSampler", sampler=sampler, **NONE)[0], ToyGuider("EPS"), sigmas)
