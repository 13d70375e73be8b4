"""The runs of experiments, sampled by the real nodes."""

from types import SimpleNamespace

import experiment_rows
import experiment_samples
import pytest
import torch
from experiment_rows import Run


@pytest.fixture(scope="module")
def sampler(host):
    return experiment_samples.Sampler(host.nodes)


def test_every_declared_run_is_accepted_by_the_nodes(host):
    runs = [run for runs in experiment_rows.declared().values() for run in runs]
    for run in [*runs, *(run.exact for run in runs if run.exact)]:
        correction = {
            "correction_steps": run.correction_steps,
            "lambda_": run.lambda_,
            "evaluation_point": run.evaluation_point,
        }
        valid = host.nodes["IECKSampler"].validate_inputs(
            steps=run.steps, sampler_name=run.sampler, scheduler=run.scheduler, **correction
        )
        assert valid is True, run.key


@pytest.mark.parametrize(
    "run, nfe",
    [
        (Run(steps=2), 2),
        (Run(steps=2, quantization="W8A8", correction_steps="all"), 4),
        (Run(steps=3, interval=2, correction_steps="full", evaluation_point="next"), 4),  # at sigma 0 there is nothing ahead
        (Run(steps=2, architecture="transformer", scheduler="simple", correction_steps="all", lambda_=0.3), 4),
    ],
)
def test_a_chunk_is_what_the_nodes_make(host, sampler, run, nfe):
    """The same nodes wired by hand, the images one class after the other."""
    (model,) = host.run("IECLoadBuiltinModel", precision="float32", architecture=run.architecture)
    if run.quantization == "W8A8":
        (model,) = host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="8", keep_sensitive_layers=True)
    if run.interval > 1:
        (model,) = host.run("IECDeepCache", model=model, interval=run.interval, branch=0)
    labels = "bug, flower, plant, fruit, vegetable, dish, sweet, drink"  # from the ninth class on
    settings = {
        "model": model, "seed": 1001, "steps": run.steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": run.scheduler,
        "positive": host.run("IECClassLabel", labels=labels)[0], "negative": host.run("IECClassLabel", labels="none")[0],
        "latent_image": {"samples": torch.zeros(8, 3, 32, 32)}, "denoise": 1.0, "correction_steps": run.correction_steps,
        "lambda_": run.lambda_, "max_iterations": 1, "tolerance": 0.0, "evaluation_point": run.evaluation_point,
    }  # fmt: skip
    latents, told, _ = sampler.chunk(run, 1)
    assert torch.equal(latents, host.run("IECKSampler", **settings)[0]["samples"]) and told == nfe
    assert not torch.equal(latents, sampler.chunk(run, 0)[0])


def test_an_image_that_is_not_finite_is_told_with_its_row(host):
    class Broken:
        @staticmethod
        def execute(**inputs):
            return SimpleNamespace(result=({"samples": torch.full((8, 3, 32, 32), torch.nan)}, []))

    broken = experiment_samples.Sampler({**host.nodes, "IECKSampler": Broken})
    with pytest.raises(ValueError, match=r"unet euler karras 1 cfg3: a latent of images 8 to 15 is not finite"):
        broken.chunk(Run(steps=1), 1)


def test_processes_give_the_same_images(sampler, tmp_path):
    store, runs = experiment_samples.Store(tmp_path), [Run(steps=1), Run(steps=1, correction_steps="all")]
    chunks = [(run, number) for run in runs for number in (0, 1)]
    assert set(experiment_samples.sampled(chunks, store, workers=2)) == set(chunks)
    for run, number in chunks:
        latents, about = store.load(run, number)
        assert about["key"] == run.key and about["nfe"] == run.steps * (2 if run.correction_steps == "all" else 1)
        assert torch.equal(latents, sampler.chunk(run, number)[0])
