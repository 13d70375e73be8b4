"""IECSaveQuantizedModel and IECLoadQuantizedModel on the host.

Tested are the loaded model, what ComfyUI's own loader does with a file, refusals, and memory.
"""

import ctypes
import functools
import gc
import json
import math
import os
import pathlib
import random
import resource
import time
import types

import pytest
import safetensors
import safetensors.torch
import torch
from pack import pack_module

SMALL = {"steps": 2, "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}}
FORMATS = {
    "W8A8": {},
    "W4A8": {"weight_bits": "4"},
    "W8A8, one scale a tensor": {"activation_scale": "tensor"},
    "W8A8, rotated": {"rotate": True},
    "W8A16": {"activation_bits": "16"},
    "W8A16, groups of 32": {"activation_bits": "16", "group_size": "32"},
    "W4A16, groups of 64, rotated": {"weight_bits": "4", "activation_bits": "16", "group_size": "64", "rotate": True},
    "W4A8, groups of 32, rotated": {"weight_bits": "4", "group_size": "32", "rotate": True},
    "W4A8, scales by search": {"weight_bits": "4", "weight_scale": "search"},
    "W4A16 of all layers": {"weight_bits": "4", "activation_bits": "16", "keep_sensitive_layers": False},
    "FP8 W8A8": {"weight_bits": "fp8"},
    "FP8 W8A16, rotated": {"weight_bits": "fp8", "activation_bits": "16", "rotate": True},
    "W8A8, output projections kept": {"keep_output_projections": True},
    "W8A8, only middle_block.* *.proj_in": {"include": "middle_block.* *.proj_in"},
}


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import folder_paths

    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def quantize(host):
    def run(model, **settings):
        settings = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True, **settings}
        return host.run("IECQuantizeModel", model=model, **settings)[0]

    return run


@pytest.fixture
def save(host, folder):
    def run(model, name="q"):
        host.run("IECSaveQuantizedModel", model=model, name=name)
        return folder / f"{name}.safetensors"

    return run


@pytest.fixture
def load(host, folder):
    return lambda name="q.safetensors": host.run("IECLoadQuantizedModel", model_name=name)[0]


def has_quantized_loader():
    import comfy.utils

    return hasattr(comfy.utils, "detect_layer_quantization")


def tensors_of(model):
    return model.model.state_dict()


def assert_same_weights(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


# The loaded model


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_model_is_the_same(model, sample, quantize, save, load, name):
    quantized = quantize(model, **FORMATS[name])
    expected = sample(quantized, **SMALL)
    save(quantized)
    loaded = load()
    assert loaded.model_options["transformer_options"]["iec_quantize"] == name
    assert_same_weights(quantized, loaded)
    assert torch.equal(sample(loaded, **SMALL), expected)
    assert not torch.equal(sample(model, **SMALL), expected)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_other_precisions_are_the_same(host, sample, quantize, save, load, precision):
    quantized = quantize(host.run("IECLoadBuiltinModel", precision=precision)[0])
    save(quantized)
    loaded = load()
    assert loaded.model.get_dtype() == getattr(torch, precision) and loaded.model_dtype() == quantized.model_dtype()
    assert_same_weights(quantized, loaded)
    assert torch.equal(sample(loaded, **SMALL), sample(quantized, **SMALL))


@pytest.mark.fast
def test_a_loaded_model_is_saved_as_the_same_file(model, quantize, save, load):
    first = save(quantize(model, weight_bits="4"))
    again = save(load(), "again")
    assert again.read_bytes() == first.read_bytes()


def lora(model, seed=0):
    """Return patches of a quantized layer, of its bias, and of layers that are not quantized."""
    generator, weights = torch.Generator().manual_seed(seed), model.model.state_dict()
    names = ("middle_block.1.proj_in.weight", "middle_block.1.proj_in.bias", "input_blocks.0.0.weight", "out.0.bias")
    keys = [f"diffusion_model.{name}" for name in names]
    return {key: (0.3 * torch.randn(weights[key].shape, generator=generator),) for key in keys}


@pytest.mark.parametrize("sampled_before", [False, True])
@pytest.mark.parametrize("settings", [{}, {"weight_bits": "4"}, {"weight_bits": "fp8", "rotate": True}])
def test_loras_are_in_the_file(model, sample, quantize, save, load, settings, sampled_before):
    """The LoRAs are saved even if the host has already merged them into the weights."""
    quantized = quantize(model, **settings)
    plain, patched = sample(quantized, **SMALL), quantized.clone()
    patch = lora(model)
    assert len(patched.add_patches(patch, 0.8)) == len(patch)
    expected = sample(patched, **SMALL) if sampled_before else None
    before = {name: tensor.clone() for name, tensor in tensors_of(quantized).items()}
    save(patched)
    assert all(
        torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) for name, tensor in tensors_of(quantized).items()
    )
    loaded = load()
    assert not loaded.patches
    result = sample(loaded, **SMALL)
    assert torch.equal(result, sample(patched, **SMALL) if expected is None else expected)
    assert not torch.equal(result, plain) and torch.equal(sample(quantized, **SMALL), plain)


