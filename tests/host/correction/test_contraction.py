"""IECContractionProbe in the host: its norms compared with exact ones, its side effects, and `lambdas` of the samplers."""

import itertools
import json

import pytest
import torch
import transformer_families
from torch.overrides import _get_current_function_mode_stack

LAMBDAS = [f"{number / 10:g}" for number in range(1, 10)]
MIXING = torch.tensor([[0.4, 0.9, 0.0], [0.0, 0.3, -0.7], [0.2, 0.0, 0.5]], dtype=torch.float64)  # not a normal matrix
SHARES = 1.0, -0.6  # factor on MIXING, per image


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def probe(host, conditioning):
    """Return probe(model, **settings), which gives (the parsed JSON, lambdas, plot) of a run on two images of 8 x 8."""

    def run(model, **settings):
        inputs = {
            "seed": 3, "steps": 3, "cfg": 2.0, "scheduler": "karras", "positive": conditioning[0],
            "negative": conditioning[1], "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}, **settings,
        }  # fmt: skip
        plot, lambdas, text = host.run("IECContractionProbe", model=model, **inputs)
        return json.loads(text), lambdas, plot

    return run


@pytest.fixture
def quantized(host, model):
    return host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="8", keep_sensitive_layers=True)[0]


def linear(model):
    """Return a clone of the MODEL whose denoised prediction mixes the channels of image b by SHARES[b] * MIXING, at every
    sigma.
    """

    def denoise(apply_model, given):
        shares = torch.tensor(SHARES).repeat_interleave(len(given["input"]) // 2)[:, None, None, None]
        return shares * torch.einsum("oc,bchw->bohw", MIXING.float(), given["input"])

    model = model.clone()
    model.set_model_unet_function_wrapper(denoise)
    return model


def norm(matrix):
    return torch.linalg.svd(matrix)[1][0].item()


@pytest.mark.parametrize("kind", ["variance preserving", "flow"])
def test_norms_of_a_linear_model_are_exact(host, model, probe, kind):
    """u = x / sqrt(sigma^2 + 1) for variance preserving, u = x for flow; written out with the paper's alpha bar where it is
    defined.
    """
    if kind == "flow":
        model = host.run("ModelSamplingSD3", model=model, shift=1.0)[0]
    found, lambdas, _ = probe(linear(model), cfg=1.0, steps=4, tolerance=1e-3)
    assert [step["step"] for step in found["steps"]] == [0, 1, 2, 3] and found["warnings"] == []
    identity = torch.eye(3, dtype=torch.float64)
    for step in found["steps"]:
        sigma, sigma_next = step["sigma"], step["sigma_next"]
        a, b, scale = 1.0, sigma_next - sigma, 1.0
        if kind == "variance preserving":
            bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
            a = (bar_next / bar) ** 0.5
            b, scale = (1 - bar_next) ** 0.5 - (bar_next * (1 - bar) / bar) ** 0.5, bar**0.5
        assert step["a"] == pytest.approx(a, rel=1e-5) and step["b"] == pytest.approx(b, rel=1e-5)
        for image, share in enumerate(SHARES):
            jacobian = (identity - share * MIXING) / (scale * sigma)  # of eps(u) = (u / scale - D(u / scale)) / sigma
            assert step["growth"][image] == pytest.approx(norm(a * identity + b * jacobian), rel=1e-3)
            assert step["true_growth"][image] == pytest.approx(norm(a * identity + b * jacobian), rel=2e-3)
            for name in LAMBDAS:
                expected = norm((1 - float(name)) * identity + float(name) * b * jacobian)
                assert step["contraction"][name][image] == pytest.approx(expected, rel=1e-3)
                assert step["true_contraction"][name][image] <= expected * (1 + 1e-3)
        worst = {name: max(step["contraction"][name]) for name in LAMBDAS}
        assert step["lambda"] == float(min(worst, key=worst.get))
        assert step["contraction_max"] == worst and step["growth_max"] == max(step["growth"])
    assert lambdas == ", ".join(f"{step['lambda']:g}" for step in found["steps"]) == found["lambdas"]


def full_jacobians(model, conditioning, sigmas, step, seed, size):
    """Return (A + B J at u, J at u', B) of a step over a MODEL, for one image: [n, n] in float64.

    Each number is computed by central differences over the sampler's own steps.
    """
    import comfy.sample
    import comfy.samplers

    found = {}

    def differences(function, u, reach=0.02):
        unit = torch.eye(u.numel(), dtype=u.dtype).reshape(-1, *u.shape[1:])
        rows = [(function(u + reach * part) - function(u - reach * part)) / (2 * reach) for part in unit.split(64)]
        return torch.cat(rows).flatten(1).double().t()

    def sampler(denoise, x, sigmas, extra_args=None, **_):
        def euler(x, sigma, sigma_next):
            return x + (sigma_next - sigma) * (x - denoise(x, sigma.expand(len(x)), **extra_args)) / sigma

        pairs = list(itertools.pairwise(sigmas))
        for pair in pairs[:step]:
            x = euler(x, *pair)
        sigma, sigma_next = pairs[step]
        c, c_next = (1 + sigma**2) ** -0.5, (1 + sigma_next**2) ** -0.5

        def eps(u):
            return (u / c - denoise(u / c, sigma.expand(len(u)), **extra_args)) / sigma

        found["step"] = differences(lambda u: c_next * euler(u / c, sigma, sigma_next), c * x)
        found["eps"] = differences(eps, c_next * euler(x, sigma, sigma_next))
        found["b"] = (c_next * (sigma_next - sigma)).item()
        return x

    latent = torch.zeros(1, 3, size, size)
    comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(latent, seed), 2.0, comfy.samplers.KSAMPLER(sampler), sigmas, *conditioning, latent,
        disable_pbar=True, seed=seed,
    )  # fmt: skip
    return found["step"], found["eps"], found["b"]


