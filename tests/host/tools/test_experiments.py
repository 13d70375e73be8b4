"""The runs of experiments, sampled by the real nodes."""

import contextlib
import itertools
import json
import math
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import experiment_ray
import experiment_rows
import experiment_samples
import norms
import numpy as np
import pytest
import safetensors.torch
import torch
from experiment_rows import Chunk, Run, TunedRun

IMAGES = 2  # of a chunk here; the experiments' chunks are larger


@pytest.fixture(scope="module")
def sampler(host):
    return experiment_samples.Sampler(host.nodes)


def test_every_declared_run_is_accepted_by_the_nodes(host):
    runs = {row.run for rows in experiment_rows.declared().values() for row in rows}
    for run in [*runs, *(run.exact for run in runs if run.exact)]:
        correction = {
            "correction_steps": run.correction_steps,
            "lambda_": run.lambda_,
            "evaluation_point": run.evaluation_point,
        }
        scheduler = run.scheduler if run.scheduler != "quadratic" else "simple"  # quadratic uses SamplerCustom
        valid = host.nodes["IECKSampler"].validate_inputs(
            steps=run.steps, sampler_name=run.sampler, scheduler=scheduler, **correction
        )
        assert valid is True, run.key


def label_of(host, text):
    return host.run("IECClassLabel", labels=text)[0]


@pytest.mark.parametrize(
    "run, nfe",
    [
        (Run(steps=2), 2),
        (Run(steps=2, quantization="W8A8", correction_steps="all"), 4),
        (Run(steps=3, interval=2, correction_steps="full", evaluation_point="next"), 4),  # no correction at sigma 0
        (Run(steps=2, interval=2, cache="calibrated", forecast="linear"), 2),
        (Run(steps=2, architecture="transformer", scheduler="simple", correction_steps="all", lambda_=0.3), 4),
    ],
)
def test_a_chunk_equals_the_nodes_output(host, sampler, run, nfe):
    """The same nodes are wired by hand, with the images one class after the other."""
    label = partial(label_of, host)
    (model,) = host.run("IECLoadBuiltinModel", precision="float32", architecture=run.architecture)
    if run.quantization == "W8A8":
        (model,) = host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="8", keep_sensitive_layers=True)
    if run.cache == "calibrated":
        pairs = ("face, heart", "person, vehicle", "fruit, boat", "clock, flag")
        names = ("positive", "positive_2", "positive_3", "positive_4")
        prompts = dict(zip(names, map(label, pairs)), negative=label("none"))
        (profile, _) = host.run(
            "IECCalibrateCacheQuant", model=model, **prompts, latent_image={"samples": torch.zeros(2, 3, 32, 32)}, seed=500,
            runs=2, steps=run.steps, cfg=3.0, sampler_name="euler", scheduler=run.scheduler, interval=run.interval, branch=0,
            forecast=run.forecast,
        )  # fmt: skip
        (model,) = host.run("IECCacheQuant", model=model, profile=profile)
    elif run.interval > 1:
        (model,) = host.run("IECDeepCache", model=model, interval=run.interval, branch=0, schedule="uniform")
    labels = "hand, person"  # from the third class on
    settings = {
        "model": model, "seed": 1001, "steps": run.steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": run.scheduler,
        "positive": label(labels), "negative": label("none"),
        "latent_image": {"samples": torch.zeros(IMAGES, 3, 32, 32)}, "denoise": 1.0, "correction_steps": run.correction_steps,
        "lambda_": run.lambda_, "max_iterations": 1, "tolerance": 0.0, "evaluation_point": run.evaluation_point,
    }  # fmt: skip
    latents, told, _ = sampler.chunk(Chunk(run, 1, IMAGES))
    assert torch.equal(latents, host.run("IECKSampler", **settings)[0]["samples"]) and told == nfe
    assert not torch.equal(latents, sampler.chunk(Chunk(run, 0, IMAGES))[0])


STEPS = 4


@pytest.fixture(scope="module")
def denoised(host, model):
    """Return a function of (x float32 [IMAGES, 3, 32, 32], sigma) that evaluates the built-in U-Net for the first classes."""
    label = host.run("IECClassLabel", labels="face, heart")[0][0]

    def of(x, sigma):
        at = torch.full((len(x),), sigma)
        return model.model.apply_model(x, at, c_crossattn=label[0], y=label[1]["pooled_output"])

    return of


