"""Calibrated activations and the quantization report on the host's network, compared with the values that the test's
hooks see.
"""

import contextlib
import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from pack import pack_module
from tuned import tuned

STEPS = 4
SAMPLING = {"steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
LINEAR, PIXELS, WINDOW = "Linear", "1x1", "3x3"
SOME = "input_blocks.2.* input_blocks.3.* middle_block.* output_blocks.0.*"  # several of each kind, of stride 1 and 2


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def empty_latent():
    """A quarter of the model's own size, which is enough for these tests."""
    return {"samples": torch.zeros(2, 3, 8, 8)}


@pytest.fixture
def quantize(host, model):
    def run(source=None, **settings):
        inputs = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True, **settings}
        return host.run("IECQuantizeModel", model=source or model, **inputs)[0]

    return run


@pytest.fixture
def inputs(conditioning):
    """Return the inputs of the calibrating nodes' runs."""
    latent = {"samples": torch.zeros(2, 3, 8, 8)}
    return {"positive": conditioning[0], "negative": conditioning[1], "latent_image": latent, "seed": 11, "runs": 1, **SAMPLING}


@pytest.fixture
def calibrate(host, inputs):
    """Return calibrate(model, **settings), which gives the calibrated MODEL and its profile.

    Scales come from the largest magnitude unless a test asks for the search, which costs several times as much.
    """
    inputs = {**inputs, "activation_scale": "absmax"}
    return lambda model, **settings: host.run("IECCalibrateQuantization", model=model, **{**inputs, **settings})


@pytest.fixture
def apply(host):
    return lambda model, profile: host.run("IECApplyQuantizationProfile", model=model, profile=profile)[0]


@pytest.fixture
def run(host, conditioning):
    """Return run(model, ...), which gives the latents of a run of the host's own sampler."""

    def sample(model, seed=11, steps=STEPS, positive=None, sampler_name="euler"):
        latent, conditions = {"samples": torch.zeros(2, 3, 8, 8)}, (positive or conditioning[0], conditioning[1])
        return host.common_ksampler(model, seed, steps, 2.0, sampler_name, "normal", *conditions, latent)[0]["samples"]

    return sample


def layers_of(model):
    """Return {name: layer} of a MODEL's quantized layers."""
    return {name: layer for name, layer in model.model.diffusion_model.named_modules() if hasattr(layer, "packing")}


@contextlib.contextmanager
def watched(model, note):
    """Let note(name, layer, x, output, sigma) see all evaluations of quantized layers of this MODEL's network.

    Yields a clone of the MODEL to sample; `sigma` is the clone's.
    """
    from comfy.patcher_extension import WrappersMP

    sigma, hooks = [None], []

    def tell(executor, x, t, *args, **kwargs):
        sigma[0] = t[0].item()
        return executor(x, t, *args, **kwargs)

    for name, layer in layers_of(model).items():

        def hook(layer, inputs, output, name=name):
            note(name, layer, inputs[0], output, sigma[0])

        hooks.append(layer.register_forward_hook(hook))
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watched", tell)
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def kind_of(layer):
    if layer.packing.shape[2:] == ():
        return LINEAR
    return PIXELS if tuple(layer.packing.shape[2:]) == (1, 1) else WINDOW


def rotated(x, size):
    """Rotate the last dimension by the regular Hadamard matrix of ConvRot in float64.

    The matrix is the Kronecker power of the block that is minus one where row and column sum to three, over the square root of
    its size.
    """
    block = np.array([[-1 if row + column == 3 else 1 for column in range(4)] for row in range(4)], dtype=np.float64)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, block)
    return (x.double().unflatten(-1, (-1, size)) @ torch.from_numpy(matrix / math.sqrt(size))).flatten(-2)


def entering(layer, x):
    """Return a layer's input in the form that is quantized (rotated if the layer rotates)."""
    size = layer.packing.format.rotation
    return rotated(x, size) if size else x


def sigmas_of(host, model, steps=STEPS):
    return host.run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[0]


def largest_inputs(model, runs):
    """Return {sigma: {name: largest input magnitude}} of what runs(model) samples."""
    seen = {}

    def note(name, layer, x, output, sigma):
        of_step, value = seen.setdefault(sigma, {}), entering(layer, x).abs().max().item()
        of_step[name] = max(of_step.get(name, 0), value)

    with watched(model, note) as watching:
        runs(watching)
    return seen