def test_norms_of_a_network_equal_those_of_its_full_jacobian(host, model, probe):
    import comfy.samplers

    labels = host.run("IECClassLabel", labels="face")[0], host.run("IECClassLabel", labels="none")[0]
    latent = {"samples": torch.zeros(1, 3, 4, 4)}  # the Jacobian is of 48 x 48 numbers
    more = {"positive": labels[0], "negative": labels[1], "latent_image": latent, "tolerance": 1e-3, "iterations": 100}
    found, *_ = probe(model, every=2, **more)
    assert found["jvp"] == "forward" and [step["step"] for step in found["steps"]] == [0, 2]
    sigmas = comfy.samplers.KSampler(model, 3, model.load_device, "euler", "karras", 1.0).sigmas
    step = found["steps"][1]
    growth, jacobian, b = full_jacobians(model, labels, sigmas, 2, 3, 4)
    assert step["b"] == pytest.approx(b, rel=1e-5)
    assert step["growth"][0] == pytest.approx(norm(growth), rel=5e-3)
    identity = torch.eye(len(jacobian), dtype=torch.float64)
    for name in ("0.1", "0.5", "0.9"):
        expected = norm((1 - float(name)) * identity + float(name) * b * jacobian)
        assert step["contraction"][name][0] == pytest.approx(expected, rel=5e-3)
    assert step["true_growth"][0] <= step["growth"][0] * 1.1


def test_a_transformer_whose_blocks_change_tensors_in_place(host, probe):
    """The network is the host's Flux, with random weights."""
    flux = transformer_families.build("Flux")
    labels = [transformer_families.conditioning("Flux", seed) for seed in (1, 2)]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    settings = {"positive": labels[0], "negative": labels[1], "latent_image": latent, "scheduler": "simple", "steps": 2}
    found, *_ = probe(flux, **settings, perturbation=1e-3)
    assert found["jvp"] in ("forward", "double") and found["warnings"] == []
    for step in found["steps"]:
        assert step["a"] == 1
        assert step["true_growth"][0] == pytest.approx(step["growth"][0], rel=0.05)


def test_quantized_models_are_measured_as_if_rounding_had_slope_one(model, quantized, probe):
    few = {"steps": 2, "iterations": 10, "tolerance": 0.05}
    full, *_ = probe(model, **few)
    rounded, *_ = probe(quantized, **few)
    assert (full["quantization"], rounded["quantization"]) == ("not quantized", "W8A8")
    for one, other in zip(full["steps"], rounded["steps"]):
        assert other["growth"] == pytest.approx(one["growth"], rel=0.1)
        assert other["contraction"]["0.5"] == pytest.approx(one["contraction"]["0.5"], rel=0.1)
    gap = {name: found["steps"][1]["true_growth_gap"] for name, found in (("full", gaps(full)), ("rounded", gaps(rounded)))}
    assert gap["rounded"] > 2 * gap["full"]  # only the estimate shows the true map between its roundings


def gaps(found):
    for step in found["steps"]:
        step["true_growth_gap"] = max(abs(true / norm - 1) for true, norm in zip(step["true_growth"], step["growth"]))
    return found