def authors_sigmas(model):
    """Return sigmas on the timesteps of the authors' DDIM, from the model's own betas."""
    timesteps = np.linspace(0, np.sqrt(0.8 * 1000), STEPS) ** 2
    log_sigmas = model.model.model_sampling.sigmas.double().log().numpy()
    return [*np.exp(np.interp(timesteps, np.arange(1000), log_sigmas))[::-1], 0.0]


def ddim(denoised, sigmas, noise_factor=lambda sigma, sigma_next: 1.0):
    """Run DDIM without noise from the host's noise of seed 1000; each predicted noise is multiplied by its step's factor."""
    x = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1000)) * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        eps = (x - denoised(x, sigma)) / sigma * noise_factor(sigma, sigma_next)
        x = x - sigma * eps + sigma_next * eps
    return x


def shrink(sigma, sigma_next):
    now, then = (at**2 / (1 + at**2) for at in (sigma, sigma_next))  # 1 - abar
    return 1 - 0.5 * (1 - math.sqrt(then / now))


@pytest.mark.parametrize(
    "control, factor", [("none", lambda *_: 1), ("shrunk", shrink), ("epsilon1.005", lambda *_: 1 / 1.005)]
)
def test_the_authors_ddim_and_its_controls_are_their_formulas(sampler, model, denoised, relative, control, factor):
    run = Run(scheduler="quadratic", sampler="ddim", steps=STEPS, cfg=1.0, control=control)
    latents, nfe, _ = sampler.chunk(Chunk(run, 0, IMAGES))
    assert relative(latents, ddim(denoised, authors_sigmas(model), factor)) < 1e-4 and nfe == STEPS


def test_a_correction_over_the_authors_timesteps_counts_its_evaluations(sampler):
    run = Run(scheduler="quadratic", sampler="ddim", steps=STEPS, cfg=1.0, correction_steps="all")
    corrected, nfe, _ = sampler.chunk(Chunk(run, 0, IMAGES))
    assert nfe == 2 * STEPS and not torch.equal(corrected, sampler.chunk(Chunk(run.baseline, 0, IMAGES))[0])


def test_last_step_alone_takes_all_other_steps_by_heun_in_thirds(host, sampler, model, denoised, relative):
    """The reference is Heun's method written out, over the schedule's sigmas."""
    run = Run(scheduler="karras", steps=STEPS, cfg=1.0, control="last step alone")
    latents, nfe, _ = sampler.chunk(Chunk(run, 0, IMAGES))
    sigmas = host.run("BasicScheduler", model=model, scheduler="karras", steps=STEPS, denoise=1.0)[0].double().tolist()
    full_noise = math.hypot(1, sigmas[0])  # the host's, at the model's largest sigma
    x = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1000)) * full_noise

    def slope(x, sigma):
        return (x - denoised(x, sigma)) / sigma

    for begin, end in itertools.pairwise(sigmas[:-1]):
        for third in range(3):
            here, then = (begin + (end - begin) * part / 3 for part in (third, third + 1))
            first = slope(x, here)
            x = x + (then - here) * (first + slope(x + (then - here) * first, then)) / 2
    assert relative(latents, denoised(x, sigmas[-2])) < 1e-4 and nfe == (STEPS - 1) * 3 * 2 + 1


def test_averaged_rounding_depends_on_the_seed_and_leaves_the_model_unchanged(sampler, relative):
    plain = Run(quantization="W4A8", steps=1, cfg=1.0)
    averaged = replace(plain, control="averaged")
    before = sampler.chunk(Chunk(plain, 0, IMAGES))[0]
    found, nfe, _ = sampler.chunk(Chunk(averaged, 0, IMAGES))
    assert nfe == 2 and relative(found, before) > 1e-3
    assert torch.equal(found, sampler.chunk(Chunk(averaged, 0, IMAGES))[0])
    assert torch.equal(before, sampler.chunk(Chunk(plain, 0, IMAGES))[0])