@pytest.mark.parametrize("rotate", [False, True])
def test_scales_are_the_largest_that_the_runs_have(host, quantize, calibrate, run, model, rotate):
    """The largest inputs over two prompts with two seeds each, as the test's hooks see them in runs of the host's own
    sampler.
    """
    quantized, other = quantize(rotate=rotate), host.run("IECClassLabel", labels="flag")[0]
    seen = largest_inputs(
        quantized, lambda model: [run(model, seed, positive=prompt) for prompt in (None, other) for seed in (11, 12)]
    )
    assert any(layer.packing.format.rotation for layer in layers_of(quantized).values()) == rotate
    facts = {"quantization": f"W8A8{', rotated' * rotate}", "scale": "absmax", "prompts": "2", "runs": "2"}
    facts |= {name: str(value) for name, value in SAMPLING.items()}
    for scales in ("timestep-wise", "static"):
        profile = calibrate(quantized, runs=2, positive_3=other, activation_scale="absmax", scales=scales)[1]
        assert set(profile.names) == set(layers_of(quantized)) and len(profile.names) > 30
        sigmas = sigmas_of(host, model)[:-1]
        assert len(seen) == STEPS and sorted(seen, reverse=True) == sigmas.tolist()
        expected = torch.tensor([[seen[sigma.item()][name] / 127 for name in profile.names] for sigma in sigmas])
        if scales == "static":
            expected, sigmas = expected.amax(0, keepdim=True), sigmas[:1]
        assert torch.equal(profile.sigmas.float(), sigmas)
        torch.testing.assert_close(profile.table, expected, rtol=1e-5, atol=0)
        assert profile.facts == {**facts, "scales": scales}


@pytest.mark.fast
def test_searched_scales_have_the_least_squared_error(host, quantize, inputs, run):
    """The calibration runs with default inputs, which search the scales."""
    quantized, taken = quantize(), {}

    def note(name, layer, x, output, sigma):
        if name in chosen:
            taken.setdefault((sigma, name), []).append(x.double())

    profile = host.run("IECCalibrateQuantization", model=quantized, **inputs)[1]
    chosen = profile.names[::7]
    with watched(quantized, note) as watching:
        run(watching)
    shares = set()
    for row, sigma in enumerate(profile.sigmas.float().tolist()):
        for name in chosen:
            x = torch.cat([part.flatten() for part in taken[sigma, name]])
            widest = x.abs().max().item() / 127
            scales = [widest * (1 - 0.02 * number) for number in range(31)]
            errors = [((x / scale).round().clamp(-127, 127) * scale - x).square().sum().item() for scale in scales]
            found = profile.table[row, profile.names.index(name)].item()
            number = min(range(31), key=lambda number: abs(scales[number] - found))
            assert found == pytest.approx(scales[number], rel=1e-6)
            assert errors[number] <= min(errors) * (1 + 1e-4), (sigma, name)
            shares.add(number)
    assert len(shares) > 3


def by_definition(layer, full, x, scale):
    """Return the output of a full-precision layer with 8-bit weights and activations of this scale.

    The integer sums are exact, because float64 holds them; then float64 scales are applied.
    """
    weight = rotated(full.weight, size) if (size := layer.packing.format.rotation) else full.weight.double()
    weight_scale = (weight.flatten(1).abs().amax(1) / 127).float().double().reshape(-1, *[1] * (weight.ndim - 1))
    weight = (weight.float() / weight_scale.float()).round().double()
    values = (entering(layer, x).float() / np.float32(scale)).round().clamp(-127, 127).double()
    if weight.ndim == 2:
        sums, weight_scale = values @ weight.t(), weight_scale[:, 0]
    else:
        sums, weight_scale = torch.nn.functional.conv2d(values, weight, None, full.stride, full.padding), weight_scale[:, 0]
    bias = torch.zeros(len(weight)) if full.bias is None else full.bias
    return sums * scale * weight_scale + bias.double().reshape(weight_scale.shape)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("steps", [STEPS, 3])
def test_layers_compute_by_the_definition_with_the_profiles_scales(quantize, calibrate, run, model, steps, rotate):
    """With the calibration's number of steps its scales are used, with another number the scales are interpolated linearly.

    A rotated weight's integers, and the integers of an interpolated scale, may differ from the test's where a value lies
    between two integers.
    """
    quantized = quantize(rotate=rotate, include=SOME)
    calibrated, profile = calibrate(quantized, activation_scale="search")  # so that there are values to clamp
    full = dict(model.model.diffusion_model.named_modules())
    table, sigmas = profile.table.double().numpy(), profile.sigmas.numpy()
    tolerance = 1e-5 if steps == STEPS and not rotate else 2e-3
    seen, between = set(), set()

    def note(name, layer, x, output, sigma):
        scale = np.interp(sigma, sigmas[::-1], table[::-1, profile.names.index(name)])
        assert layer.input_scale.item() == pytest.approx(scale, rel=1e-5)
        if layer.packing.format.rotation or not rotate:
            expected = by_definition(layer, full[name], x, scale)
            assert (output.double() - expected).norm() <= tolerance * expected.norm(), (name, sigma)
            seen.add((kind_of(layer), name))
        if not np.isclose(sigma, sigmas).any():
            between.add(sigma)

    with watched(calibrated, note) as watching:
        run(watching, steps=steps)
    of_rotated = {name for name, layer in layers_of(quantized).items() if layer.packing.format.rotation}
    assert {name for _, name in seen} == (of_rotated if rotate else set(layers_of(quantized)))
    assert all([kind for kind, _ in seen].count(kind) >= 2 for kind in ((LINEAR,) if rotate else (LINEAR, PIXELS, WINDOW)))
    assert len(between) == (0 if steps == STEPS else 1)