def test_straight_through_layers_have_the_same_output_and_their_weights_derivative(quantized):
    layers = {name: one for name, one in quantized.model.diffusion_model.named_modules() if hasattr(one, "packing")}
    kinds = {}
    for layer in layers.values():
        kinds.setdefault((type(layer).__name__, getattr(layer, "kernel_size", None), getattr(layer, "stride", None)), layer)
    assert len(kinds) >= 3
    with torch.inference_mode(False):
        for kind, layer in kinds.items():
            shape = (2, 5, layer.in_features) if kind[0] == "QuantizedLinear" else (2, layer.in_channels, 8, 8)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                expected = layer(x).clone()
                packed = layer.weight.clone()
            assert not layer.passes_gradients
            weight = layer.packing.dequantize(packed.to(torch.int8))
            layer.passes_gradients = True
            try:
                with torch.enable_grad():
                    x.requires_grad_()
                    got = layer._compute_straight(x, torch.tensor(packed.tolist(), dtype=torch.int8), torch.zeros(len(weight)))
                    (slope,) = torch.autograd.grad(got.sum(), x)
                    plain = torch.nn.functional.linear(x, weight.clone()) if x.ndim == 3 else None
                    if plain is not None:
                        torch.testing.assert_close(slope, torch.autograd.grad(plain.sum(), x)[0])
                    layer.input_scale = x.detach().abs().max() / 127 / 4
                    clipped = layer._compute_straight(x, torch.tensor(packed.tolist(), dtype=torch.int8), None)
                    (inside,) = torch.autograd.grad(clipped.sum(), x)
                    outside = x.detach().abs() > 127 * layer.input_scale
                    assert outside.any() and not inside[outside].any() and inside[~outside].any()
            finally:
                del layer.passes_gradients
                layer.__dict__.pop("input_scale", None)
            bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (x.ndim - 2)) if x.ndim == 4 else layer.bias
            torch.testing.assert_close(got.detach() + bias, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_probe_leaves_no_state(host, model, quantized, sample, probe, monkeypatch):
    """After a run, an error or an interrupt during a measurement, weights, options and results are the same as before."""
    import comfy.model_management

    network = quantized.model.diffusion_model
    before = sample(quantized, steps=2)
    weights = {name: (id(weight), weight.clone()) for name, weight in network.named_parameters()}
    assert any(weight.is_inference() for weight in network.parameters())
    switched = []

    def check():
        assert torch.is_inference_mode_enabled() and _get_current_function_mode_stack() == []
        assert not any(layer.passes_gradients for layer in network.modules() if hasattr(layer, "packing"))
        assert not any("passes_gradients" in layer.__dict__ for layer in network.modules())
        assert not getattr(comfy.model_management, "in_training", False)
        assert "optimized_attention_override" not in quantized.model_options["transformer_options"]
        assert all(id(weight) == weights[name][0] for name, weight in network.named_parameters())
        assert all(torch.equal(weight, weights[name][1]) for name, weight in network.named_parameters())
        assert torch.equal(sample(quantized, steps=2), before)

    probe(quantized, steps=1)
    check()

    def failing(error):
        broken = quantized.clone()

        def evaluate(apply_model, given):
            if any("passes_gradients" in layer.__dict__ for layer in network.modules()):
                switched.append(error)
                raise error
            return apply_model(given["input"], given["timestep"], **given["c"])

        broken.set_model_unet_function_wrapper(evaluate)
        return broken

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        probe(failing(comfy.model_management.InterruptProcessingException()))
    check()
    with pytest.raises(ValueError, match=r"model: the Jacobian of its network cannot be measured in step 0 \(it broke\)"):
        probe(failing(RuntimeError("it broke")))
    check()
    with pytest.raises(KeyError):
        probe(failing(KeyError("else")))
    check()
    assert len(switched) == 3


def test_unmeasured_steps_take_the_previous_suggested_lambda(model, probe):
    found, lambdas, plot = probe(linear(model), cfg=1.0, steps=5, every=2)
    assert [step["step"] for step in found["steps"]] == [0, 2, 4]
    first, second, last = (f"{step['lambda']:g}" for step in found["steps"])
    assert lambdas.split(", ") == [first, first, second, second, last]
    assert plot.ndim == 4 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1


def test_too_few_iterations_give_a_warning(model, probe, caplog):
    found, *_ = probe(model, steps=1, iterations=2)
    assert found["warnings"] == [
        "the norms of step 0 did not converge to the tolerance and are only lower bounds; use more iterations."
    ]
    assert "contraction probe: the norms of step 0" in caplog.text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "steps: 0 is outside 1 to 10000."),
        ({"cfg": -1.0}, "cfg: -1.0 is outside 0 to 100."),
        ({"denoise": 2.0}, "denoise: 2.0 is outside 0 to 1."),
        ({"every": 0}, "every: 0 is outside 1 to 10000."),
        ({"iterations": 1}, "iterations: 1 is outside 2 to 200."),
        ({"tolerance": 0.0}, "tolerance: 0.0 is outside 0.0001 to 0.5."),
        ({"perturbation": 0.0}, "perturbation: 0.0 is outside 1e-05 to 1."),
        ({"scheduler": "fast"}, "scheduler: 'fast' is none of "),
    ],
)
def test_wrong_values_are_refused_at_validation_and_over_links(host, model, probe, values, sentence):
    assert host.nodes["IECContractionProbe"].validate_inputs(**values).startswith(sentence)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        probe(model, **values)


