"""The built-in model as a MODEL of the host, and its class labels."""

import json

import comfyui
import pytest
import safetensors
import torch

pytestmark = pytest.mark.fast

ASSETS = comfyui.ROOT / "nodes/assets"
FILES = {"unet": ASSETS / "emoji32.safetensors", "transformer": ASSETS / "emoji32_flow.safetensors"}


@pytest.fixture(scope="module")
def transformer(host):
    return host.run("IECLoadBuiltinModel", precision="float32", architecture="transformer")[0]


@pytest.mark.parametrize("architecture", FILES)
def test_file_is_small_half_precision_and_documented(architecture):
    path = FILES[architecture]
    assert path.stat().st_size <= 16 * 2**20
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    training = json.loads(facts["iec.training"])
    for run in training if isinstance(training, list) else [training]:  # files of a single run have it without a list
        assert {"seed", "steps", "data", "images_sha256", "loss"} <= set(run)
        assert run["step"] == run["steps"]
    width = json.loads(facts["iec.unet_config"])["context_dim" if architecture == "unet" else "context_in_dim"]
    assert width == len(json.loads(facts["iec.classes"]))


@pytest.mark.parametrize("architecture", FILES)
def test_it_is_the_hosts_network_and_all_weights_are_loaded(host, architecture):
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model = host.run("IECLoadBuiltinModel", precision="float32", architecture=architecture)[0]
    network = model.get_model_object("diffusion_model")
    assert type(network) is {"unet": UNetModel, "transformer": Flux}[architecture]
    with safetensors.safe_open(FILES[architecture], "pt") as file:
        state = network.state_dict()
        named = {name if name in state else name.replace("_norm.scale", "_norm.weight"): name for name in file.keys()}  # noqa: SIM118
        assert set(state) == set(named)  # hosts of 2026 use that other name for Flux' norms
        assert all(torch.equal(state[name], file.get_tensor(stored).float()) for name, stored in named.items())


def test_unknown_architecture_is_refused(host):
    message = host.nodes["IECLoadBuiltinModel"].validate_inputs(architecture="mamba")
    assert message == "architecture: 'mamba' is none of unet, transformer."


def test_transformer_predicts_the_flow_of_its_training(transformer):
    """For a synthetic image, a square on white, the denoised prediction is far nearer to the image than the noised image is, at
    three noise levels.

    x = (1 - sigma) image + sigma noise, and velocity = noise - image.
    """
    base, generator = transformer.model, torch.Generator().manual_seed(0)
    image = torch.ones(4, 3, 32, 32)
    image[:, :, 8:24, 8:24] = torch.tensor([0.9, 0.2, -0.8]).view(3, 1, 1)
    label = torch.zeros(4, 28)
    for sigma in (0.25, 0.5, 0.75):
        noise = torch.randn(image.shape, generator=generator)
        noised, at = (1 - sigma) * image + sigma * noise, torch.full((4,), sigma)
        denoised = base.apply_model(noised, at, c_crossattn=label[:, None], y=label)
        velocity = base.diffusion_model(noised, at, context=label[:, None], y=label)
        assert torch.allclose(denoised, noised - sigma * velocity, atol=1e-4)
        assert (denoised - image).square().mean() < 0.25 * (noised - image).square().mean()


def test_transformer_samples_with_guidance_and_labels(host, sample, transformer, relative):
    flags = host.run("IECClassLabel", labels="flag")[0]
    wanted = sample(transformer, positive=flags, sampler_name="euler")
    assert wanted.shape == (2, 3, 16, 16) and wanted.isfinite().all()
    assert relative(sample(transformer, sampler_name="euler"), wanted) > 0.1
    assert relative(sample(transformer, positive=flags, sampler_name="euler", cfg=4.0), wanted) > 0.05


def test_quantization_and_cache_reach_the_transformer(host, sample, transformer, relative):
    wanted = sample(transformer, sampler_name="euler", steps=6)
    bits = {"weight_bits": "4", "activation_bits": "8", "keep_sensitive_layers": False}
    quantized = host.run("IECQuantizeModel", model=transformer, **bits)[0]
    assert 1e-3 < relative(sample(quantized, sampler_name="euler", steps=6), wanted) < 1
    cached = host.run("IECDeepCache", model=transformer, interval=3, branch=0)[0]
    assert 1e-3 < relative(sample(cached, sampler_name="euler", steps=6), wanted) < 1


def test_precision(host):
    assert host.run("IECLoadBuiltinModel", precision="bfloat16")[0].model_dtype() == torch.bfloat16


def test_labels_change_the_image_and_guidance_works(host, sample, model, relative):
    heart = host.run("IECClassLabel", labels="heart")[0]
    assert relative(sample(model, positive=heart), sample(model)) > 0.1
    assert relative(sample(model, cfg=1.0), sample(model, cfg=4.0)) > 0.1


def test_one_label_each(host, sample, model, relative):
    """The second image of a batch has the second label."""
    both = sample(model, steps=2)
    flags = sample(model, steps=2, positive=host.run("IECClassLabel", labels="flag")[0])
    assert relative(both[1:], flags[1:]) < 1e-5 < relative(both[:1], flags[:1])


@pytest.mark.parametrize("labels", ["face, horse", "", " , "])
def test_unknown_label_is_refused_with_the_classes(host, labels):
    message = host.nodes["IECClassLabel"].validate_inputs(labels=labels)
    assert message.startswith("labels: ") and "mammal" in message


def test_stock_nodes_work_on_it(host, sample, stock_sample, model, relative):
    zero_snr = host.run("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)[0]
    assert relative(stock_sample(zero_snr), stock_sample(model)) > 1e-3
    empty = host.run("EmptyChromaRadianceLatentImage", width=16, height=16, batch_size=2)[0]
    assert torch.equal(sample(model, latent_image=empty), stock_sample(model))
    vae = host.run("VAELoader", vae_name="pixel_space")[0]
    image = host.run("VAEDecode", vae=vae, samples={"samples": stock_sample(model)})[0]
    assert image.shape == (2, 16, 16, 3)
    assert torch.allclose(image, (stock_sample(model).movedim(1, -1) / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_lora_file_of_the_host_applies(host, model, sample):
    """The LoRA has the host's own keys, and is loaded by the code of its LoRA loaders."""
    import comfy.sd

    name, generator = "diffusion_model.middle_block.1.proj_in", torch.Generator().manual_seed(0)
    out, into = model.model.state_dict()[name + ".weight"].shape[:2]
    lora = {
        name + ".lora_up.weight": torch.randn(out, 2, generator=generator),
        name + ".lora_down.weight": torch.randn(2, into, generator=generator),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0)
    assert list(patched.patches) == [name + ".weight"]
    assert not torch.equal(sample(patched), sample(model))