def test_all_kinds_of_scales_are_near_to_full_precision(quantize, calibrate, run, model, relative):
    """The noise is not the calibration's. Which kind is nearer depends on the noise at so few steps of such small images:
    docs/quantization.md compares them at the model's own size.
    """
    quantized, exact = quantize(), run(model, seed=3)
    errors = {"dynamic": relative(run(quantized, seed=3), exact)}
    for scales in ("timestep-wise", "static"):
        for by in ("search", "absmax"):
            latents = run(calibrate(quantized, scales=scales, activation_scale=by)[0], seed=3)
            assert latents.isfinite().all()
            errors[scales, by] = relative(latents, exact)
    assert all(0 < error < 0.1 for error in errors.values()), errors
    assert len(set(errors.values())) == 5


def scales_left(model):
    return [name for name, layer in layers_of(model).items() if layer.input_scale is not None]


def hooks_left(model):
    return [name for name, layer in layers_of(model).items() if layer._forward_pre_hooks or layer._forward_hooks]


class Stop(Exception):
    pass


def test_clones_without_the_profile_use_dynamic_scales(quantize, calibrate, run):
    quantized = quantize()
    before = run(quantized)
    calibrated = calibrate(quantized)[0]
    first = run(calibrated)
    assert torch.equal(run(quantized), before) and torch.equal(run(quantized.clone()), before)
    assert torch.equal(run(calibrated), first) and not torch.equal(first, before)
    assert scales_left(quantized) == hooks_left(quantized) == []


def test_an_error_during_a_run_removes_the_scales(quantize, calibrate, run):
    quantized = quantize()
    before = run(quantized)
    calibrated, left = calibrate(quantized)[0], [2]

    def stop(h, hsp, options):
        left[0] -= options["block"] == ("output", 3)
        if not left[0]:
            assert scales_left(calibrated)
            raise Stop
        return h, hsp

    stopping = calibrated.clone()
    stopping.set_model_output_block_patch(stop)
    with pytest.raises(Stop):
        run(stopping)
    assert scales_left(quantized) == [] and torch.equal(run(quantized), before)


def test_an_interrupted_calibration_removes_its_hooks(quantize, calibrate, run):
    quantized, left = quantize(), [2]
    before, stopping = run(quantized), quantized.clone()

    def stop(h, hsp, options):
        left[0] -= options["block"] == ("output", 3)
        if not left[0]:
            assert hooks_left(quantized)
            raise Stop
        return h, hsp

    stopping.set_model_output_block_patch(stop)
    with pytest.raises(Stop):
        calibrate(stopping)
    assert hooks_left(quantized) == [] and torch.equal(run(quantized), before)


@pytest.mark.parametrize(("by", "passes"), [("search", 2), ("absmax", 1)])
def test_progress_counts_the_steps_of_all_runs(quantize, calibrate, conditioning, progress_of, by, passes):
    quantized = quantize(include="middle_block.*")
    more = {"runs": 2, "positive_4": conditioning[0], "steps": 2}
    told = progress_of(lambda: calibrate(quantized, activation_scale=by, **more))
    assert told == [passes * 2 * 2 * 2, *[1] * (passes * 2 * 2 * 2)]


@pytest.mark.parametrize("cached", [False, True])
def test_steps_without_a_layers_run_use_its_previous_scale(host, quantize, calibrate, model, cached):
    """A cache left the layer out at these steps. A layer that the cache runs has its own scale for every step."""
    quantized = quantize()
    if cached:
        quantized = host.run("IECDeepCache", model=quantized, interval=2, branch=0)[0]
    profile = calibrate(quantized, activation_scale="absmax")[1]
    middle, last = (
        profile.table[:, [name.startswith(block) for name in profile.names]] for block in ("middle_block.", "output_blocks.3.")
    )
    for step in (1, 3):
        assert torch.equal(middle[step], middle[step - 1]) == cached
        assert not torch.equal(last[step], last[step - 1])
    assert not torch.equal(middle[2], middle[1])


def test_a_layer_missing_from_the_profile_uses_dynamic_scales(quantize, calibrate, apply, run):
    """The profile does not contain the layer, as when the calibration ran the network without it."""
    quantized = quantize()
    profile, seen = copy.deepcopy(calibrate(quantized)[1]), {}
    name = profile.names[3]
    profile.table = torch.cat([profile.table[:, :3], profile.table[:, 4:]], dim=1)
    profile.names = (*profile.names[:3], *profile.names[4:])

    def note(name, layer, x, output, sigma):
        seen.setdefault(name, layer.input_scale)

    with watched(apply(quantized, profile), note) as watching:
        run(watching)
    assert seen.pop(name) is None
    assert len(seen) == len(profile.names) and all(scale is not None for scale in seen.values())


