"""One server over many prompts of changing kinds: its memory, and that no prompt affects another."""

import itertools
import random

import comfyui
import psutil
import pytest
import server
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

STEPS = 4
SIZES, BATCHES, LORAS = (16, 24), (1, 2), (False, True)
CACHES = {
    "none": None,
    "hold": {"interval": 2, "branch": 0},
    "linear": {"interval": 2, "branch": 3, "forecast": "linear"},
    "profile": {},
}
CONFIGURATIONS = list(itertools.product(SIZES, BATCHES, LORAS, CACHES))
PROMPTS = 2 * len(CONFIGURATIONS)
SAMPLING = {"steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def host(output, tmp_path_factory):
    """Return a server with its own model folders, which contain a LoRA for the built-in model."""
    models = tmp_path_factory.mktemp("models")
    name = "middle_block.1.proj_in"  # in a deep block, whose feature the cache holds
    with safe_open(comfyui.ROOT / "nodes/assets/emoji32.safetensors", "pt") as file:
        out, into = next(file.get_slice(key) for key in file.keys() if key.endswith(f"{name}.weight")).get_shape()[:2]  # noqa: SIM118
    generator = torch.Generator().manual_seed(0)
    lora = {f"diffusion_model.{name}.lora_up.weight": torch.randn(out, 2, generator=generator)}
    lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, into, generator=generator)
    (models / "loras").mkdir()
    save_file(lora, models / "loras/deep.safetensors")
    (models / "paths.yaml").write_text(f"test:\n  base_path: {models}\n  loras: loras\n  iec_profiles: profiles\n")
    with server.serve(output, ["--extra-model-paths-config", str(models / "paths.yaml")]) as host:
        yield host


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def base(size, batch):
    return {
        "model": node("IECLoadBuiltinModel", precision="float32"),
        "face": node("IECClassLabel", labels="face, flag"),
        "none": node("IECClassLabel", labels="none"),
        "empty": node("EmptyChromaRadianceLatentImage", width=size, height=size, batch_size=batch),
    }


def prompt(size, batch, lora, cache, seed=5):
    nodes, source = base(size, batch), ["model", 0]
    if lora:
        nodes["lora"] = node("LoraLoaderModelOnly", model=source, lora_name="deep.safetensors", strength_model=1.0)
        source = ["lora", 0]
    if cache == "profile":
        nodes["profile"] = node("IECLoadCacheProfile", profile_name="small.safetensors")
        nodes["cached"] = node("IECCacheQuant", model=source, profile=["profile", 0])
    elif cache != "none":
        nodes["cached"] = node("IECDeepCache", model=source, **CACHES[cache])
    sampling = {**SAMPLING, "denoise": 1.0, "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5}
    nodes["sampler"] = node(
        "IECKSampler", model=["cached", 0] if cache != "none" else source, seed=seed, positive=["face", 0],
        negative=["none", 0], latent_image=["empty", 0], correction_steps="first:1", **sampling,
    )  # fmt: skip
    nodes["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="iec")
    return nodes


def latent(output, outputs):
    entry = outputs["save"]["latents"][0]
    path = output / entry["subfolder"] / entry["filename"]
    tensor = load_file(path)["latent_tensor"]
    path.unlink()
    return tensor


@pytest.fixture(scope="module")
def profile(host):
    nodes = base(24, 1)
    nodes["calibrate"] = node(
        "IECCalibrateCacheQuant", model=["model", 0], positive=["face", 0], negative=["none", 0], latent_image=["empty", 0],
        seed=1, runs=1, interval=2, branch=0, **SAMPLING,
    )  # fmt: skip
    nodes["save"] = node("IECSaveCacheProfile", profile=["calibrate", 0], name="small")
    host.run(nodes)


def test_profile_is_used_by_a_later_prompt(host, output, profile):
    cached, plain = (latent(output, host.run(prompt(24, 1, False, cache, seed=3))) for cache in ("profile", "none"))
    assert cached.isfinite().all() and not torch.equal(cached, plain)
    wrong = prompt(24, 1, False, "profile")
    wrong["profile"]["inputs"]["profile_name"] = "none.safetensors"
    with pytest.raises(server.Refused, match=r"profile_name: there is no file 'none.safetensors' in models/iec_profiles"):
        host.run(wrong)
    other = prompt(24, 1, False, "profile", seed=4)
    other["sampler"]["inputs"]["scheduler"] = "karras"
    with pytest.raises(server.Failed, match="profile: it was calibrated for 4 steps of euler on normal"):
        host.run(other)
    load = node("IECLoadCacheProfile", profile_name="small.safetensors")
    with pytest.raises(server.Refused, match=r"name: '\.\./x' is not a valid name for a file in models/iec_profiles"):
        host.run({"load": load, "save": node("IECSaveCacheProfile", profile=["load", 0], name="../x")})


def test_prompts_do_not_affect_each_other_and_memory_does_not_grow(host, output, profile):
    """Every configuration runs twice, in another order: both times with the same latent, bit for bit.

    The process must not be larger at the end than after each configuration has run once. A feature that outlived its prompt
    would show: sizes, batches, seeds and a LoRA of a deep block alternate, with the same conditioning.
    """
    process = psutil.Process(host.pid)
    draw, first, sizes = random.Random(0), {}, []
    order = [one for _ in range(2) for one in draw.sample(CONFIGURATIONS, len(CONFIGURATIONS))]
    assert len(order) == PROMPTS
    # The host would answer a prompt like the last one without running it.
    assert not any(one == another for one, another in itertools.pairwise(order))
    for configuration in order:
        _, batch, *_ = configuration
        result = latent(output, host.run(prompt(*configuration, seed=4 + batch)))
        assert torch.equal(first.setdefault(configuration, result), result), configuration
        sizes.append(process.memory_info().rss / 2**20)
    assert len({result.double().sum().item() for result in first.values()}) == len(first) == len(CONFIGURATIONS)
    warm = len(CONFIGURATIONS) + 1
    assert max(sizes[-20:]) - max(sizes[:warm]) < 20, sizes[:: PROMPTS // 10]