def test_models_that_cannot_be_measured_are_refused(host, model, probe):
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    with pytest.raises(ValueError, match="model: IEC is on this MODEL already"):
        probe(host.run("IECApply", model=model, **settings)[0])
    with pytest.raises(ValueError, match="model: a cache is on this MODEL"):
        probe(host.run("IECDeepCache", model=model, interval=2, branch=1)[0])
    with pytest.raises(ValueError, match=r"denoise: at 0\.0 no step is left"):
        probe(model, denoise=0.0)
    broken = model.clone()
    broken.set_model_unet_function_wrapper(lambda apply_model, given: given["input"] * torch.nan)
    with pytest.raises(ValueError, match="model: "):
        probe(broken)


def test_the_probes_run_equals_the_hosts_euler(host, model, probe, stock_sample, monkeypatch):
    """The latents that the network gets between the measurements are those of `euler`."""
    import comfy.samplers

    seen, euler = {}, comfy.samplers.k_diffusion_sampling.sample_euler

    def kept(name):
        def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
            seen[name] = []
            return euler(denoise, x, sigmas, extra_args, lambda info: seen[name].append(info["x"].clone()), disable)

        return sampler

    monkeypatch.setattr(comfy.samplers.k_diffusion_sampling, "sample_euler", kept("stock"))
    stock_sample(model, steps=3, seed=3, scheduler="karras")
    monkeypatch.undo()
    places = []
    watched = model.clone()
    watched.add_wrapper_with_key(
        "predict_noise", "seen", lambda run, x, *rest: (places.append(x.detach().clone()), run(x, *rest))[1]
    )
    probe(watched, steps=3, every=100, latent_image={"samples": torch.zeros(2, 3, 16, 16)})
    expected = seen["stock"]
    own = [places[0], *places[-2:]]  # every step's own evaluation; the first measurement is between them
    for one, other in zip(own, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def written_out(lambdas):
    """Return Euler corrected once per step with lambdas[i], as in the paper, without any code of the pack."""

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for (sigma, sigma_next), lambda_ in zip(itertools.pairwise(sigmas), lambdas):
            at = sigma.expand(len(x))
            plain = x + (sigma_next - sigma) * (x - model(x, at, **extra_args)) / sigma
            shown = plain * ((sigma**2 + 1) / (sigma_next**2 + 1)).sqrt()
            again = x + (sigma_next - sigma) * (shown - model(shown, at, **extra_args)) / sigma
            x = (1 - lambda_) * plain + lambda_ * again
        return x

    return sampler


SETTINGS = {"correction_steps": "all", "scheduler": "karras", "steps": 4}


def test_each_step_uses_its_own_lambda(host, model, conditioning, sample, advanced, relative):
    lambdas = [0.3, 0.5, 0.2, 0.7]
    found = []
    result = sample(model, found, **SETTINGS, lambdas="0.3, 0.5,0.2 , 0.7", latent_image={"samples": torch.zeros(2, 3, 16, 16)})
    guider = host.run("CFGGuider", model=model, positive=conditioning[0], negative=conditioning[1], cfg=2.0)[0]
    expected = advanced(guider, written_out(lambdas), steps=4, scheduler="karras")
    other = advanced(guider, written_out(lambdas[::-1]), steps=4, scheduler="karras")
    assert relative(result, expected) < 1e-5 < 1e-3 < relative(result, other)
    assert [step.lambdas[0] for step in found[0].steps] == [pytest.approx([value] * 2) for value in lambdas]
    assert found[0].correction == "all lambdas"


def test_equal_lambdas_for_all_steps_equal_lambda_(model, sample):
    one = sample(model, **SETTINGS, lambda_=0.3)
    assert torch.equal(sample(model, **SETTINGS, lambda_=0.9, lambdas="0.3, 0.3, 0.3, 0.3"), one)
    assert torch.equal(sample(model, **SETTINGS, lambda_=0.3, lambdas="  "), one)
    assert not torch.equal(sample(model, **SETTINGS, lambda_=0.9), one)


def test_every_sampler_node_accepts_the_probes_lambdas(host, model, conditioning, sample, advanced, probe):
    import comfy.samplers

    _, lambdas, _ = probe(model, steps=3, every=3)
    settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0, "lambdas": lambdas}
    direct = sample(model, **{**SETTINGS, "steps": 3}, lambdas=lambdas, latent_image={"samples": torch.zeros(2, 3, 16, 16)})
    plain, patched = (
        host.run("CFGGuider", model=one, positive=conditioning[0], negative=conditioning[1], cfg=2.0)[0]
        for one in (model, host.run("IECApply", model=model, **settings)[0])
    )
    wrapped = host.run("IECSampler", sampler=comfy.samplers.sampler_object("euler"), **settings)[0]
    assert torch.equal(advanced(patched, steps=3, scheduler="karras"), direct)
    latent = {"samples": torch.zeros(2, 3, 16, 16)}
    noise, sigmas = host.run("RandomNoise", noise_seed=7)[0], host.run(
        "BasicScheduler", model=model, scheduler="karras", steps=3, denoise=1.0
    )[0]  # fmt: skip
    result = host.run("SamplerCustomAdvanced", noise=noise, guider=plain, sampler=wrapped, sigmas=sigmas, latent_image=latent)
    assert torch.equal(result[0]["samples"], direct)