@pytest.mark.fast
def test_profile_is_saved_loaded_and_applied(host, profile_folder, quantize, calibrate, apply, run):
    quantized = quantize()
    calibrated, profile = calibrate(quantized)
    assert host.run("IECSaveQuantizationProfile", profile=profile, name="small/net")[0] is profile
    assert [path.name for path in profile_folder.rglob("*") if path.is_file()] == ["net.safetensors"]
    loaded = host.run("IECLoadQuantizationProfile", profile_name="small/net.safetensors")[0]
    expected = run(calibrated)
    for each in (profile, loaded):
        assert torch.equal(run(apply(quantized, each)), expected)
    assert torch.equal(run(apply(quantize(), loaded)), expected)  # made again, as after a restart


def test_the_same_model_in_another_precision_has_the_profile(build_small, quantize, calibrate, apply, run):
    other = quantize(build_small(torch.bfloat16))
    assert run(apply(other, calibrate(quantize())[1])).isfinite().all()


def test_wrong_choices_are_refused(host):
    node = host.nodes["IECCalibrateQuantization"]
    right = {"sampler_name": "euler", "scheduler": "normal", "scales": "static", "activation_scale": "search"}
    assert node.validate_inputs(**right) is True
    for option in right:
        assert node.validate_inputs(**{**right, option: "best"}).startswith(f"{option}: ")


def test_a_profile_of_another_model_or_quantization_is_refused(quantize, calibrate, apply, model):
    profile = calibrate(quantize(), activation_scale="absmax")[1]
    with pytest.raises(ValueError, match=r"^profile: it was calibrated for another model; calibrate for this model, or load"):
        apply(quantize(tuned(model)), profile)
    others = {"W4A8": {"weight_bits": "4"}, "W8A8, rotated": {"rotate": True}, r"W8A8, not \*\.0": {"exclude": "*.0"}}
    for name, settings in others.items():
        sentence = (
            rf"^profile: it was calibrated with quantization W8A8, but this MODEL has quantization {name}; quantize the MODEL"
        )
        with pytest.raises(ValueError, match=sentence):
            apply(quantize(**settings), profile)
    other = copy.copy(profile)
    other.names = (*profile.names[:-1], "another.layer")
    with pytest.raises(ValueError, match=r"^profile: it has a scale for another\.layer, which is not quantized in this MODEL;"):
        apply(quantize(), other)


def test_scales_that_are_on_a_model_are_replaced(quantize, calibrate, apply, run):
    """They may come from a file; a calibration ignores them."""
    quantized = quantize()
    static, others = calibrate(quantized, scales="static")
    expected, profile = calibrate(quantized)
    again, found = calibrate(static)
    assert found.names == profile.names and torch.equal(found.table, profile.table) and len(others.table) == 1
    assert torch.equal(run(again), run(expected)) and torch.equal(run(apply(static, profile)), run(expected))
    assert not torch.equal(run(static), run(expected))
    assert torch.equal(run(apply(expected, others)), run(static))


def test_models_without_quantized_activations_are_refused(quantize, calibrate, apply, model):
    profile = calibrate(quantize(), activation_scale="absmax")[1]
    for source in (model, quantize(activation_bits="16")):
        for use in (calibrate, lambda source: apply(source, profile)):
            with pytest.raises(ValueError, match=r"^model: its activations are not quantized; put Quantize Model \(IEC\)"):
                use(source)


def test_a_calibration_with_nan_is_refused(quantize, calibrate):
    broken = quantize().clone()
    broken.set_model_output_block_patch(lambda h, hsp, options: (h * float("nan"), hsp))
    with pytest.raises(
        ValueError, match=r"^model: the input of its layer output_blocks\.0\S+ contains NaN or infinity in a calib"
    ):
        calibrate(broken)
    assert hooks_left(broken) == []


def test_a_schedule_that_repeats_a_sigma(host, profile_folder, quantize, calibrate, run, monkeypatch):
    """Schedulers give such a schedule for more steps than there are timesteps.

    The profile has a row for each distinct sigma, and can be loaded again.
    """
    import comfy.samplers

    sigmas = torch.tensor([14.6, 3.0, 3.0, 1.0, 0.0])
    monkeypatch.setattr(comfy.samplers, "calculate_sigmas", lambda *args: sigmas)
    quantized = quantize()
    calibrated, profile = calibrate(quantized, activation_scale="absmax")
    seen = largest_inputs(quantized, lambda model: run(model))
    assert profile.sigmas.float().tolist() == sigmas.unique().flip(0)[:-1].tolist()
    for row, sigma in zip(profile.table, profile.sigmas.float().tolist()):
        expected = torch.tensor([seen[sigma][name] / 127 for name in profile.names])
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=0)
    host.run("IECSaveQuantizationProfile", profile=profile, name="repeating")
    assert host.run("IECLoadQuantizationProfile", profile_name="repeating.safetensors")[0].table.shape == profile.table.shape
    assert run(calibrated).isfinite().all()


def compiled(source):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = source.clone()
    set_torch_compile_wrapper(model=clone, backend="eager")
    return clone


