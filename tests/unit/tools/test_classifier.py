"""The classifier whose features measure generated images."""

import re

import classifier
import emoji
import pytest
import torch


@pytest.fixture(scope="module")
def loaded():
    return classifier.load()


def test_held_out_accuracy_agrees_with_the_file(loaded):
    network, about = loaded
    images, labels = classifier.real_images()
    assert len(images) == about["training"]["held_out_images"]
    share = (network.classify(images) == labels).double().mean().item()
    assert share == pytest.approx(about["training"]["held_out_accuracy"], abs=0.01) and share > 0.6
    assert about["classes"] == list(emoji.CLASSES) and about["training"]["step"] == about["training"]["steps"]


def test_features_agree_with_the_scores(loaded):
    """The features of bytes are those of the same values in 0..1."""
    network, _ = loaded
    images, _ = classifier.real_images()
    features = network.features(images)
    assert features.shape == (len(images), classifier.FEATURES) and features.dtype == torch.float64
    scores = features.float() @ network.score.weight.T + network.score.bias
    assert torch.equal(scores.argmax(1), network.classify(images))
    assert torch.allclose(network.features(images / 255), features, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(0, 3, 32, 32), "images must be [N, 3, 32, 32] with N of 1 or more, not [0, 3, 32, 32]."),
        (torch.zeros(2, 32, 32, 3), "images must be [N, 3, 32, 32] with N of 1 or more, not [2, 32, 32, 3]."),
        (torch.full((1, 3, 32, 32), -0.1), "images of floating point must be within 0..1."),
        (torch.full((1, 3, 32, 32), torch.nan), "images of floating point must be within 0..1."),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "images must be uint8 or floating point, not torch.int64."),
    ],
)
def test_other_images_are_refused(loaded, images, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        loaded[0].features(images)


def test_jitter_keeps_white_and_shift_adds_white_borders():
    import train_classifier

    generator, settings = torch.Generator().manual_seed(0), train_classifier.SETTINGS
    white, dark = torch.ones(4, 3, 32, 32), -torch.ones(64, 3, 32, 32)
    assert torch.allclose(train_classifier.jitter(white, settings, generator), white)
    assert train_classifier.jitter(dark, settings, generator).std() + 1 > 0.5  # some are changed, none leaves the range
    moved = train_classifier.shift(dark, 3, generator)
    whites = (moved == 1)[:, 0].double().mean((1, 2))
    assert 0 < whites.max() <= 1 - (29 / 32) ** 2
    unmoved = whites == 0
    assert 0 < unmoved.sum() < 10  # one in 49