def test_loras_reach_a_loaded_model(model, sample, quantize, save, load):
    quantized = quantize(model)
    save(quantized)
    loaded = load()
    for each in (quantized, loaded):
        each.add_patches(lora(model), 0.8)
    assert torch.equal(sample(loaded, **SMALL), sample(quantized, **SMALL))


def test_a_cache_profile_fits_the_loaded_model(host, model, sample, quantize, save, load, conditioning):
    """The profile gives the same result on the loaded model; it is refused for a file of the same model in another
    quantization.
    """
    quantized = quantize(model, weight_bits="4")
    settings = {"steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
    profile = host.run(
        "IECCalibrateCacheQuant", model=quantized, full_precision=model, positive=conditioning[0], negative=conditioning[1],
        latent_image=SMALL["latent_image"], seed=1, runs=1, interval=2, branch=0, **settings,
    )[0]  # fmt: skip
    save(quantized)
    settings["latent_image"] = SMALL["latent_image"]
    one, other = (sample(host.run("IECCacheQuant", model=each, profile=profile)[0], **settings) for each in (quantized, load()))
    assert torch.equal(one, other)
    save(quantize(model), "w8")
    with pytest.raises(ValueError, match="calibrated with quantization W4A8, but this MODEL has quantization W8A8"):
        sample(host.run("IECCacheQuant", model=load("w8.safetensors"), profile=profile)[0], **settings)


@pytest.fixture
def calibrate(host, conditioning):
    """Return calibrate(model, **settings), which gives the MODEL with calibrated activations, and their profile."""
    runs = {"steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "runs": 1, "seed": 5}
    runs |= {"positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(1, 3, 8, 8)}}
    runs["activation_scale"] = "absmax"
    return lambda model, **settings: host.run("IECCalibrateQuantization", model=model, **{**runs, **settings})


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, "timestep-wise"),
        ({"activation_scale": "tensor"}, "static"),
        ({"weight_bits": "4", "rotate": True}, "timestep-wise"),
    ],
    ids=str,
)
def test_calibrated_activations_are_in_the_file(model, sample, quantize, calibrate, save, load, settings, scales):
    quantized = quantize(model, **settings)
    calibrated = calibrate(quantized, scales=scales)[0]
    expected, first = sample(calibrated, **SMALL), save(calibrated)
    loaded = load()
    assert torch.equal(sample(loaded, **SMALL), expected)
    assert not torch.equal(sample(quantized, **SMALL), expected)
    assert save(loaded, "again").read_bytes() == first.read_bytes()
    save(quantized)  # replaces the file by one without them
    assert torch.equal(sample(load(), **SMALL), sample(quantized, **SMALL))


def test_scales_of_a_file_are_replaced_by_others(host, model, sample, quantize, calibrate, save, load):
    quantized = quantize(model)
    static, others = calibrate(quantized, scales="static")
    save(calibrate(quantized)[0])
    profile = host.run("IECApplyQuantizationProfile", model=load(), profile=others)[0]
    assert torch.equal(sample(profile, **SMALL), sample(static, **SMALL))
    again = calibrate(load(), scales="static")[0]
    assert torch.equal(sample(again, **SMALL), sample(static, **SMALL))


def test_damaged_scales_of_a_file_are_refused(model, quantize, calibrate, save, load):
    path, table = save(calibrate(quantize(model))[0]), "iec.activation_scales.table"
    changed(path, lambda about, tensors: {**tensors, table: -tensors[table]})
    with pytest.raises(ValueError, match=r"^model_name: 'q.safetensors' cannot be used: its scales of activations are damaged"):
        load()


def test_a_loaded_model_is_quantized_already(model, quantize, save, load):
    save(quantize(model))
    with pytest.raises(ValueError, match=r"^model: this MODEL is quantized already"):
        quantize(load())


def test_the_saved_file_is_named_and_listed(host, folder, model, quantize):
    node = host.nodes["IECSaveQuantizedModel"]
    told = node.execute(model=quantize(model), name="sub/one")
    assert told.ui["text"][0] == "models/diffusion_models/sub/one.safetensors"
    listed = host.nodes["IECLoadQuantizedModel"].define_schema().inputs[0].options
    assert [pathlib.PurePath(name).as_posix() for name in listed] == ["sub/one.safetensors"]
    assert host.nodes["IECLoadQuantizedModel"].fingerprint_inputs(listed[0]) > 0