def test_a_compiled_model_is_calibrated_and_reported_like_an_uncompiled_one(
    host, quantize, calibrate, apply, report, inputs, monkeypatch
):
    """One model is compiled and run before it is calibrated; a calibrated model is compiled afterwards.

    The network is small, because each of these steps compiles it again.
    """
    import comfy.ldm.modules.attention as attention
    from test_unets import OTHERS, build, conditioning

    # The host's attention asks for the free memory, which needs a graph for each call, and a minute in total.
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    small = build(OTHERS["short"])
    sampled = {"positive": conditioning("short", 1), "negative": conditioning("short", 2)}
    sampled["latent_image"] = {"samples": torch.zeros(2, 4, 8, 8)}

    def run(model):
        of = {name: value for name, value in {**inputs, **sampled}.items() if name != "runs"}
        return host.run("KSampler", model=model, denoise=1.0, **of)[0]["samples"]

    quantized = quantize(small, include="middle_block.*")
    calibrated, profile = calibrate(quantized, **sampled)
    expected, compiled_one = run(calibrated), compiled(quantized)
    run(compiled_one)
    other, of_compiled = calibrate(compiled_one, **sampled)
    assert of_compiled.names == profile.names and len(profile.names) > 1
    torch.testing.assert_close(of_compiled.table, profile.table)
    assert report(compiled_one, small, **sampled)[0] == report(quantized, small, **sampled)[0]
    for model in (other, compiled(calibrated), apply(compiled_one, profile)):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    assert scales_left(quantized) == []


def test_layers_that_do_not_run_in_the_calibration_are_reported(quantize, calibrate):
    """Another node that runs a copy of the network has this effect."""
    quantized = quantize()
    hidden = quantized.clone()
    hidden.add_object_patch("diffusion_model", copy.deepcopy(quantized.model.diffusion_model))
    with pytest.raises(ValueError, match=r"^model: none of its quantized layers ran in the calibration; another node, such"):
        calibrate(hidden)


def iec_settings(**more):
    return {"steps": STEPS, "scheduler": "normal", "seed": 11, "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}, **more}


def test_the_iec_sampler_corrects_a_calibrated_model(quantize, calibrate, run, sample):
    calibrated, profile = calibrate(quantize())
    assert torch.equal(sample(calibrated, **iec_settings()), run(calibrated))
    sigmas, table, seen = profile.sigmas.numpy(), profile.table.double().numpy(), []

    def note(name, layer, x, output, sigma):
        scale = np.interp(sigma, sigmas[::-1], table[::-1, profile.names.index(name)])
        assert layer.input_scale.item() == pytest.approx(scale, rel=1e-5)
        seen.append(sigma)

    for point in ("paper", "next"):
        with watched(calibrated, note) as watching:
            corrected = sample(watching, **iec_settings(correction_steps="all", evaluation_point=point))
        assert corrected.isfinite().all() and not torch.equal(corrected, run(calibrated))
    assert len(seen) > 3 * STEPS * len(profile.names)


def test_deepcache_on_a_calibrated_model(host, quantize, calibrate, run, relative, model):
    calibrated, profile = calibrate(quantize())
    seen = {}

    def note(name, layer, x, output, sigma):
        assert layer.input_scale is not None
        seen[name] = seen.get(name, 0) + 1

    cached = host.run("IECDeepCache", model=calibrated, interval=2, branch=0)[0]
    with watched(cached, note) as watching:
        latents = run(watching)
    assert set(seen.values()) == {STEPS // 2, STEPS} and set(seen) == set(profile.names)
    plain = host.run("IECDeepCache", model=model, interval=2, branch=0)[0]
    assert 0 < relative(latents, run(plain)) < 0.1


def test_cachequant_on_a_calibrated_model(host, quantize, calibrate, run, inputs, model, relative):
    """Its calibration evaluates the quantized network with the calibrated scales."""
    calibrated, profile = calibrate(quantize(weight_bits="4"), scales="static", activation_scale="absmax")
    wide = copy.deepcopy(profile)
    wide.table *= 4
    wide = host.run("IECApplyQuantizationProfile", model=quantize(weight_bits="4"), profile=wide)[0]
    settings = {**inputs, "interval": 2, "branch": 0, "schedule": "uniform"}
    maps, expected = [], run(model)
    for quantized in (calibrated, wide, quantize(weight_bits="4")):
        cache = host.run("IECCalibrateCacheQuant", model=quantized, full_precision=model, **settings)[0]
        maps.append(cache.features[""])
        assert 0 < relative(run(host.run("IECCacheQuant", model=quantized, profile=cache)[0]), expected) < 0.8
        assert scales_left(quantized) == []
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(maps[one], maps[other], atol=1e-3)


def test_cachequant_maps_the_outputs_of_the_calibrated_network(host, quantize, calibrate, run, inputs, model):
    """The map is checked at step 1, which reuses the feature of step 0, where both networks have seen the same latent."""
    calibrated, features = calibrate(quantize(weight_bits="4"))[0], []

    def see(h, hsp, options):
        if options["block"] == ("output", 3):
            features.append(h.double())
        return h, hsp

    for source in (calibrated, model):
        seeing = source.clone()
        seeing.set_model_output_block_patch(see)
        run(seeing)
    settings = {**inputs, "interval": 2, "branch": 0, "schedule": "uniform"}
    cache = host.run("IECCalibrateCacheQuant", model=calibrated, full_precision=model, **settings)[0]
    x, y = (value.movedim(1, 0).flatten(1) for value in (features[0], features[STEPS + 1]))
    slope = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1) / x.var(1, correction=0)
    torch.testing.assert_close(cache.features[""][1, :, 0].double(), slope, rtol=1e-3, atol=1e-3)


@pytest.fixture
def is_drawn():
    """Return whether the report's plot is drawn, which takes longer than all of its runs. Parametrize this name to
    change it.
    """
    return False


@pytest.fixture
def report(host, inputs, model, is_drawn, monkeypatch):
    """Return report(model, **settings), which gives (rows, plot, exclude).

    rows: {layer: [format, backend, prediction error, SQNR, weight SQNR, MB]}.
    """
    plots = pack_module("nodes.reports.plots")
    # Only one step is measured, to save time: test_mixed_precision.py tests the measurement of several.
    monkeypatch.setattr(pack_module("nodes.host.quantization.prediction_errors"), "EVALUATIONS", 1)
    if not is_drawn:
        monkeypatch.setattr(plots, "_picture", lambda figure: np.zeros((8, 8, 3), np.uint8))

    def make(quantized, full_precision=None, **settings):
        of = {"model": quantized, "full_precision": full_precision or model, **inputs, **settings}
        node = host.nodes["IECQuantizationReport"].execute(**of)
        text, plot, exclude = node.result
        assert len(node.ui["images"]) == len(plot) == 1 and list(node.ui["text"]) == [text]  # shown on the node
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]
        assert cells[0][0] == "layer" and set(cells[1]) == {"---"}
        return {name: more for name, *more in cells[2:]}, plot, exclude.split()

    return make