def test_norms_agree_with_the_probe(sampler, monkeypatch):
    few = {"seed": 7, "steps": 1, "cfg": 3.0, "every": 1, "iterations": 2, "tolerance": 0.5, "perturbation": 0.01}
    for name, value in {"SETTINGS": few, "STEPS": 1, "EVERY": 1}.items():
        monkeypatch.setattr(norms, name, value)
    told = {}

    def run(node, **inputs):
        told[node] = inputs, sampler.run(node, **inputs)
        return told[node][1]

    watched = SimpleNamespace(run=run, model=sampler.model)
    monkeypatch.setattr(experiment_samples, "prepare", lambda: watched)
    case = norms.Case("unet", "W8A8", "flag")
    measured, (row,) = norms.measured(case)
    inputs, (_, _, text) = told["IECContractionProbe"]
    report = json.loads(text)
    (step,) = report["steps"]
    assert measured == case and row["key"] == "unet W8A8 flag step 0" and row["jvp"] == report["jvp"]
    assert report["quantization"] == "W8A8" and inputs["scheduler"] == "karras" and few.items() <= inputs.items()
    assert inputs["latent_image"]["samples"].shape == (1, 3, 32, 32)
    assert float(row["growth"]) == pytest.approx(step["growth"][0], rel=1e-3)
    assert float(row["true_contraction_0.9"]) == pytest.approx(step["true_contraction"]["0.9"][0], rel=1e-3)
    assert len([name for name in row if "contraction" in name]) == 18


def test_a_tuned_run_uses_the_weights_of_its_file(sampler, model, tmp_path):
    weights = {name: tensor * 0.5 for name, tensor in safetensors.torch.load_file(experiment_samples.WEIGHTS["unet"]).items()}
    with safetensors.safe_open(experiment_samples.WEIGHTS["unet"], "pt") as file:
        safetensors.torch.save_file(weights, tmp_path / "halved.safetensors", file.metadata())
    halved = experiment_samples.Sampler(sampler._known, lambda run: tmp_path / "halved.safetensors")
    found = halved.model(TunedRun(weights="smooth")).model.diffusion_model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].float()) for name in found)
    (builtin,) = sampler.run("IECLoadBuiltinModel", precision="float32")  # no other model has these weights
    before = model.model.diffusion_model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in builtin.model.diffusion_model.state_dict().items())


def test_residuals_equal_those_of_the_papers_iteration(host, sampler, model):
    """They are checked in the third of 20 euler steps: x' = x + (sigma' - sigma) eps(y), y the last x' at its step's own
    timestep.
    """
    label, none = (host.run("IECClassLabel", labels=text)[0] for text in ("flag", "none"))
    (sigmas,) = host.run("BasicScheduler", model=model, scheduler="karras", steps=20, denoise=1.0)

    def eps(y, sigma):
        def denoised(conditioning):
            more = {"c_crossattn": conditioning[0][0], "y": conditioning[0][1]["pooled_output"]}
            return model.model.apply_model(y, torch.full((1,), sigma), **more)

        away, towards = denoised(none), denoised(label)
        return (y - away - 3.0 * (towards - away)) / sigma

    x, expected = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * (1 + sigmas[0] ** 2).sqrt(), []
    with torch.inference_mode():
        for sigma, then in itertools.pairwise(sigmas[:4].tolist()):
            before, x = x, x + (then - sigma) * eps(x, sigma)
        for _ in range(3):
            anew = before + (then - sigma) * eps(x * math.sqrt((1 + sigma**2) / (1 + then**2)), sigma)
            expected.append((anew - x).norm().item() / x.norm().item())
            x = x + 0.5 * (anew - x)
    inputs = {
        "model": model, "positive": label, "negative": none, "scheduler": "karras",
        "latent_image": {"samples": torch.zeros(1, 3, 32, 32)},
    }  # fmt: skip
    found = norms.residuals(sampler, inputs, 2)
    assert list(found) == ["residual_1", "residual_2", "residual_3"]
    assert [float(text) for text in found.values()] == pytest.approx(expected, rel=2e-3)


def test_a_tuned_case_has_its_weights_and_the_residuals_of_each_step(sampler, monkeypatch):
    few = {"seed": 7, "steps": 3, "cfg": 3.0, "every": 2, "iterations": 2, "tolerance": 0.5, "perturbation": 0.01}
    for name, value in {"SETTINGS": few, "STEPS": 3, "EVERY": 2}.items():
        monkeypatch.setattr(norms, name, value)
    monkeypatch.setattr(experiment_samples, "prepare", lambda: sampler)
    monkeypatch.setattr(norms, "residuals", lambda sampler, inputs, step: {"residual_1": str(step)})
    _, rows = norms.measured(norms.TunedCase("unet", "W8A8", "flag", "built-in"))
    assert [(row["step"], row["residual_1"], row["weights"]) for row in rows] == [
        ("0", "0", "built-in"), ("2", "2", "built-in"),
    ]  # fmt: skip


