"""A quantized MODEL in the rest of the host: LoRAs after it, the host's own save nodes, a Control-LoRA."""

import pathlib

import pytest
import torch
from pack import pack_module

SMALL = {"steps": 2, "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}}
CHANGED = [f"middle_block.1.{name}.weight" for name in ("proj_in", "proj_out", "transformer_blocks.0.ff.net.2")]


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantize(host, model):
    def run(source=None, **settings):
        settings = {"weight_bits": "8", "activation_bits": "16", "keep_sensitive_layers": True, **settings}
        return host.run("IECQuantizeModel", model=source or model, **settings)[0]

    return run


# Changes that no branch can hold


@pytest.fixture
def no_branch(monkeypatch):
    """Treat changes of these sizes as of too high a rank for the branch."""
    packing = pack_module("iec_core.quantization.packing").Packing
    monkeypatch.setattr(packing, "most_rank", 0)
    monkeypatch.setattr(packing, "most_rank_found", 0)


def changes(model, size):
    """Return {name: change}; a change's norm is `size` times the weight's norm."""
    weights = {name: model.model.get_parameter(f"diffusion_model.{name}") for name in CHANGED}
    found = {name: noise(*weight.shape, seed=len(name)) for name, weight in weights.items()}
    return {name: change * (size * weights[name].norm() / change.norm()) for name, change in found.items()}


def with_lora(source, model, size=0.01):
    clone = source.clone()
    patches = {f"diffusion_model.{name}": (change,) for name, change in changes(model, size).items()}
    assert len(clone.add_patches(patches, 1.0)) == len(CHANGED)
    return clone


def kept(model, size, limit):
    """Return the kept share of the changes when they are added to a rounded weight, which is then rounded again.

    It is the projection on the changes. The scales, one per output channel, stay the same; by the definition of the format, in
    float64.
    """
    asked = left = 0
    for name, change in changes(model, size).items():
        rows = model.model.get_parameter(f"diffusion_model.{name}").double().flatten(1)
        scale, change = rows.abs().amax(1, keepdim=True) / limit, change.double().flatten(1)
        before = (rows / scale).round() * scale
        after = ((before + change) / scale).round().clamp(-limit, limit) * scale
        asked += change.square().sum()
        left += (change * (after - before)).sum()
    return (left / asked).item()


def warnings(caplog):
    return [text for text in caplog.messages if text.startswith("[ComfyUI-IEC] This quantized MODEL (")]


@pytest.mark.parametrize(
    ("settings", "name", "limit", "size"),
    [
        ({"weight_bits": "4"}, "W4A16", 7, 0.01), ({"weight_bits": "4"}, "W4A16", 7, 0.05),
        ({"weight_bits": "8"}, "W8A16", 127, 0.001),
    ],
)  # fmt: skip
def test_a_lora_that_is_rounded_away_is_warned_of_once(no_branch, quantize, model, sample, caplog, settings, name, limit, size):
    patched = with_lora(quantize(**settings), model, size)
    sample(patched, **SMALL)
    sample(patched, **SMALL)
    (said,) = warnings(caplog)
    share = kept(model, size, limit)
    assert share < 0.9 and f"({name}) keeps a share of {share:.2f}" in said and "before the node that quantizes" in said


def test_a_lora_with_its_full_effect_gives_no_warning(quantize, model, sample, caplog):
    assert kept(model, 0.01, 127) > 0.9
    sample(with_lora(quantize(), model), **SMALL)
    sample(quantize(with_lora(model, model), weight_bits="4"), **SMALL)  # before quantization
    sample(quantize(weight_bits="4"), **SMALL)
    assert warnings(caplog) == []


def test_another_lora_gives_another_warning(no_branch, quantize, model, sample, caplog):
    quantized = quantize(weight_bits="fp8")
    for size in (0.01, 0.02):
        sample(with_lora(quantized, model, size), **SMALL)
    one, other = warnings(caplog)
    assert "(FP8 W8A16) keeps a share of 0." in one and one != other


@pytest.mark.parametrize("settings", [{}, {"correction_steps": "auto"}, {"sampler_name": "dpm_adaptive"}])
def test_ksampler_reports_warn_of_a_rounded_away_lora(no_branch, quantize, model, sample, caplog, settings):
    """A run without the LoRA has no such warning, though both use the same network. dpm_adaptive's steps are not known."""
    quantized, found = quantize(weight_bits="4"), []
    patched = with_lora(quantized, model)
    for source in (patched, quantized, patched, patched.clone()):
        sample(source, found, label="mine", **{**SMALL, **settings})
    (said,) = warnings(caplog)
    sentence = said.removeprefix("[ComfyUI-IEC] ")
    assert [run.warnings for run in found] == [[f"mine: {sentence}"], [], [f"mine: {sentence}"], [f"mine: {sentence}"]]
    assert found[0].as_dict()["warnings"] == found[0].warnings


def test_apply_iec_and_iec_sampler_reports_warn_of_a_rounded_away_lora(no_branch, host, quantize, model, conditioning):
    patched = with_lora(quantize(weight_bits="4"), model)
    settings = {"correction_steps": "none", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    sampler = host.run("KSamplerSelect", sampler_name="euler")[0]
    applied, of_model = host.run("IECApply", model=patched, **settings)
    wrapped, of_sampler = host.run("IECSampler", sampler=sampler, **settings)
    for source, its_sampler in ((applied, sampler), (patched, wrapped)):
        host.run(
            "SamplerCustom", model=source, add_noise=True, noise_seed=7, cfg=2.0, positive=conditioning[0],
            negative=conditioning[1], sampler=its_sampler, latent_image=SMALL["latent_image"],
            sigmas=host.run("BasicScheduler", model=patched, scheduler="karras", steps=2, denoise=1.0)[0],
        )  # fmt: skip
    for (report,) in (of_model, of_sampler):
        (said,) = report.warnings
        assert "(W4A16) keeps a share of 0." in said


def test_a_hook_lora_is_warned_of_only_in_its_own_runs(no_branch, host, quantize, model, conditioning):
    """The patches of a conditioning's LoRA are on the MODEL only during the run with this conditioning."""
    import comfy.hooks

    name = f"diffusion_model.{CHANGED[0].removesuffix('.weight')}"
    out, into = model.model.get_parameter(f"{name}.weight").shape[:2]
    lora = {f"{name}.lora_up.weight": noise(out, 8) / 1000, f"{name}.lora_down.weight": noise(8, into)}
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning[0], comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    settings = {"correction_steps": "none", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    applied, found = host.run("IECApply", model=quantize(weight_bits="4"), **settings)
    for positive in (conditioning[0], hooked, conditioning[0], hooked):
        latent = SMALL["latent_image"]
        host.common_ksampler(applied, 7, 2, 2.0, "euler", "karras", positive, conditioning[1], latent, 1.0)
    assert ["keeps a share of 0." in " ".join(run.warnings) for run in found] == [False, True, False, True]


def test_saving_warns_too(no_branch, host, quantize, model, caplog, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    host.run("IECSaveQuantizedModel", model=with_lora(quantize(weight_bits="4"), model), name="q")
    assert len(warnings(caplog)) == 1


# Devices without float8


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="the probe must fail, which needs a device that is not there")
def test_float8_is_refused_on_a_device_without_it(host, quantize, model, tmp_path, monkeypatch):
    """MPS is such a device."""
    import comfy.model_management
    import folder_paths

    mps = torch.device("mps")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    host.run("IECSaveQuantizedModel", model=quantize(weight_bits="fp8"), name="q")
    elsewhere = model.clone()
    elsewhere.load_device = mps
    with pytest.raises(
        ValueError, match=r"^weight_bits: fp8 does not work on this device \(mps\), which has no float8; choose 8 or"
    ):
        quantize(elsewhere, weight_bits="fp8")
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: mps)
    with pytest.raises(
        ValueError, match=r"'q.safetensors' cannot be used: its weights are float8, and this device \(mps\) has no float8"
    ):
        host.run("IECLoadQuantizedModel", model_name="q.safetensors")


# The host's own save nodes


@pytest.mark.parametrize("node", ["ModelSave", "CheckpointSave", "ImageOnlyCheckpointSave"])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_hosts_own_save_nodes_refuse(host, quantize, sample, tmp_path, monkeypatch, node, loaded):
    import folder_paths
    from comfy_extras import nodes_model_merging, nodes_video_model

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    quantized = quantize()
    if loaded:
        models = tmp_path / "models"
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(models)], {".safetensors"}))
        host.run("IECSaveQuantizedModel", model=quantized, name="q")
        quantized = host.run("IECLoadQuantizedModel", model_name="q.safetensors")[0]
    before = set(tmp_path.rglob("*.safetensors"))
    expected = sample(quantized, **SMALL)
    parts = {} if node == "ModelSave" else {"clip" if node == "CheckpointSave" else "clip_vision": None, "vae": None}
    saver = (nodes_video_model if node == "ImageOnlyCheckpointSave" else nodes_model_merging).__dict__[node]()
    with pytest.raises(ValueError, match=r"^model: this MODEL is quantized, .* save it with Save Quantized Model \(IEC\)\.$"):
        saver.save(quantized.clone(), filename_prefix="c", **parts)
    assert set(tmp_path.rglob("*.safetensors")) == before
    assert torch.equal(sample(quantized, **SMALL), expected)