def decibels(exact, ours):
    return 10 * math.log10(exact.square().sum().item() / (ours - exact).square().sum().item())


def layer_ratios(quantized, full, runs):
    """Return {name: output SQNR} over what runs(model) samples; full: {name: (weight, bias)} in full precision."""
    sums = {name: [0.0, 0.0] for name in layers_of(quantized)}

    def note(name, layer, x, output, sigma):
        weight, bias = (None if value is None else value.double() for value in full[name])
        geometry = () if weight.ndim == 2 else (layer.stride, layer.padding)
        function = torch.nn.functional.linear if weight.ndim == 2 else torch.nn.functional.conv2d
        exact = function(x.double(), weight, bias, *geometry)
        sums[name][0] += exact.square().sum().item()
        sums[name][1] += (output.double() - exact).square().sum().item()

    with watched(quantized, note) as watching:
        runs(watching)
    return {name: 10 * math.log10(signal / noise) for name, (signal, noise) in sums.items()}


def full_weights(model, names):
    modules = dict(model.model.diffusion_model.named_modules())
    return {name: (modules[name].weight, modules[name].bias) for name in names}


@pytest.mark.parametrize("is_drawn", [True])
@pytest.mark.parametrize("bits", [("8", "8"), ("4", "16")])
def test_report_has_every_layers_errors_largest_per_byte_first(host, quantize, report, run, model, bits):
    quantized, other = quantize(weight_bits=bits[0], activation_bits=bits[1]), host.run("IECClassLabel", labels="flag")[0]
    full = full_weights(model, layers_of(quantized))
    expected = layer_ratios(
        quantized, full, lambda model: [run(model, seed, positive=prompt) for prompt in (None, other) for seed in (11, 12)]
    )
    rows, plot, exclude = report(quantized, runs=2, positive_2=other)
    assert set(rows) == set(expected) and len(rows) > 30 and exclude == []
    ratios = [float(row[3]) for row in rows.values()]
    assert 5 < min(ratios) < max(ratios) < 80
    changes = {name: float(row[2]) for name, row in rows.items()}
    spared = [changes[name] ** 2 / (full[name][0].nbytes - layer.weight.nbytes) for name, layer in layers_of(quantized).items()]
    by_worth = dict(zip(layers_of(quantized), spared))
    worth = [by_worth[name] for name in rows if changes[name] > 1e-4]  # above the table's last digits
    assert len(worth) > 20 and all(then < 1.02 * here for here, then in itertools.pairwise(worth))
    limit = {"8": 127, "4": 7}[bits[0]]
    for name, (fmt, backend, _, sqnr, weight_sqnr, size) in rows.items():
        assert float(sqnr) == pytest.approx(expected[name], abs=0.06), name
        weight = full[name][0].double().flatten(1)
        scale = (weight.abs().amax(1, keepdim=True) / limit).float().double()
        assert float(weight_sqnr) == pytest.approx(decibels(weight, (weight / scale).round() * scale), abs=0.06), name
        assert fmt == f"int{bits[0]}, activations {bits[1]} bits"
        assert float(size) == pytest.approx((weight.numel() * int(bits[0]) / 8 + 4 * len(weight)) / 2**20, abs=6e-4)
        assert ("dequantized weight" in backend) == (bits[1] == "16")
        windows = bits[1] == "8" and weight.shape[1] != full[name][0].shape[1]
        assert ("windows" in backend or "Triton" in backend) == windows, (name, backend)
    assert plot.ndim == 4 and plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
    assert hooks_left(quantized) == []


