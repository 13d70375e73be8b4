"""The built-in model as a MODEL of the host, and its class labels."""

import json

import comfyui
import pytest
import safetensors
import torch

pytestmark = pytest.mark.fast

PATH = comfyui.ROOT / "nodes/assets/emoji32.safetensors"


def test_file_is_small_half_precision_and_documented():
    assert PATH.stat().st_size <= 16 * 2**20
    with safetensors.safe_open(PATH, "pt") as file:
        facts = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    training = json.loads(facts["iec.training"])
    assert {"seed", "steps", "data", "images_sha256", "loss"} <= set(training)
    assert training["step"] == training["steps"]
    assert json.loads(facts["iec.unet_config"])["context_dim"] == len(json.loads(facts["iec.classes"]))


def test_it_is_the_hosts_unet_and_all_weights_are_loaded(model):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = model.get_model_object("diffusion_model")
    assert type(network) is UNetModel
    with safetensors.safe_open(PATH, "pt") as file:
        state = network.state_dict()
        assert set(state) == set(file.keys())
        assert all(torch.equal(state[name], file.get_tensor(name).float()) for name in state)


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
    empty = host.run("EmptyChromaRadianceLatentImage", width=32, height=32, batch_size=2)[0]
    assert torch.equal(sample(model, latent_image=empty), stock_sample(model))
    vae = host.run("VAELoader", vae_name="pixel_space")[0]
    image = host.run("VAEDecode", vae=vae, samples={"samples": stock_sample(model)})[0]
    assert image.shape == (2, 32, 32, 3)
    assert torch.allclose(image, (stock_sample(model).movedim(1, -1) / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_lora_file_of_the_host_applies(host, model, sample):
    """A LoRA in the host's own key form, through the code behind its LoRA loaders."""
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