@pytest.mark.parametrize(
    ("lambdas", "sentence"),
    [
        (
            "0.5, 0.5",
            "lambdas: the number of values is 2, but the run has 4 steps; write one number per step, or leave it empty.",
        ),
        (
            "0.5, half, 0.5, 0.5",
            "lambdas: 'half' of step 1 is not a number; write one number per step, such as 0.5, 0.5, 0.4, or leave it empty.",
        ),
        (
            "0.5, 0.5, 0.5,",
            "lambdas: '' of step 3 is not a number; write one number per step, such as 0.5, 0.5, 0.4, or leave it empty.",
        ),
        ("0.5, 0, 0.5, 0.5", "lambdas: 0 of step 1 is out of range; write one above 0 and at most 1, such as 0.5."),
        ("0.5, 0.5, 1.5, 0.5", "lambdas: 1.5 of step 2 is out of range; write one above 0 and at most 1, such as 0.5."),
        ("0.5, 0.5, 0.5, nan", "lambdas: nan of step 3 is out of range; write one above 0 and at most 1, such as 0.5."),
    ],
)
def test_wrong_lambdas_are_refused_at_validation_and_at_run(host, model, sample, lambdas, sentence):
    node = host.nodes["IECKSampler"]
    assert node.validate_inputs(steps=4, scheduler="karras", lambdas=lambdas) == sentence
    assert node.validate_inputs(steps=None, scheduler="karras", lambdas=lambdas) in (True, sentence)
    if "number of values" not in sentence:  # these nodes do not know the number of steps
        assert host.nodes["IECApply"].validate_inputs(lambdas=lambdas) == sentence
        assert host.nodes["IECSampler"].validate_inputs(lambdas=lambdas) == sentence
    with pytest.raises(ValueError) as error:
        sample(model, **SETTINGS, lambdas=lambdas)
    assert str(error.value) == sentence


def test_the_number_of_ddim_uniform_steps_is_checked_at_the_run(host, model, sample):
    """It takes more steps than requested if the number of steps does not divide the model's number of timesteps."""
    text = ", ".join(["0.5"] * 7)
    node = host.nodes["IECKSampler"]
    assert node.validate_inputs(steps=7, scheduler="ddim_uniform", lambdas=text) is True
    with pytest.raises(ValueError, match="lambdas: the number of values is 7, but the run has 8 steps"):
        sample(model, correction_steps="all", steps=7, scheduler="ddim_uniform", lambdas=text)


@pytest.mark.parametrize("node", ["IECKSampler", "IECApply", "IECSampler"])
def test_workflows_made_before_lambdas_keep_their_values(host, node):
    """Values are saved in the order of the inputs: the new input is the last one, and may be missing."""
    info = host.nodes[node].GET_NODE_INFO_V1()["input"]
    assert [*info["optional"]][-1] == "lambdas" and "lambdas" not in info["required"]
    assert info["optional"]["lambdas"][1]["default"] == ""
