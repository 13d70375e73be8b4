"""The training of weights with a smaller Jacobian, and how these weights are identified."""

from types import SimpleNamespace

import experiment_rows
import experiment_samples
import pytest
import safetensors.torch
import torch
import train_smooth
import training
from experiment_rows import Chunk, Run, TunedRun


def test_the_penalty_is_the_norm_of_the_predicted_noises_derivative():
    """For a linear network, v = W x at each pixel: eps = alpha (v + sigma x), so J = alpha (W + sigma I)."""
    assert train_smooth.PENALTY["images"] == 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.linspace(0.1, 9, 8, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha = (1 + sigma**2).rsqrt()
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def network(x, timesteps):
        assert torch.equal(timesteps, torch.arange(8).repeat(2))
        return torch.einsum("ij,bjhw->bihw", weight, x)

    task = SimpleNamespace(draw=lambda size: (x, {"timesteps": torch.arange(size)}, alpha, sigma, None), generator=generator)
    state = generator.get_state()
    found = train_smooth.penalty(network, task)
    generator.set_state(state)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    jacobian = alpha[..., 0] * (weight + sigma[..., 0] * torch.eye(3, dtype=torch.float64))  # [8, 3, 3]
    image = torch.einsum("bij,bjhw->bihw", jacobian, direction)
    expected = (image.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = [torch.autograd.grad(value, weight)[0] for value in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-9)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(train_smooth.comfyui, "CACHE", tmp_path)
    return tmp_path


def write(weights, step, earlier=3):
    before = training.history(train_smooth.BUILTIN)
    runs = [*before[:earlier], {"step": step, "steps": train_smooth.STEPS[weights]}]
    training.save(torch.nn.Linear(1, 1), train_smooth.path(weights), "a layer", training=runs)


def test_weights_exist_only_after_the_complete_training(kept):
    assert not train_smooth.is_there("smooth")
    write("smooth", 500)
    assert not train_smooth.is_there("smooth")
    write("smooth", train_smooth.STEPS["smooth"])
    assert train_smooth.is_there("smooth") and not train_smooth.is_there("longer")
    write("smooth", train_smooth.STEPS["smooth"], earlier=2)  # with another number of runs
    assert not train_smooth.is_there("smooth")


def test_another_recipe_is_another_file_and_another_row(kept, monkeypatch):
    runs = [TunedRun(weights=weights) for weights in experiment_rows.WEIGHTS]
    digests, path = list(map(experiment_samples.digest, runs)), train_smooth.path("smooth")
    monkeypatch.setitem(train_smooth.PENALTY, "weight", 0.2)
    assert [experiment_samples.digest(run) == digest for run, digest in zip(runs, digests)] == [True, True, False]
    assert train_smooth.path("smooth") != path and len(set(digests)) == 3


def test_other_weights_of_the_same_recipe_are_other_images(kept):
    store, chunk = experiment_samples.Store(kept), Chunk(TunedRun(weights="smooth"), 0, 8)
    files = set()
    for _ in range(2):  # with another layer's random weights
        write("smooth", train_smooth.STEPS["smooth"])
        experiment_samples.sha256.cache_clear()
        files.add(store.path(chunk))
    assert len(files) == 2


def test_runs_of_the_built_in_weights_are_sampled_once():
    tuned, plain = TunedRun(quantization="W8A8", correction_steps="all"), Run(quantization="W8A8", correction_steps="all")
    assert tuned.sampled == plain and type(tuned.sampled) is Run
    assert {run.sampled for run in tuned.references.values()} == set(plain.references.values())
    assert tuned.baseline == TunedRun(quantization="W8A8")


def test_a_tuned_run_is_compared_with_runs_of_its_own_weights():
    run = TunedRun(weights="smooth", quantization="W8A8", correction_steps="all")
    assert run.key == "unet euler karras 20 cfg3 W8A8 all paper smooth weights"
    for other in (run.baseline, run.same_steps, run.exact):
        assert other.weights == "smooth" and other.key.endswith(" smooth weights")
    assert run.model != TunedRun(weights="longer", quantization="W8A8").model


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match=r"weights: 'best' is none; name one of built-in, longer, smooth"):
        TunedRun(weights="best")
    with pytest.raises(ValueError, match=r"architecture: 'transformer' has the built-in weights alone"):
        TunedRun(architecture="transformer")


def test_missing_weights_are_reported_with_their_command(kept):
    assert experiment_samples.weights_path(Run()) == experiment_samples.WEIGHTS["unet"]
    sentence = "unet euler karras 20 cfg3 smooth weights needs weights that are not there; `make smooth` trains them"
    with pytest.raises(ValueError, match=sentence):
        experiment_samples.weights_path(TunedRun(weights="smooth"))
    write("smooth", train_smooth.STEPS["smooth"])
    assert safetensors.torch.load_file(experiment_samples.weights_path(TunedRun(weights="smooth"))).keys() == {"weight", "bias"}
