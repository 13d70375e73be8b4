"""The training data's split, and the loop that the trainings share."""

import json

import emoji
import numpy as np
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
    """Classes come with weight sqrt(size); asymmetric ones are never mirrored; labels are dropped at the rate asked for."""
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


def test_training_minimises_and_its_file_tells_of_it(tmp_path):
    """A linear layer learns a known map; what is saved is the average of the weights."""
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