# Networks that the host detects by itself


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 128}},
    "num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms", "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [0],
}  # fmt: skip
LTXV = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 256, "caption_channels": 12,
    "causal_temporal_positioning": True, "positional_embedding_max_pos": [20, 1024, 2048],
}  # fmt: skip
UNET = {
    "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1], "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "channel_mult": [1], "transformer_depth_middle": 1, "use_linear_in_transformer": False,
    "context_dim": 768, "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
NETWORKS = {  # (the host's class, unet_config, latent, dimension of a token)
    "SD3": ("SD3", SD3, (1, 16, 8, 8), 12),
    "LTXV": ("LTXV", LTXV, (1, 128, 2, 4, 6), 12),
    "UNet": ("SD15", UNET, (1, 4, 8, 8), 768),
}


def build(name, dtype=torch.float32):
    """Return a MODEL of the host's own class with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    kind, unet_config = NETWORKS[name][:2]
    config = getattr(comfy.supported_models, kind)(unet_config)
    config.set_inference_dtype(dtype, None)
    base = config.get_model({})
    generator = torch.Generator().manual_seed(1)
    for key, weight in base.diffusion_model.state_dict().items():
        value = torch.randn(weight.shape, generator=generator) * (weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1)
        weight.copy_(1 + value if weight.dim() == 1 and "weight" in key else value)
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def network(host):
    """Return network(name, dtype=float32), which gives its MODEL, made once."""
    return functools.cache(build)


@pytest.fixture
def sampled(host):
    """Return sampled(name, model), which gives latents of the host's own KSampler."""

    def run(name, model):
        latent, tokens = NETWORKS[name][2:]
        values = {"pooled_output": noise(1, 8, seed=4), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
        values = values if name != "UNet" else {}
        entries = [[[noise(1, 7, tokens, seed=seed), values]] for seed in (1, 2)]
        return host.common_ksampler(model, 3, 2, 2.0, "euler", "simple", *entries, {"samples": torch.zeros(latent)})[0][
            "samples"
        ]

    return run


DETECTED = [
    ("SD3", {}), ("SD3", {"weight_bits": "4", "rotate": True}), ("SD3", {"weight_bits": "fp8", "keep_sensitive_layers": False}),
    ("LTXV", {"rotate": True}), ("UNet", {}), ("UNet", {"weight_bits": "4", "keep_sensitive_layers": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), DETECTED)
def test_networks_are_detected_from_the_file(network, sampled, quantize, save, load, name, settings):
    quantized = quantize(network(name), **settings)
    save(quantized)
    loaded = load()
    assert type(loaded.model) is type(quantized.model) and loaded.model.model_type == quantized.model.model_type
    kinds = [{type(module) for module in each.model.diffusion_model.modules()} for each in (loaded, quantized)]
    assert kinds[0] == kinds[1]  # no class of the loader is left
    assert_same_weights(quantized, loaded)
    expected = sampled(name, quantized)
    assert expected.isfinite().all()
    assert torch.equal(sampled(name, loaded), expected)


def test_settings_that_weights_do_not_determine_are_saved(network, quantize, save, load):
    path = save(quantize(network("LTXV")))
    with safetensors.safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()["config"])["transformer"]
    wanted = {"causal_temporal_positioning": True, "positional_embedding_max_pos": [20, 1024, 2048], "caption_channels": 12}
    assert kept == wanted
    assert load().model.diffusion_model.causal_temporal_positioning is True


def test_a_bfloat16_network_is_detected(network, quantize, save, load):
    quantized = quantize(network("SD3", torch.bfloat16), weight_bits="4")
    save(quantized)
    assert_same_weights(quantized, load())


def test_marks_tell_the_host_how_a_model_is_sampled(host):
    """The marks are read by the host's SDXL class."""
    import comfy.model_base
    import comfy.supported_models

    marks, types_ = pack_module("nodes.host.quantization.save_file")._marks, comfy.model_base.ModelType
    cases = {
        types_.EPS: {}, types_.V_PREDICTION: {"zsnr": True},
        types_.EDM: {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002},
        types_.V_PREDICTION_EDM: {"sigma_max": 120.5, "sigma_min": 0.25},
    }  # fmt: skip
    for kind, settings in [*cases.items(), (types_.V_PREDICTION, {})]:
        base = types.SimpleNamespace(
            model_type=kind, model_config=types.SimpleNamespace(sampling_settings=settings, unet_config={})
        )
        config = comfy.supported_models.SDXL({"in_channels": 4})
        assert config.model_type(marks(base)) == kind
        assert config.sampling_settings == settings


def test_weights_are_kept_if_the_host_makes_them_late(network, model, quantize, save, load, monkeypatch):
    """On a host that makes weights only when it loads them, saving and loading keep the weights."""
    management = pytest.importorskip("comfy.memory_management", reason="this host always makes weights at once")
    for source in (network("SD3"), model):
        quantized = quantize(source)
        with monkeypatch.context() as patch:
            patch.setattr(management, "aimdo_enabled", True)
            save(quantized)
            loaded = load()
        assert_same_weights(quantized, loaded)


# ComfyUI's own loader


def stock(path, with_metadata=True):
    import comfy.sd
    import comfy.utils

    if with_metadata:
        return comfy.sd.load_diffusion_model(str(path))
    model = comfy.sd.load_diffusion_model_state_dict(comfy.utils.load_torch_file(str(path)))
    if model is None:
        raise RuntimeError("no model is known")  # the caller must raise this
    return model


OPENED = [
    {"activation_bits": "16"}, {}, {"activation_bits": "16", "rotate": True}, {"rotate": True}, {"weight_scale": "search"},
    {"activation_bits": "16", "weight_bits": "fp8"}, {"weight_bits": "fp8"}, {"include": "joint_blocks.1.*"},
]  # fmt: skip


@pytest.mark.parametrize("settings", OPENED, ids=str)
def test_stock_loader_opens_linear_8_bit_files(network, sampled, quantize, save, relative, settings):
    """Each layer gives the same output there; over a whole network, a value rounded in the other direction changes later
    layers.
    """
    if not has_quantized_loader() and settings.get("weight_bits") != "fp8":
        pytest.skip("the stock loader of ComfyUI before 0.33 does not read these files")
    quantized = quantize(network("SD3"), **settings)
    opened = stock(save(quantized))
    # The host always quantizes the input of an int8 layer.
    like = quantize(network("SD3"), **{**settings, "activation_bits": "8"})
    layers = pack_module("nodes.host.quantization.quantized_layers").quantized_layers(like.model.diffusion_model)
    assert len(layers) > 5
    for number, (name, layer) in enumerate(layers.items()):
        theirs = opened.model.diffusion_model.get_submodule(name)
        assert type(theirs.weight.data) is not torch.Tensor  # it is quantized there too
        assert relative(theirs.weight.dequantize(), layer.convert_weight(layer.weight)) < 1e-6
        x = noise(5, layer.in_features, seed=number)
        assert relative(theirs(x), layer(x)) < 1e-6, name
    ours, full = sampled("SD3", quantized), sampled("SD3", network("SD3"))
    assert relative(sampled("SD3", opened), ours) < 2 * relative(sampled("SD3", like), full) < 0.06


def in_four_bits(x, layer):
    """Return the output of the host's portable kernel for x and a rotated int4 layer, in float64: x is rotated and rounded to 4
    bits.
    """
    rotation, rows = layer.packing.format.rotation, layer.convert_weight(layer.weight).double()
    digits = torch.arange(rotation)[:, None], torch.arange(rotation)
    minuses = sum(digits[0] // 4**place % 4 + digits[1] // 4**place % 4 == 3 for place in range(round(math.log(rotation, 4))))
    matrix = (1 - 2 * (minuses % 2)).double() / rotation**0.5
    turned = (x.double().unflatten(-1, (-1, rotation)) @ matrix).flatten(-2)
    scale = turned.abs().amax(-1, keepdim=True) / 7
    rounded = ((turned / scale).round() * scale).unflatten(-1, (-1, rotation)) @ matrix
    return rounded.flatten(-2) @ rows.T + layer.bias.double()


@pytest.mark.parametrize("bits", ["8", "16"])
def test_stock_loader_opens_linear_rotated_4_bit_files(network, sampled, quantize, save, relative, bits):
    """The host's CUDA kernels take activations of 8 bits if the file says so; its portable kernel always rounds them to
    4 bits.
    """
    if not has_quantized_loader():
        pytest.skip("the stock loader of ComfyUI before 0.33 does not read these files")
    quantized = quantize(
        network("SD3"), weight_bits="4", rotate=True, activation_bits=bits, exclude="context_embedder"
    )  # it has too few inputs to rotate
    opened = stock(save(quantized))
    layers = pack_module("nodes.host.quantization.quantized_layers").quantized_layers(quantized.model.diffusion_model)
    assert len(layers) > 5
    for number, (name, layer) in enumerate(layers.items()):
        theirs = opened.model.diffusion_model.get_submodule(name)
        assert (theirs.quant_format, theirs.weight.data._params.linear_dtype) == ("convrot_w4a4", "int8")
        assert relative(theirs.weight.dequantize(), layer.convert_weight(layer.weight)) < 1e-6
        x = noise(5, layer.in_features, seed=number)
        assert relative(theirs(x), in_four_bits(x, layer)) < 1e-5, name
    ours, full = sampled("SD3", quantized), sampled("SD3", network("SD3"))
    assert relative(sampled("SD3", opened), full) < 2 * relative(ours, full) < 0.3


@pytest.mark.parametrize("group", ["16", "32", "128"])
def test_stock_loader_opens_linear_rotated_groups_of_4_bits(network, sampled, quantize, save, relative, group):
    """The host's portable kernel computes them as the pack does."""
    if not has_quantized_loader():
        pytest.skip("the stock loader of ComfyUI before 0.33 does not read these files")
    settings = {"weight_bits": "4", "rotate": True, "group_size": group, "include": "*.mlp.fc2"}  # of 512 inputs
    quantized = quantize(network("SD3"), **settings)
    opened = stock(save(quantized))
    layers = pack_module("nodes.host.quantization.quantized_layers").quantized_layers(quantized.model.diffusion_model)
    assert len(layers) == 3
    for number, (name, layer) in enumerate(layers.items()):
        theirs = opened.model.diffusion_model.get_submodule(name)
        assert (theirs.quant_format, theirs.weight.data._params.group_size) == ("asym_w4a8_int8", int(group))
        assert relative(theirs.weight.dequantize(), layer.convert_weight(layer.weight)) < 1e-6
        x = noise(5, layer.in_features, seed=number)
        assert relative(theirs(x), layer(x)) < 1e-6, name
    ours, full = sampled("SD3", quantized), sampled("SD3", network("SD3"))
    assert relative(sampled("SD3", opened), ours) < 0.2 * relative(ours, full) < 0.03


def test_stock_loader_opens_files_with_scales_of_activations(network, sampled, quantize, save, host):
    """The stock loader ignores these scales, and computes scales while it samples."""
    if not has_quantized_loader():
        pytest.skip("the stock loader of ComfyUI before 0.33 does not read these files")
    quantized = quantize(network("SD3"))
    scales = pack_module("iec_core.quantization.activation_scales").ActivationScales
    names = tuple(pack_module("nodes.host.quantization.quantized_layers").quantized_layers(quantized.model.diffusion_model))
    own = pack_module("nodes.host.quantization.weights").fingerprint(quantized)
    profile = scales({"quantization": "W8A8"}, own, names, torch.ones(1).double(), torch.full((1, len(names)), 0.1))
    scaled = host.run("IECApplyQuantizationProfile", model=quantized, profile=profile)[0]
    expected = sampled("SD3", stock(save(quantized)))
    assert torch.equal(sampled("SD3", stock(save(scaled))), expected)


def test_the_node_names_the_loaders_that_open_the_file(host, folder, network, quantize):
    """The statements agree with the tests above and below."""
    opens = "ComfyUI's own Load Diffusion Model opens it too, from 0.33 on."
    alone = "Only Load Quantized Model (IEC) opens it: ComfyUI has no such format for its layer {}."
    for settings, sentence in [
        *((settings, opens) for settings in OPENED),
        ({"weight_bits": "4", "rotate": True, "exclude": "context_embedder"}, opens),
        ({"weight_bits": "4", "rotate": True, "group_size": "16", "include": "*.mlp.fc2"}, opens),
        (
            {"weight_bits": "4", "rotate": True, "group_size": "16", "include": "*.mlp.fc1"},
            alone.format("joint_blocks.0.context_block.mlp.fc1 and 2 more"),
        ),
        ({"weight_bits": "4", "rotate": True}, alone.format("context_embedder")),
        (
            {"weight_bits": "4", "include": "joint_blocks.1.x_block.mlp.*"},
            alone.format("joint_blocks.1.x_block.mlp.fc1 and 1 more"),
        ),
    ]:
        quantized = quantize(network("SD3"), **settings)
        told = host.nodes["IECSaveQuantizedModel"].execute(model=quantized, name="q").ui["text"]
        assert told == ["models/diffusion_models/q.safetensors", sentence]


def test_no_other_loader_knows_the_built_in_model(host, folder, quantize):
    transformer = host.run("IECLoadBuiltinModel", precision="float32", architecture="transformer")[0]
    told = host.nodes["IECSaveQuantizedModel"].execute(model=quantize(transformer), name="q").ui["text"]
    sentence = "Only Load Quantized Model (IEC) opens it: ComfyUI does not know the network of the built-in model."
    assert told == ["models/diffusion_models/q.safetensors", sentence]
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        stock(folder / "q.safetensors")


def test_older_stock_loaders_fail_on_int8(network, quantize, save):
    if has_quantized_loader():
        pytest.skip("this host opens them")
    path = save(quantize(network("SD3")))
    with pytest.raises(KeyError, match="int8_tensorwise"):
        stock(path)


UNOPENED = [
    ("SD3", {"weight_bits": "4"}), ("SD3", {"weight_bits": "4", "include": "joint_blocks.1.x_block.mlp.fc1"}),
    ("SD3", {"activation_bits": "16", "group_size": "32"}), ("SD3", {"weight_bits": "fp8", "rotate": True}),
    ("SD3", {"keep_sensitive_layers": False}),
    ("UNet", {}), ("UNet", {"include": "middle_block.0.*"}), ("UNet", {"weight_bits": "fp8", "include": "middle_block.0.*"}),
    ("UNet", {"weight_bits": "4", "include": "middle_block.*"}), ("UNet", {"include": "middle_block.1.proj_in"}),
]  # fmt: skip


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize(("name", "settings"), UNOPENED, ids=str)
def test_stock_loader_fails_on_all_others(network, quantize, save, name, settings, with_metadata):
    """It fails at loading, not with a wrong picture; nodes that do not pass the metadata fail too."""
    if not with_metadata and not has_quantized_loader():
        pytest.skip("hosts before 0.33 find quantized layers by the metadata only")
    path = save(quantize(network(name), **settings))
    with pytest.raises((KeyError, IndexError, AttributeError, RuntimeError)):
        stock(path, with_metadata)


# Refusals


def test_a_model_that_is_not_quantized_is_refused(save, model, folder):
    with pytest.raises(ValueError, match=r"^model: this MODEL is not quantized; put Quantize Model .IEC. before this node"):
        save(model)
    assert list(folder.iterdir()) == []


def test_a_missing_file_is_refused(host, folder, load):
    (folder / "other.safetensors").write_bytes(b"junk")
    node = host.nodes["IECLoadQuantizedModel"]
    message = "model_name: there is no file 'none.safetensors' in models/diffusion_models; there are: other.safetensors."
    assert node.validate_inputs(model_name="none.safetensors") == message
    assert node.validate_inputs(model_name="../other.safetensors").startswith("model_name: there is no file '../other.safe")
    assert node.validate_inputs(model_name="other.safetensors") is True and node.validate_inputs(model_name=None) is True
    for name in ("none.safetensors", "../other.safetensors"):
        with pytest.raises(ValueError, match=r"^model_name: there is no file '.*' in models/diffusion_models"):
            load(name)


def changed(path, change):
    """Rewrite a file with change(description, tensors) applied, which may return new tensors."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["iec.quantized"])
    tensors = change(about, tensors) or tensors
    safetensors.torch.save_file(tensors, path, metadata | {"iec.quantized": json.dumps(about)})


def without(key):
    return lambda about, tensors: {name: tensor for name, tensor in tensors.items() if name != key}


DAMAGED = {
    "junk": (lambda path: path.write_bytes(b"junk"), "it is not a .safetensors file, or it is damaged"),
    "half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "it is truncated or too long"
    ),
    "another program's": (
        lambda path: safetensors.torch.save_file({"weight": torch.zeros(2)}, path), "it was not written by Save Quantized Model"
    ),
    "another version": (
        lambda path: changed(path, lambda about, tensors: about.update(version=9)), "it is of version 9, but only versions 1"
    ),
    "no bias": (
        lambda path: changed(path, without("joint_blocks.0.x_block.mlp.fc1.bias")), "joint_blocks.0.x_block.mlp.fc1.bias is"
    ),
    "no scale": (
        lambda path: changed(path, without("joint_blocks.0.x_block.mlp.fc1.weight_scale")), "'.*weight_scale' is missing"
    ),
    "a weight too many": (
        lambda path: changed(path, lambda about, tensors: tensors | {"more.weight": torch.zeros(2)}),
        r"its network has no weight more.weight of shape \(2,\)",
    ),
    "a bias of another shape": (
        lambda path: changed(path, lambda about, tensors: tensors | {"joint_blocks.0.x_block.mlp.fc1.bias": torch.zeros(3)}),
        r"its network has no weight joint_blocks.0.x_block.mlp.fc1.bias of shape \(3,\)",
    ),
    "a bias of integers": (
        lambda path: changed(
            path, lambda about, tensors: tensors | {"joint_blocks.0.x_block.mlp.fc1.bias": torch.zeros(512, dtype=torch.int64)}
        ),
        "its network has no weight joint_blocks.0.x_block.mlp.fc1.bias of shape .512,. and type torch.int64",
    ),
    "a network that the host does not know": (
        lambda path: changed(path, without("x_embedder.proj.weight")), "this ComfyUI cannot make a network from it .KeyError"
    ),
    "a network of another class": (
        lambda path: changed(path, lambda about, tensors: about.update(network="Flux")),
        "it is a Flux, but this ComfyUI would load it as a SD3",
    ),
    "the built-in network's class": (
        lambda path: changed(path, lambda about, tensors: about.update(network="BuiltinModel")),
        "this ComfyUI cannot make a network from it",
    ),
    "a network of very many layers": (  # the host counts the blocks by the width
        lambda path: changed(path, lambda about, tensors: tensors | {"x_embedder.proj.weight": torch.zeros(639936, 16, 1, 1)}),
        "this ComfyUI cannot make a network from it .ValueError: its network would have more layers than the file has weights.",
    ),
    "a network of another size": (
        lambda path: changed(path, lambda about, tensors: tensors | {"x_embedder.proj.weight": torch.zeros(192, 16, 2, 2)}),
        "joint_blocks.* is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(network, quantize, save, load, kind):
    path = save(quantize(network("SD3"), include="joint_blocks.*"))
    damage, message = DAMAGED[kind]
    damage(path)
    with pytest.raises(ValueError, match=rf"^model_name: 'q.safetensors' cannot be used: {message}.*\.$"):
        load()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_s_rel", 0x7F, "has a group whose scale is out of its range"),  # NaN
        ("weight_s_rel", 0x71, "has a group whose scale is out of its range"),
        ("weight_s_rel", 0x84, "has a group whose scale is out of its range"),  # below 0
        ("weight_s_channel", math.nan, "has a scale or a factor that is not finite"),
        ("weight_codebook", 0.5, "has levels for its 4 bits that these nodes do not know"),
    ],
)
def test_damaged_groups_are_refused(network, quantize, save, load, key, value, message):
    name = "joint_blocks.0.x_block.mlp.fc1"
    path = save(quantize(network("SD3"), weight_bits="4", group_size="16", include="joint_blocks.*"))
    changed(path, lambda about, tensors: {**tensors, f"{name}.{key}": torch.full_like(tensors[f"{name}.{key}"], value)})
    with pytest.raises(ValueError, match=rf"^model_name: 'q.safetensors' cannot be used: {name} {message}"):
        load()


def change_of_network(rng, about, tensors):
    """Change one thing in a file whose header stays valid."""
    keys, names = sorted(tensors), sorted(about["layers"])
    key, name, kind = rng.choice(keys), rng.choice(names) if names else "", rng.randrange(8)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[rng.choice([f"{key}.more", f"more.{key}", rng.choice(keys)])] = tensors.pop(key)
    elif kind in (2, 3):
        shape = list(tensors[key].shape) or [1]
        place = rng.randrange(len(shape))
        shape[place] = rng.choice([0, 1, shape[place] + 1, 2 * shape[place], shape[place] // 2])
        shape = rng.choice([shape, shape[::-1], [1, *shape], shape[1:]])
        tensors[key] = torch.zeros(shape, dtype=tensors[key].dtype)
    elif kind == 4:
        tensors[key] = tensors[key].to(rng.choice([torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]))
    elif kind == 5 and name:  # a layer that is no longer described
        del about["layers"][name]
    elif kind == 6 and name:  # a layer of another size
        rows, inputs = about["layers"][name]["shape"]
        rows, inputs = rng.choice([(2 * rows, inputs), (rows, 2 * inputs), (inputs, rows), (1, 1)])
        about["layers"][name]["shape"] = [rows, inputs]
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = torch.zeros(rows, inputs).char(), torch.ones(rows, 1)
    else:
        about.update(rng.choice([{"network": "Flux"}, {"network": "BuiltinModel"}, {"dtype": "float16"}, {"fingerprint": []}]))


@pytest.mark.parametrize("seed", range(3))
def test_changed_networks_are_read_or_refused(network, quantize, save, load, seed):
    """Each seed gives 100 valid files, which test the host's detection and the filling of its network."""
    path, rng, refused = save(quantize(network("SD3"), include="joint_blocks.*")), random.Random(seed), []
    whole = path.read_bytes()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        path.write_bytes(whole)
        changed(
            path,
            lambda about, tensors: [change_of_network(rng, about, tensors) for _ in range(rng.choice([1, 1, 2]))] and tensors,
        )
        began = time.perf_counter()
        try:
            assert load().model_options["transformer_options"]["iec_quantize"] == "W8A8, only joint_blocks.*"
        except ValueError as error:
            refused.append(str(error))
            assert refused[-1].startswith("model_name: 'q.safetensors' cannot be used: ") and refused[-1].isprintable()
        assert time.perf_counter() - began < 10
    assert 50 < len(refused) < 100 and len(set(refused)) > 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 100 * 1024  # KiB


def test_a_model_that_would_load_differently_is_refused(network, quantize, save, folder, monkeypatch):
    """A model is refused if the host cannot detect its settings from the weights, or if a part is not in the network."""
    quantized = quantize(network("SD3"))
    base, config = quantized.model, quantized.model.model_config
    with monkeypatch.context() as patch:
        patch.setitem(config.unet_config, "learn_sigma", True)
        with pytest.raises(
            ValueError, match=r"^model: it cannot be saved, because ComfyUI cannot detect its settings learn_sigma"
        ):
            save(quantized)
    with monkeypatch.context() as patch:
        patch.setattr(config, "sampling_settings", {"shift": 9.0})
        with pytest.raises(ValueError, match=r"cannot detect its sampling \(FLOW, {'shift': 9.0}\)"):
            save(quantized)
    with monkeypatch.context() as patch:
        patch.setattr(base, "__class__", type("Other", (type(base),), {}))
        with pytest.raises(ValueError, match="cannot detect its class Other from the weights and would load another model"):
            save(quantized)
    base.register_parameter("embedder", torch.nn.Parameter(torch.zeros(2)))
    try:
        with pytest.raises(
            ValueError, match=r"^model: it cannot be saved, because its weight embedder is not part of its diffusion network"
        ):
            save(quantized)
    finally:
        del base.embedder
    assert list(folder.iterdir()) == []
    save(quantized)


def test_a_network_that_the_host_does_not_know_is_refused(quantize, save, folder):
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD3({**SD3, "num_blocks": 3})  # not in the weights: the host counts by the width
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({})
    for weight in base.diffusion_model.state_dict().values():
        weight.fill_(0.5)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"^model: it cannot be saved, because ComfyUI cannot detect its settings num_blocks"):
        save(quantize(comfy.model_patcher.ModelPatcher(base, cpu, cpu)))
    assert list(folder.iterdir()) == []


# Incomplete files


def fail_at(monkeypatch, number, fail):
    """Let the reading of the weight with this number fail; each weight is first read once to describe it, which is not
    counted.
    """
    module, described, calls = pack_module("nodes.host.quantization.save_file"), set(), []
    original = module.patched_packed

    def read(model, name, layer):
        if name in described:
            calls.append(name)
        described.add(name)
        return fail() if len(calls) == number else original(model, name, layer)

    monkeypatch.setattr(module, "patched_packed", read)
    return calls


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failed_save_keeps_the_older_file(monkeypatch, model, quantize, save, load, folder, error):
    path = save(quantize(model))
    before = path.read_bytes()

    def fail():
        half = [name for name in os.listdir(folder) if name.endswith(".part")]
        assert len(half) == 1 and (folder / half[0]).stat().st_size > 0  # the write is in progress
        raise error

    with monkeypatch.context() as patch:
        calls = fail_at(patch, 40, fail)
        with pytest.raises(ValueError if isinstance(error, OSError) else type(error)) as raised:
            save(quantize(model, weight_bits="4"))
    assert len(calls) == 40
    if isinstance(error, OSError):
        assert str(raised.value) == "name: 'q' cannot be written to models/diffusion_models (disk full)."
    assert [path.name for path in folder.iterdir()] == ["q.safetensors"] and path.read_bytes() == before
    assert load().model_options["transformer_options"]["iec_quantize"] == "W8A8"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_crash_leaves_the_older_file(monkeypatch, model, quantize, save, load, folder):
    """The process ends abruptly during the write."""
    path, other = save(quantize(model)), quantize(model, weight_bits="4")
    before, child = path.read_bytes(), os.fork()
    if child == 0:
        try:
            fail_at(monkeypatch, 40, lambda: os._exit(9))
            save(other)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == before and len(list(folder.iterdir())) == 2
    names = pack_module("nodes.host.quantization.load_file").FILES.names()
    assert names == ["q.safetensors"]  # the incomplete file is not listed
    assert load().model_options["transformer_options"]["iec_quantize"] == "W8A8"


# Memory


def peak_of(run):
    """Return (result, peak growth of the process in bytes while run() ran)."""
    status = pathlib.Path("/proc/self/status")

    def read(name):
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier tests would be reused, and nothing would grow
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read("VmRSS")
    result = run()
    return result, read("VmHWM") - before


def big_file(path):
    """Write a file of an SD3 network of 254 million random 8-bit weights, without keeping them in memory; return the largest
    layer.
    """
    import comfy.supported_models

    core, quantization = pack_module("iec_core.quantization.quantized_file"), pack_module("iec_core.quantization.packing")
    params = {"in_features": 12, "out_features": 768}
    config = comfy.supported_models.SD3(
        {**SD3, "depth": 12, "context_embedder_config": {"target": "torch.nn.Linear", "params": params}}
    )
    config.set_inference_dtype(torch.bfloat16, None)
    weights = config.get_model({}, device="meta").diffusion_model.state_dict()
    big = {name for name, weight in weights.items() if weight.ndim == 2 and name.startswith("joint_blocks")}
    fmt = quantization.WeightFormat("int8")
    layers = {name.removesuffix(".weight"): core.LayerFile(tuple(weights[name].shape), fmt) for name in big}
    sources = {}
    for name, layer in layers.items():
        rows = layer.shape[0]
        sources[f"{name}.weight"] = torch.int8, layer.shape, lambda s=layer.shape: torch.randint(-9, 9, s, dtype=torch.int8)
        sources[f"{name}.weight_scale"] = torch.float32, (rows, 1), lambda rows=rows: torch.full((rows, 1), 1e-3)
        told = core._description_bytes(layer, 8)
        sources[f"{name}.comfy_quant"] = (
            torch.uint8, (len(told),), lambda told=told: torch.frombuffer(bytearray(told), dtype=torch.uint8)
        )  # fmt: skip
    for name in set(weights) - big:
        sources[name] = torch.bfloat16, weights[name].shape, lambda s=weights[name].shape: torch.zeros(s, dtype=torch.bfloat16)
    activation = {"bits": 8, "per_tensor": False}
    core.write(path, sources, core.description(layers, "W8A8", activation, "bfloat16", "SD3", torch.ones(4), {}))
    return max(rows * inputs for rows, inputs in (layer.shape for layer in layers.values()))


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell a process's peak of memory"
)
def test_no_second_copy_is_in_memory(folder, save, load):
    """A second copy would double the memory; layer by layer, only the model and the largest layers are in memory."""
    largest = big_file(folder / "q.safetensors")
    size = (folder / "q.safetensors").stat().st_size
    assert size > 250e6 and largest < 0.03 * size
    loaded, growth = peak_of(load)
    assert 0.9 * size < growth < 1.5 * size  # the model itself, and what earlier tests left in the process
    _, growth = peak_of(lambda: save(loaded, "again"))
    assert growth < 0.1 * size  # in addition to the model, which is already there
    assert_same_weights(loaded, load("again.safetensors"))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Record the bytes of the largest tensor that is made in memory."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made.device.type != "meta":
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 65536}, "its network has no"),
        ({"num_attention_heads": 65536, "caption_channels": 12, "in_channels": 65536}, "its network has no"),
        ({"num_attention_heads": -1}, "this ComfyUI cannot make a network from it"),
    ],
)
def test_numbers_of_a_file_take_no_memory(network, quantize, save, load, settings, message):
    """A file's settings determine the sizes of layers of all kinds: here norms of 524288 channels."""
    path = save(quantize(network("LTXV")))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["config"])
    about["transformer"] |= settings
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata | {"config": json.dumps(about)})
    largest = max(tensor.nbytes for tensor in tensors.values())
    with Largest() as seen, pytest.raises(ValueError, match=rf"^model_name: 'q.safetensors' cannot be used: {message}"):
        load()
    assert seen.nbytes <= max(largest, 2**20)
