"""IECCalibrateWeights on the host's networks: its inputs, the outputs of its layers, and how well it keeps the images."""

import copy
import functools
import logging
import math

import pytest
import safetensors.torch
import torch
from pack import pack_module
from tuned import tuned

SAMPLING = {"steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
# A 3 x 3 layer, which takes most of the time, two Linear layers, one of which has few inputs, and after them a 1 x 1 layer.
FEW = "mid*.0.in_* mid*.proj_in mid*.attn2.to_k out*.0.0.skip_*"


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def calibrate(host, model, conditioning):
    """Return calibrate(source, **settings), which gives the quantized MODEL, by default of a few layers, with 16-bit
    activations.
    """
    label = functools.partial(host.run, "IECClassLabel")

    def run(source=None, **settings):
        inputs = {
            "weight_bits": "4", "activation_bits": "16", "keep_sensitive_layers": True, "rank": "auto", "include": FEW,
            "positive": label(labels="heart, person")[0], "negative": conditioning[1], "runs": 1, "seed": 5,
            "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}, **SAMPLING, **settings,
        }  # fmt: skip
        return host.run("IECCalibrateWeights", model=source or model, **inputs)[0]

    return run


@pytest.fixture(scope="module")
def kept():
    """Return the results of `calibrated`, by its settings."""
    return {}


@pytest.fixture
def calibrated(calibrate, kept):
    """Return calibrate(**settings) for tests that do not change its result; each result is made once."""

    def made(**settings):
        key = frozenset(settings.items())
        if key not in kept:
            kept[key] = calibrate(**settings)
        return kept[key]

    return made


@pytest.fixture
def draw(host, conditioning):
    """Return draw(model), which gives latents of the host's own sampler, with another seed and other classes than the
    calibration.
    """

    def run(model, seed=31, side=16, **more):
        latent, settings = {"samples": torch.zeros(2, 3, side, side)}, {**SAMPLING, **more}
        arguments = [settings[name] for name in ("steps", "cfg", "sampler_name", "scheduler")]
        return host.common_ksampler(model, seed, *arguments, *conditioning, latent)[0]["samples"]

    return run


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


def layers_of(model):
    """Return {name: layer} of a MODEL's quantized layers."""
    return {name: layer for name, layer in model.model.diffusion_model.named_modules() if hasattr(layer, "packing")}


def taken(model, source, x_of):
    """Return {name: (output of a quantized layer, the source layer's output in float64 with the dequantized weight)}."""
    full, found = dict(source.model.diffusion_model.named_modules()), {}
    for name, layer in layers_of(model).items():
        reference = copy.deepcopy(full[name]).double()
        reference.weight.data = layer.packing.dequantize(layer.weight).double()
        if layer.bias is not None:
            reference.bias.data = layer.bias.double()
        x = x_of(full[name])
        found[name] = layer(x), reference(x.double())
    return found


def random_input(layer):
    generator = torch.Generator().manual_seed(3)
    shape = (2, layer.in_channels, 9, 8) if hasattr(layer, "in_channels") else (2, 5, layer.in_features)
    return torch.randn(shape, generator=generator)


@pytest.mark.fast
def test_images_are_nearer_to_full_precision_than_with_the_nearest_integers(host, builtin_model, calibrate, draw):
    outer = {"include": "input_blocks.1.* input_blocks.3.* output_blocks.5.* output_blocks.6.* output_blocks.7.*"}
    expected = draw(builtin_model)
    inputs = {"weight_bits": "4", "activation_bits": "16", "keep_sensitive_layers": True, **outer}
    nearest = relative(draw(host.run("IECQuantizeModel", model=builtin_model, **inputs)[0]), expected)
    gptq, branch = (relative(draw(calibrate(builtin_model, rank=rank, **outer)), expected) for rank in ("0", "auto"))
    assert gptq < 0.5 * nearest and branch < 0.4 * gptq


def test_names_and_sizes_agree_with_the_settings(host, model, calibrated):
    import comfy.model_management

    made = {rank: calibrated(rank=rank) for rank in ("0", "8", "auto")}
    names = {rank: one.model.iec_quantization for rank, one in made.items()}
    assert names == {
        "0": f"W4A16, GPTQ, only {FEW}", "8": f"W4A16, GPTQ, rank 8, only {FEW}", "auto": f"W4A16, GPTQ, rank 16, only {FEW}",
    }  # fmt: skip
    assert calibrated(weight_bits="8").model.iec_quantization == f"W8A16, GPTQ, only {FEW}"
    sizes = {rank: comfy.model_management.module_size(one.model) for rank, one in made.items()}
    shapes = [layer.packing.shape for layer in layers_of(made["8"]).values()]
    factors = sum(2 * 8 * (shape[0] + math.prod(shape[1:])) for shape in shapes)
    assert factors <= sizes["8"] - sizes["0"] < factors + 16 * len(shapes)
    ranks = [layer.packing.format.rank for layer in layers_of(made["auto"]).values()]
    assert set(ranks) == {16} and sizes["auto"] > sizes["8"]


@pytest.mark.parametrize("activation_bits", ["16", "8"])
@pytest.mark.parametrize("rotate", [False, True])
def test_layers_compute_with_integers_and_branch(model, calibrate, rotate, activation_bits):
    made = calibrate(rotate=rotate, activation_bits=activation_bits, rank="8")
    limit = 1e-5 if activation_bits == "16" else 0.02
    found = taken(made, model, random_input)
    kinds = {(type(layer).__name__, tuple(layer.packing.shape[2:])) for layer in layers_of(made).values()}
    assert kinds == {("QuantizedLinear", ()), ("QuantizedConv2d", (1, 1)), ("QuantizedConv2d", (3, 3))}
    for name, (out, expected) in found.items():
        assert relative(out.double(), expected) < limit, name
    for name, layer in layers_of(made).items():  # 8 bits round the integers' input, not the branch's
        without = copy.copy(layer.packing)
        without.factors = lambda packed: None
        x, (out, _) = random_input(dict(model.model.diffusion_model.named_modules())[name]), found[name]
        branch = out - type(layer).of(name, layer, without, layer.weight, layer.bias, layer.activation)(x)
        out_of, into = layer.packing.factors(layer.weight)
        into = layer.packing.shaped(into.float())
        if x.ndim == 3:
            expected = (x @ into.t()) @ out_of.float().t()
        else:
            thin = torch.nn.functional.conv2d(x, into, None, layer.stride, layer.padding)
            expected = torch.nn.functional.conv2d(thin, out_of.float()[:, :, None, None])
        torch.testing.assert_close(branch, expected, rtol=1e-3, atol=1e-4 * out.abs().amax().item())


def test_moments_include_all_inputs_of_the_layers(monkeypatch, model, calibrate):
    """Its moments are those of all inputs during the runs, as the test's hooks see them."""
    module = pack_module("nodes.host.quantization.weight_calibration")
    monkeypatch.setattr(module, "POSITIONS", 10**6)
    seen, names = {}, {"middle_block.1.proj_in", "middle_block.2.in_layers.2"}
    fit = module.calibrated_weight

    def note(weight, packing, moments):
        seen[tuple(packing.shape)] = moments
        return fit(weight, packing, moments)

    monkeypatch.setattr(module, "calibrated_weight", note)
    inputs = {name: [] for name in names}
    modules = dict(model.model.diffusion_model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].double()))
        for name in names
    ]
    try:
        calibrate(include=" ".join(names), runs=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 2
    for name in names:
        x = inputs[name]
        layer, count = modules[name], 2 * 4 * (2 * 2)  # runs, steps, images with and without the prompt
        assert sum(len(part) for part in x) == count
        if hasattr(layer, "in_channels"):
            unfold = functools.partial(torch.nn.functional.unfold, kernel_size=layer.kernel_size, padding=layer.padding)
            channels = layer.in_channels
            rows = torch.cat([unfold(part).permute(0, 2, 1).flatten(0, 1) for part in x])
            rows = rows.unflatten(1, (channels, -1)).permute(0, 2, 1).flatten(1)  # channels last
        else:
            rows = torch.cat([part.flatten(0, -2) for part in x])
        moments = seen[tuple(layer.weight.shape)]
        assert moments.count == len(rows)
        assert relative(moments.products[0].double(), rows.t() @ rows) < 1e-5


def test_passes_of_fewer_layers_give_the_same(monkeypatch, model, calibrate, caplog):
    few = {"include": "middle_block.0.* middle_block.1.proj_in", "steps": 2}
    one = calibrate(**few)
    module, passes = pack_module("nodes.host.quantization.weight_calibration"), []

    def halves(inputs, memory):
        names = list(inputs)
        passes.extend([names[:2], names[2:]])
        return passes

    monkeypatch.setattr(module, "in_passes", halves)
    with caplog.at_level(logging.INFO):
        other = calibrate(**few)
    assert all(passes) and "The calibration's runs are done 2 times" in caplog.text
    for name, layer in layers_of(one).items():
        assert torch.equal(layer.weight, layers_of(other)[name].weight), name


def test_passes_keep_to_the_memory_and_take_each_layer_once(host):
    module = pack_module("nodes.host.quantization.weight_calibration")
    inputs = {f"layer.{number}": size for number, size in enumerate([320, 11520, 1280, 23040, 5120, 5120, 17280, 64] * 4)}
    for gigabytes in (0.1, 1, 4, 100):
        memory = int(gigabytes * 2**30)
        passes = module.in_passes(inputs, memory)
        assert [name for names in passes for name in names] == list(inputs)
        for names in passes:
            blocks = {name: module._block(inputs[name], memory) for name in names}
            sizes = [4 * inputs[name] * block for name, block in blocks.items()]
            assert sum(sizes) <= memory and module.WORKSPACE * max(sizes) <= memory
        assert (len(passes) > 1) == (gigabytes < 100)
    assert module._block(11520, 4 * 2**30) == 11520  # SDXL's usual convolutions whole, its four largest in blocks
    assert module._block(17280, 4 * 2**30) < 17280


def test_a_network_of_sdxls_shape_is_less_than_a_third_of_float16(host):
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from networks import SDXL

    quantize = pack_module("nodes.host.quantization.quantize")
    network = UNetModel(**SDXL, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)
    weight = quantize.WeightFormat("int4", calibrated=True, rank=16)
    made = quantize.Quantization(weight, quantize.ActivationFormat(8))
    layers = quantize.quantizable_layers(network)
    chosen = made.rules.select(list(layers))
    full = sum(parameter.numel() * 2 for parameter in network.parameters())
    saved = sum(layers[name].weight.numel() * 2 - made.packing(layers[name].weight.shape).nbytes for name in chosen)
    assert 0.26 < (full - saved) / full < 0.28


def test_source_is_unchanged(model, calibrate, draw):
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    images = draw(model)
    made = calibrate()
    assert relative(draw(made), images) > 0
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    assert torch.equal(draw(model), images)
    hooks = [layer for layer in model.model.diffusion_model.modules() if layer._forward_pre_hooks or layer._forward_hooks]
    assert not hooks and not model.wrappers.get("apply_model", {}).get("iec_watched")
    assert not model.object_patches and not model.additional_models and "iec_quantize" not in model.model_options


def test_loras_before_the_node_are_part_of_the_weight_and_of_the_runs(host, model, calibrate, calibrated, draw):
    key, generator = "diffusion_model.middle_block.1.proj_in.weight", torch.Generator().manual_seed(2)
    weight = model.model.state_dict()[key]
    patched = model.clone()
    change = torch.randn(weight.shape, generator=generator) * weight.std()
    patched.add_patches({key: ("diff", (change,))}, 1.0)
    made, plain = calibrate(patched), calibrated(rank="auto")
    assert key not in made.patches
    layer = layers_of(made)["middle_block.1.proj_in"]
    assert relative(layer.packing.dequantize(layer.weight), weight + change) < 0.2
    behind = "output_blocks.0.0.skip_connection"  # its input is changed by the LoRA
    assert not torch.equal(layers_of(made)[behind].weight, layers_of(plain)[behind].weight)
    assert relative(draw(made), draw(patched)) < relative(draw(plain), draw(patched))


def test_a_lora_after_the_node_is_appended_to_the_branch(calibrate, draw):
    """Tested on the loaded, the offloaded and the unpatched model; a LoRA without effect leaves the layer the same bit
    for bit.
    """
    name = "middle_block.1.proj_in"
    made, key = calibrate(include=f"{name} middle_block.0.in_layers.2"), f"diffusion_model.{name}.weight"
    layer, plain = layers_of(made)[name], draw(made)
    before, packed = layer.packing.dequantize(layer.weight), layer.weight.clone()
    x = torch.randn(2, 16, layer.packing.inputs, generator=torch.Generator().manual_seed(3))
    change = torch.randn(len(before), 3, generator=torch.Generator().manual_seed(2)) * before.std() @ x[0, :3]
    for added in (torch.zeros_like(before), change / 100, change):
        wanted = layer.packing.changed(before + added, packed)
        assert torch.equal(wanted, packed) == (not added.any())
        assert all(torch.equal(*pair) for pair in zip(layer.packing.stored(wanted), layer.packing.stored(packed)))
        rank, branches = layer.packing.format.rank, [layer.packing.factors(one) for one in (wanted, packed)]
        assert torch.equal(branches[0][0][:, :rank], branches[1][0]) and torch.equal(branches[0][1][:rank], branches[1][1])
        assert relative(layer.packing.dequantize(wanted) - before, added) < 2e-3 or not added.any()
        patched, out = made.clone(), []
        patched.add_patches({key: ("diff", (added,))}, 1.0)
        for how in ({"lowvram_model_memory": 1}, {"full_load": True}):
            patched.load(torch.device("cpu"), **how)
            out.append(layer(x))
            assert torch.equal(layer.weight, wanted) or "full_load" not in how
            patched.detach()
        assert torch.equal(*out) and torch.equal(layer.weight, packed)
        assert torch.equal(draw(patched), plain) == (not added.any())
        patched.detach()
    assert torch.equal(draw(made), plain)


def test_a_saved_and_loaded_model_is_bit_identical(host, model, calibrated, draw, tmp_path, monkeypatch):
    import folder_paths

    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    for number, settings in enumerate(
        ({"activation_bits": "8", "group_size": "16"}, {"rotate": True, "group_size": "32"}, {"weight_bits": "8"})
    ):
        made = calibrated(**settings)
        host.run("IECSaveQuantizedModel", model=made, name=f"made{number}")
        back = host.run("IECLoadQuantizedModel", model_name=f"made{number}.safetensors")[0]
        assert back.model.iec_quantization == made.model.iec_quantization
        one, other = (each.model.state_dict() for each in (made, back))
        network = {key for key in one if key.startswith("diffusion_model.")}
        assert network and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in network)
        assert torch.equal(draw(back), draw(made))
        tensors = safetensors.torch.load_file(folder / f"made{number}.safetensors")
        factors = [key for key in tensors if key.endswith((".weight_out", ".weight_in"))]
        assert len(factors) == (0 if number == 2 else 2 * len(layers_of(made)))