def test_report_names_the_backends_of_calibrated_layers(quantize, calibrate, report, model, monkeypatch):
    """Calibrated activations cannot use a backend that takes its own scale for each row."""
    layers = sys.modules[type(next(iter(layers_of(quantize()).values()))).__module__]
    monkeypatch.setattr(layers, "linear_backend", lambda device, per_row, *_: f"rows: {per_row}")
    quantized = quantize()
    for source, expected in ((quantized, "rows: True"), (calibrate(quantized)[0], "rows: False")):
        backends = {row[1] for row in report(source)[0].values()}
        assert expected in backends and len(backends) == 2


def test_layers_excluded_as_suggested_are_in_full_precision(quantize, report, run, model, relative):
    quantized = quantize(weight_bits="4")
    rows = report(quantized)[0]
    least = sorted(float(row[3]) for row in rows.values())[len(rows) // 3]
    exclude = report(quantized, budget="error", least_sqnr=least)[2]
    surely, perhaps = ({name for name, row in rows.items() if float(row[3]) < least + more} for more in (-0.1, 0.1))
    assert surely <= set(exclude) <= perhaps and len(perhaps) < len(rows)
    mixed = quantize(weight_bits="4", exclude=" ".join(exclude))
    assert set(layers_of(mixed)) == set(rows) - set(exclude)
    exact = run(model, seed=3)
    errors = [relative(run(source, seed=3), exact) for source in (mixed, quantized)]
    assert errors[0] < 0.8 * errors[1], errors
    again = report(mixed)[0]
    assert set(again) == set(rows) - set(exclude) and min(float(row[3]) for row in again.values()) > least - 3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_size_budget_is_kept_and_used(quantize, report, model, share):
    quantized = quantize(weight_bits="4")
    packed = {name: layer.weight.nbytes for name, layer in layers_of(quantized).items()}
    full = {name: weight.nbytes for name, (weight, _) in full_weights(model, packed).items()}
    low, high = (sum(sizes.values()) / 2**20 for sizes in (packed, full))
    size = low + share * (high - low) + 1e-6
    rows, _, exclude = report(quantized, budget="size", size_mb=size)
    mixed = quantize(weight_bits="4", exclude=" ".join(exclude))
    sizes = {name: full[name] if name in exclude else layers_of(mixed)[name].weight.nbytes for name in packed}
    assert sum(sizes.values()) / 2**20 <= size
    unused = size - sum(sizes.values()) / 2**20
    of_use = {name for name, row in rows.items() if float(row[2]) > 0}  # queries of a one-token context change nothing
    assert all((full[name] - packed[name]) / 2**20 > unused for name in of_use - set(exclude))
    assert (len(exclude) == 0) == (share == 0.0)


def test_a_size_that_the_quantized_layers_do_not_fit_is_refused(quantize, report):
    with pytest.raises(ValueError, match=r"^size_mb: the quantized layers take \d+\.\d\d MB already; allow more"):
        report(quantize(), budget="size", size_mb=0.5)


def test_report_refuses_nan(quantize, report):
    """The values are NaN. A layer's rounding to integers hides them from the layers after it."""
    broken = quantize().clone()
    broken.set_model_output_block_patch(lambda h, hsp, options: (h * float("nan"), hsp))
    sentence = (
        r"^model: the output of its layer output_blocks\.0\S+, quantized or in full precision, contains NaN or infinity in a c"
    )
    with pytest.raises(ValueError, match=sentence):
        report(broken)
    assert hooks_left(broken) == []


def test_report_refuses_other_models(host, quantize, report, model):
    quantized = quantize()
    with pytest.raises(ValueError, match=r"^model: this MODEL is not quantized; put Quantize Model \(IEC\) before"):
        report(model)
    for other in (tuned(model), quantized, quantize(weight_bits="4")):
        with pytest.raises(ValueError, match=r"^full_precision: this is not the MODEL that the quantized one was made from"):
            report(quantized, full_precision=other)
    node = host.nodes["IECQuantizationReport"]
    right = {"sampler_name": "euler", "scheduler": "normal", "budget": "size"}
    assert node.validate_inputs(**right) is True
    for option in right:
        assert node.validate_inputs(**{**right, option: "best"}).startswith(f"{option}: ")


@pytest.mark.parametrize("order", ["before", "after"])
def test_report_of_models_with_a_lora_on_both(quantize, report, run, model, order):
    """The patches are weight patches, as from the host's LoRA loaders, on some layers, before or after the model is
    quantized.
    """
    generator, parameters = torch.Generator().manual_seed(0), dict(model.model.named_parameters())
    keys = ["diffusion_model.middle_block.1.proj_in.weight", "diffusion_model.middle_block.0.in_layers.2.weight"]
    patches = {key: (0.3 * torch.randn(parameters[key].shape, generator=generator),) for key in keys}

    def with_lora(source):
        patched = source.clone()
        assert sorted(patched.add_patches(patches, 0.8)) == sorted(keys)
        return patched

    full = full_weights(model, layers_of(quantize()))
    originals = {name: weight for name, (weight, _) in full.items()}
    for key in keys:
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        full[name] = full[name][0] + 0.8 * patches[key][0], full[name][1]

    def rounded(weight):
        scale = (weight.abs().amax(1, keepdim=True) / 127).float().double()
        return (weight / scale).round() * scale

    before = run(model)
    quantized = quantize(with_lora(model)) if order == "before" else with_lora(quantize())
    expected = layer_ratios(quantized, full, run)
    rows = report(quantized, full_precision=with_lora(model))[0]
    for name, row in rows.items():
        assert float(row[3]) == pytest.approx(expected[name], abs=0.06), name
        weight, original = (value.double().flatten(1) for value in (full[name][0], originals[name]))
        ours = weight if order == "before" else rounded(original) + weight - original  # the patch is on the quantized weight
        assert float(row[4]) == pytest.approx(decibels(weight, rounded(ours)), abs=0.06), name
    assert min(expected.values()) > 15
    assert torch.equal(run(model), before)


def test_report_leaves_the_models_unchanged(quantize, calibrate, report, run, model):
    calibrated = calibrate(quantize())[0]
    before = run(model), run(calibrated)
    rows = report(calibrated, budget="error", least_sqnr=20.0)[0]
    assert len(rows) == len(layers_of(calibrated))
    assert torch.equal(run(model), before[0]) and torch.equal(run(calibrated), before[1])
    assert scales_left(calibrated) == hooks_left(calibrated) == []


def test_report_of_a_calibrated_model_sees_its_scales(quantize, calibrate, report, run, model):
    calibrated = calibrate(quantize(), scales="static", activation_scale="absmax")[0]
    expected = layer_ratios(calibrated, full_weights(model, layers_of(calibrated)), run)
    rows = report(calibrated)[0]
    assert all(float(row[3]) == pytest.approx(expected[name], abs=0.06) for name, row in rows.items())
    dynamic = report(quantize())[0]
    assert sum(float(rows[name][3]) < float(dynamic[name][3]) for name in rows) > 0.7 * len(rows)


def test_report_counts_the_steps_of_all_runs(quantize, report, conditioning, progress_of):
    quantized = quantize()
    told = progress_of(lambda: report(quantized, runs=2, positive_3=conditioning[0], steps=2))
    total = 2 * 2 * 2 + 2 + len(layers_of(quantized))  # the runs, and one more run, in one step of which each layer is measured
    assert told == [total, *[1] * total]


def test_a_transformer_is_calibrated_and_reported(host, quantize, apply):
    """Scales and errors of Flux, with only Linear layers and with guidance, are compared with what the test's hooks see."""
    from transformer_families import FAMILIES, build, conditioning, empty_latent

    model = build("Flux")
    quantized, sampling = quantize(model, rotate=True), {**SAMPLING, "scheduler": "simple"}
    inputs = {"positive": conditioning("Flux", 1), "negative": conditioning("Flux", 2), "seed": 5, "runs": 1, **sampling}
    inputs["latent_image"] = empty_latent(FAMILIES["Flux"].latent)

    def run(model):
        numbers = (inputs[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler"))
        entries = (inputs[name] for name in ("positive", "negative", "latent_image"))
        return host.common_ksampler(model, *numbers, *entries)[0]["samples"]

    seen = largest_inputs(quantized, run)
    calibrated, profile = host.run("IECCalibrateQuantization", model=quantized, activation_scale="absmax", **inputs)
    assert profile.sigmas.float().tolist() == sorted(seen, reverse=True) and len(seen) == STEPS
    assert set(profile.names) == set(layers_of(quantized)) and len(profile.names) > 30
    expected = torch.tensor([[of_step[name] / 127 for name in profile.names] for of_step in seen.values()])
    torch.testing.assert_close(profile.table, expected, rtol=1e-5, atol=0)
    assert torch.equal(run(apply(quantized, profile)), run(calibrated))
    ratios = layer_ratios(calibrated, full_weights(model, profile.names), run)
    table = host.run("IECQuantizationReport", model=calibrated, full_precision=model, **inputs)[0]
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.split("\n\n")[0].splitlines()[2:])
    assert set(rows) == set(ratios)
    for name, row in rows.items():
        assert float(row.split(" | ")[3]) == pytest.approx(ratios[name], abs=0.06), name