def test_a_non_finite_image_is_reported_with_its_row(host):
    class Broken:
        @staticmethod
        def execute(**inputs):
            return SimpleNamespace(result=({"samples": torch.full((8, 3, 32, 32), torch.nan)}, [SimpleNamespace(nfe=1)]))

    broken = experiment_samples.Sampler({**host.nodes, "IECKSampler": Broken})
    with pytest.raises(ValueError, match=r"unet euler karras 1 cfg3: a latent of images 8 to 15 is not finite"):
        broken.chunk(Chunk(Run(steps=1), 1, 8))


def check(chunks, store, sampler):
    """Check that samples from elsewhere equal samples made here, and that their features are those of their images."""
    for chunk in chunks:
        tensors, about = store.load(chunk)
        run = chunk.run
        assert about["key"] == run.key and about["nfe"] == run.steps * (2 if run.correction_steps == "all" else 1)
        assert torch.equal(tensors["latents"], sampler.chunk(chunk)[0])
        for name, found in experiment_samples.features(tensors["latents"]).items():
            assert torch.allclose(tensors[name], found, rtol=1e-4, atol=1e-4)


def test_a_separate_process_gives_the_same_images(sampler, tmp_path):
    store, runs = experiment_samples.Store(tmp_path), [Run(steps=1), Run(steps=1, correction_steps="all")]
    chunks = [Chunk(run, number, IMAGES) for number, run in enumerate(runs)]
    assert set(experiment_samples.sampled(chunks, store, workers=1)) == set(chunks)
    check(chunks, store, sampler)


def test_without_a_gpu_chunks_are_small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert experiment_samples.at_once() == 8


@pytest.mark.parametrize("free, size", [(2**40, 256), (300, 64), (0, 8)])
def test_on_a_gpu_chunks_fill_half_of_the_free_memory(sampler, monkeypatch, free, size):
    """Guidance doubles a batch here, and an image takes one byte."""
    import comfy.model_base
    import comfy.model_management as management

    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(management, "get_free_memory", lambda device: free)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda self, shape, **more: shape[0])
    assert sampler.at_once("unet") == size


@contextlib.contextmanager
def same_environment():
    """Restore the environment afterwards, because Ray sets variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def address():
    """Return the address of a Ray cluster of two workers on this machine."""
    with same_environment():
        # By default, Ray's workers yield to other processes, which here are this machine's other tests.
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_worker_niceness": "0"}
        from ray.cluster_utils import Cluster

        built = Cluster()
        for _ in range(2):
            memory = 80 * 2**20  # Ray's minimum
            built.add_node(num_cpus=1, num_gpus=0, object_store_memory=memory, include_dashboard=False)
        yield built.address
        built.shutdown()


@pytest.fixture
def ray_address():
    """Return a function that sets the cluster's address in the environment."""
    with same_environment():
        yield lambda address: os.environ.update(RAY_ADDRESS=address)


def test_a_ray_cluster_gives_the_same_images(sampler, tmp_path, address, ray_address):
    ray_address(address)
    assert experiment_ray.at_once() == 8  # it has no GPU
    store = experiment_samples.Store(tmp_path)
    chunks = [Chunk(Run(steps=1), number, IMAGES) for number in (0, 1)]
    assert set(experiment_samples.sampled(chunks, store, workers=1)) == set(chunks)
    check(chunks, store, sampler)


def test_an_error_of_a_worker_is_reported(tmp_path, address, ray_address):
    ray_address(address)
    chunk = Chunk(Run(steps=1, sampler="none such"), 0, 8)
    with pytest.raises(Exception, match="none such"):
        list(experiment_samples.sampled([chunk], experiment_samples.Store(tmp_path), workers=1))


def test_an_address_without_a_cluster_is_reported(tmp_path, ray_address):
    ray_address("127.0.0.1:1")
    with pytest.raises(ValueError, match=r"RAY_ADDRESS: no cluster answers at '127.0.0.1:1'"):
        list(experiment_samples.sampled([Chunk(Run(steps=1), 0, IMAGES)], experiment_samples.Store(tmp_path), workers=1))