def test_the_report_has_each_layers_format(host, model, calibrated, conditioning):
    made = calibrated(rank="auto")
    inputs = {"positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}}
    table = host.run(
        "IECQuantizationReport", model=made, full_precision=model, **inputs, seed=1, runs=1, **SAMPLING
    )[0]  # fmt: skip
    assert table.count("int4, GPTQ, rank 16, activations 16 bits") == len(layers_of(made))


def test_further_nodes_take_the_model(host, model, calibrated, conditioning, draw):
    """Activation scales are calibrated on it, a cache is applied to it, and corrections run with it."""
    made = calibrated(activation_bits="8")
    inputs = {"positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}}
    scaled, profile = host.run("IECCalibrateQuantization", model=made, **inputs, seed=1, runs=1, **SAMPLING)
    assert profile.facts["quantization"] == f"W4A8, GPTQ, rank 16, only {FEW}"
    images = []
    for one in (scaled, model):
        cached = host.run("IECDeepCache", model=one, interval=2, branch=0)[0]
        settings = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
        images.append(draw(host.run("IECApply", model=cached, **settings)[0]))
    assert 0 < relative(*images) < 0.1


def test_a_compiled_layer_with_a_branch_is_one_graph(calibrate):
    import torch._dynamo

    torch._dynamo.reset()
    made = calibrate(include="middle_block.0.*", activation_bits="8")
    layer = layers_of(made)["middle_block.0.in_layers.2"]
    x = torch.randn(1, layer.packing.shape[1], 6, 6, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer.forward_comfy_cast_weights, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@torch.inference_mode(False)
def test_gradients_flow_through_a_branch(model, calibrate):
    """The derivatives are those of the dequantized weight, which is the whole weight."""
    straight_through, normal_tensors = (
        pack_module("nodes.host.quantization.quantized_layers").straight_through,
        pack_module("nodes.host.correction.contraction").NormalTensors,
    )
    with torch.no_grad():
        made = calibrate(include="middle_block.1.proj_in middle_block.0.in_layers.2", rotate=True, steps=1)
    full = dict(model.model.diffusion_model.named_modules())
    with straight_through(made.model.diffusion_model), normal_tensors():
        for name, layer in layers_of(made).items():
            x, weight = random_input(full[name]).requires_grad_(), layer.packing.dequantize(layer.weight.clone())
            product = torch.nn.functional.linear if x.ndim == 3 else functools.partial(torch.nn.functional.conv2d, padding=1)
            sent = torch.randn_like(layer(x))
            (found,) = torch.autograd.grad(layer(x), x, sent)
            (expected,) = torch.autograd.grad(product(x, weight), x, sent)
            assert relative(found, expected) < 1e-5, name


def test_layers_that_do_not_run_are_rounded_to_nearest_and_reported(model, calibrate, caplog):
    idle = model.model.diffusion_model.middle_block[0]
    unused = torch.nn.ModuleDict({"unused": type(idle.emb_layers[1])(8, 4, dtype=torch.float32, device="cpu")})
    unused["unused"].weight.data = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    unused["unused"].bias.data.zero_()
    idle.add_module("extra", unused)
    try:
        with caplog.at_level(logging.INFO):
            made = calibrate(include="middle_block.0.*")
    finally:
        del idle.extra
    assert "did not run are rounded to nearest: 1 (middle_block.0.extra.unused)" in caplog.text
    layer = layers_of(made)["middle_block.0.extra.unused"]
    assert not layer.packing.format.calibrated and layer.packing.format.rank == 0
    scale = unused["unused"].weight.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(layer.packing.dequantize(layer.weight), (unused["unused"].weight / scale).round() * scale)


def test_nan_in_the_calibration_is_refused(model, calibrate):
    sick = tuned(model)
    sick.model.diffusion_model.middle_block[0].in_layers[2].bias.data[3] = math.nan
    with pytest.raises(ValueError, match=r"^model: .*NaN or infinity"):
        calibrate(sick)


def test_a_quantized_model_is_refused(model, calibrate, calibrated):
    with pytest.raises(ValueError, match="this MODEL is quantized already"):
        calibrate(calibrated(rank="auto"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": "12"}, "^rank: '12' is none of auto, 0, 8, 16, 32, 64"),
        ({"group_size": "64", "activation_bits": "8", "weight_bits": "8"}, "^group_size: 64 works with weight_bits 8 only if"),
        ({"compute": "8-bit"}, "^compute: 8-bit works only with activation_bits 8"),
        ({"memory_gb": 0.0}, "^memory_gb: 0.0 is outside"),
        ({"include": "nowhere.*"}, r"^include: 'nowhere\.\*' matches none"),
        ({"sampler_name": "best"}, "^sampler_name"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(calibrate, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(**settings)


@pytest.mark.parametrize("when", ["sampling", "rounding"])
def test_an_interrupt_leaves_the_model_unchanged(model, calibrate, draw, monkeypatch, when):
    import comfy.model_management as management

    before, calls = draw(model), []
    real = management.throw_exception_if_processing_interrupted

    def interrupted():
        import traceback

        inside = any("weight_calibration" in frame.filename for frame in traceback.extract_stack()[-3:-1])
        calls.append(inside)
        if (when == "rounding" and inside) or (when == "sampling" and len(calls) > 3):
            raise management.InterruptProcessingException()
        real()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(management.InterruptProcessingException):
        calibrate()
    monkeypatch.undo()
    assert any(calls) == (when == "rounding")
    assert torch.equal(draw(model), before)
    assert not any(layer._forward_pre_hooks for layer in model.model.diffusion_model.modules())


def test_the_bar_counts_the_steps_of_all_passes_and_the_layers(calibrate, monkeypatch):
    import comfy.utils

    bars = []

    class Bar:
        def __init__(self, total, *_, **__):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, value):
            self.done += value

        def update_absolute(self, *_, **__):
            pass

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    monkeypatch.setattr(
        pack_module("nodes.host.quantization.weight_calibration"),
        "in_passes",
        lambda inputs, memory: [[name] for name in inputs],
    )
    made = calibrate(runs=2, steps=2, include="middle_block.0.*")
    (bar,) = [bar for bar in bars if bar.done]
    count = len(layers_of(made))
    assert count > 1 and bar.done == bar.total == count * 2 * 2 + count


@pytest.mark.parametrize(("precision", "factors"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_factors_have_the_models_dtype(host, calibrate, precision, factors):
    source = host.run("IECLoadBuiltinModel", precision=precision)[0]
    made = calibrate(source, include="middle_block.1.proj_in")
    layer = layers_of(made)["middle_block.1.proj_in"]
    assert {part.dtype for part in layer.packing.factors(layer.weight)} == {factors}


def test_a_transformer_is_calibrated_too(host, calibrate):
    source = host.run("IECLoadBuiltinModel", precision="float32", architecture="transformer")[0]
    made = calibrate(source, include="*.0.*", scheduler="simple", steps=6, runs=3)
    positive, negative = (host.run("IECClassLabel", labels=labels)[0] for labels in ("face, flag", "none"))

    def draw(model):
        latent = {"samples": torch.zeros(2, 3, 16, 16)}
        return host.common_ksampler(model, 31, 4, 2.0, "euler", "simple", positive, negative, latent)[0]["samples"]

    inputs = {"weight_bits": "4", "activation_bits": "16", "keep_sensitive_layers": True, "include": "*.0.*"}
    nearest = host.run("IECQuantizeModel", model=source, **inputs)[0]
    assert relative(draw(made), draw(source)) < 0.8 * relative(draw(nearest), draw(source))
