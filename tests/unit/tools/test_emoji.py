"""The split of the training data, and the loop that the trainings share."""

import functools
import json

import comfyui
import emoji
import numpy as np
import pytest
import safetensors
import torch
import training


def test_every_tenth_image_of_each_class_is_held_out():
    labels = np.array([0] * 25 + [1] * 9 + [2] * 5)
    images = np.arange(len(labels)).reshape(-1, 1, 1, 1)
    (kept, kept_labels), (held, held_labels) = emoji.split(images, labels)
    assert held.ravel().tolist() == [5, 15, 25 + 5] and held_labels.tolist() == [0, 0, 1]
    assert sorted([*kept.ravel(), *held.ravel()]) == list(range(len(labels)))
    assert np.array_equal(labels[kept.ravel()], kept_labels)


def test_batches_are_mirrored_dropped_and_balanced():
    """Classes are drawn with weight sqrt(size); asymmetric ones are never mirrored; labels are dropped at the given rate."""
    sizes = {"face": 100, "clock": 25}
    names = [name for name, size in sizes.items() for _ in range(size)]
    labels = np.array([list(emoji.CLASSES).index(name) for name in names])
    images = np.zeros((len(labels), 32, 32, 3), np.uint8)
    images[:, :, :16] = 255  # white on the left
    batches = emoji.Batches(images, labels, torch.Generator().manual_seed(0), label_dropout=0.3)
    x0, label = batches.draw(4000)
    face, clock = label[:, list(emoji.CLASSES).index("face")] == 1, label[:, list(emoji.CLASSES).index("clock")] == 1
    mirrored = x0[:, 0, 0, 0] < 0
    assert abs(mirrored[face].float().mean() - 0.5) < 0.05 and not mirrored[clock].any()
    assert abs((label.sum(1) == 0).float().mean() - 0.3) < 0.03
    assert abs(face.sum() / clock.sum() - 2) < 0.3


def test_training_minimises_the_loss_and_is_recorded_in_the_file(tmp_path):
    """A linear layer learns a known map; the saved weights are the averaged ones."""
    torch.manual_seed(0)
    layer, wanted = torch.nn.Linear(3, 2), torch.randn(2, 3)
    settings = {
        "steps": 600, "learning_rate": 0.05, "warmup_steps": 10, "weight_decay": 0.0, "gradient_clip": 10.0, "ema_decay": 0.9,
    }  # fmt: skip

    def loss():
        x = torch.randn(16, 3)
        return (layer(x) - x @ wanted.T).square().mean()

    seen = []
    training.train(layer, loss, settings, lambda average, step, recent: seen.append((step, recent, average)))
    assert [step for step, _, _ in seen] == [500, 600] and seen[1][1] < seen[0][1] + 1e-3
    path = tmp_path / "layer.safetensors"
    training.save(seen[-1][2], path, "a layer", classes=["a", "b"])
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["iec.classes"]) == ["a", "b"]
        assert torch.allclose(file.get_tensor("weight").float(), wanted, atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


CONFIG, DATA = {"width": 3}, {"images": 5}
SETTINGS = {
    "seed": 7, "steps": 9, "learning_rate": 0.05, "warmup_steps": 2, "weight_decay": 0.01, "gradient_clip": 1.0,
    "ema_decay": 0.9,
}  # fmt: skip


@pytest.fixture
def run_on(tmp_path, monkeypatch):
    """Return a function that trains the layer in a file further, with a snapshot every three steps; it stops after
    `snapshots`.
    """
    monkeypatch.setattr(training, "SNAPSHOT", 3)
    monkeypatch.setattr(comfyui, "CACHE", tmp_path / "cache")
    save = training.save

    def loss_of(layer, generator):
        return lambda: (layer(torch.randn(16, 3, generator=generator)) - 1).square().mean()

    def run(path, snapshots=99, start=None, **settings):
        seen = []

        def save_and_die(*args, **facts):
            save(*args, **facts)
            seen.append(facts)
            if len(seen) == snapshots:
                raise KeyboardInterrupt

        monkeypatch.setattr(training, "save", save_and_die)
        build = functools.partial(torch.nn.Linear, 3, 2)
        training.run_on(path, start, build, CONFIG, ["a"], "a layer", loss_of, {**SETTINGS, **settings}, DATA)

    return run


def told(path):
    with safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return weights, json.loads(file.metadata()["iec.training"])


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("snapshots", [1, 2])
def test_a_stopped_training_continues_to_the_same_weights(run_on, tmp_path, snapshots):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    run_on(whole)
    with pytest.raises(KeyboardInterrupt):
        run_on(stopped, snapshots)
    assert told(stopped)[1][0]["step"] == 3 * snapshots
    run_on(stopped)
    assert same(told(stopped)[0], told(whole)[0]) and told(stopped)[1] == told(whole)[1]
    assert list((tmp_path / "cache/training").iterdir()) == []


def test_files_of_one_name_in_two_folders_are_trained_separately(run_on, tmp_path):
    ours, other = tmp_path / "ours/layer.safetensors", tmp_path / "others/layer.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_on(ours, snapshots=1)
    run_on(other)
    run_on(ours)
    assert [run["step"] for run in told(ours)[1]] == [9] and same(told(ours)[0], told(other)[0])


def test_a_run_continues_from_the_file_and_extends_its_history(run_on, tmp_path):
    path = tmp_path / "layer.safetensors"
    run_on(path)
    first, history = told(path)
    assert [(run["seed"], run["step"], run["images"]) for run in history] == [(7, 9, 5)]
    run_on(path, steps=3, learning_rate=1e-9, weight_decay=0.0)
    second, history = told(path)
    assert [(run["seed"], run["steps"], run["step"]) for run in history] == [(7, 9, 9), (8, 3, 3)]
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)  # it did not start again


def test_the_history_has_an_interrupted_run_whose_state_is_lost(run_on, tmp_path):
    path = tmp_path / "layer.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_on(path, snapshots=1)
    for file in (tmp_path / "cache/training").iterdir():
        file.unlink()
    run_on(path)
    assert [(run["seed"], run["step"]) for run in told(path)[1]] == [(7, 3), (8, 9)]


def test_a_stopped_training_does_not_continue_with_other_settings(run_on, tmp_path):
    path = tmp_path / "layer.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_on(path, snapshots=2)
    run_on(path, learning_rate=0.01)
    assert [(run["step"], run["learning_rate"]) for run in told(path)[1]] == [(6, 0.05), (9, 0.01)]


def test_a_missing_file_starts_with_another_files_weights(run_on, tmp_path):
    start, path = tmp_path / "start.safetensors", tmp_path / "layer.safetensors"
    run_on(start)
    before = start.read_bytes()
    run_on(path, start=start, steps=3, learning_rate=1e-9, weight_decay=0.0)
    assert all(torch.allclose(told(start)[0][name], found, atol=1e-3) for name, found in told(path)[0].items())
    assert [run["step"] for run in told(path)[1]] == [9, 3] and start.read_bytes() == before