def test_the_source_can_still_be_saved(quantize, model, tmp_path, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    quantize()
    ModelSave().save(model, "c")
    assert [pathlib.Path(path).stat().st_size > 1e6 for path in tmp_path.rglob("*.safetensors")] == [True]


# Weights that other nodes take


def control_lora(model):
    """Return a Control-LoRA of the built-in U-Net: low-rank changes of its encoder, and its own layers."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {name: value for name, value in model.model.model_config.unet_config.items() if name != "out_channels"}
    own = comfy.cldm.cldm.ControlNet(**{**config, "dtype": torch.float32}, hint_channels=3).state_dict()
    base, weights = model.model.state_dict(), {"lora_controlnet": torch.zeros(0)}
    for number, (name, weight) in enumerate(own.items()):
        if f"diffusion_model.{name}" not in base:
            weights[name] = noise(*weight.shape, seed=number) / max(1, weight[0].numel()) ** 0.5
        elif weight.ndim > 1:
            layer = name.removesuffix(".weight")
            weights[f"{layer}.up"] = noise(weight.shape[0], 2, seed=number) / 10
            weights[f"{layer}.down"] = noise(2, weight[0].numel(), seed=number + 1) / weight[0].numel() ** 0.5
    return comfy.controlnet.ControlLora(weights)


def test_a_control_lora_uses_the_dequantized_weights(host, model, sample, rounded, conditioning, relative):
    """A Control-LoRA takes the MODEL's weights for its own network."""
    quantized, reference = rounded(model)

    def controlled(source):
        entries = host.run(
            "ControlNetApplyAdvanced", positive=conditioning[0], negative=conditioning[1], control_net=control_lora(model),
            image=torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(1)), strength=1.0, start_percent=0.0,
            end_percent=1.0,
        )  # fmt: skip
        return sample(source, positive=entries[0], negative=entries[1], **SMALL)

    expected, plain = controlled(reference), sample(quantized, **SMALL)
    assert relative(controlled(quantized), expected) < 1e-4 < 0.01 < relative(plain, expected)
    assert torch.equal(sample(quantized, **SMALL), plain)


def test_state_dict_has_dequantized_weights(model, quantize):
    """The host's byte count remains that of the packed weights."""
    import comfy.model_management

    quantized = quantize(keep_sensitive_layers=False)
    size = comfy.model_management.module_size(quantized.model)
    network, source = quantized.model.diffusion_model, model.model.diffusion_model
    assert size < 0.3 * comfy.model_management.module_size(model.model)
    for ours, full in ((network, source), (network.time_embed, source.time_embed)):
        found, expected = ours.state_dict(), full.state_dict()
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
        }
        for name, tensor in found.items():
            error = (tensor - expected[name]).abs().flatten(1 if tensor.ndim > 1 else 0)
            assert (error <= 0.5001 / 127 * expected[name].abs().flatten(1).amax(1, True)).all() if tensor.ndim > 1 else True
    assert comfy.model_management.module_size(quantized.model) == size
