"""The features of the ImageNet network, and the components in which images are compared."""

import classifier
import imagenet
import numpy as np
import pytest
import torch

ANALOG_CLOCK = 409  # of ImageNet's 1,000 classes


@pytest.fixture(scope="module")
def held_out():
    return classifier.real_images()


def test_the_network_classifies_clocks_correctly(held_out):
    """This needs the weights, the enlargement and the pixel scale of the network's training."""
    images, labels = held_out
    clocks = images[labels == list(classifier.emoji.CLASSES).index("clock")]
    (part,) = classifier.parts(clocks)
    found = imagenet.network()(imagenet.enlarged(part)).softmax(1)
    assert len(clocks) >= 3 and (found.argmax(1) == ANALOG_CLOCK).all() and found[:, ANALOG_CLOCK].min() > 0.5


def test_features_are_the_mean_of_the_last_layer_over_the_picture(held_out):
    images = held_out[0][:2]
    seen, built = [], imagenet.network()
    hook = built._bn1.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    try:
        (part,) = classifier.parts(images)
        built(imagenet.enlarged(part))
    finally:
        hook.remove()
    expected = torch.nn.functional.relu6(seen[0]).mean((2, 3))
    assert torch.allclose(imagenet.features(images), expected, rtol=1e-4, atol=1e-4)


def test_components_agree_with_the_real_images(held_out):
    """They are checked with a held-out image: its components are in the file."""
    real = imagenet.real()
    assert real.components.shape[1] == imagenet.COMPONENTS and len(real.components) > 1000
    found = real.of(held_out[0][:3])
    nearest = (real.components[None] - found[:, None]).norm(dim=2).min(1).values
    assert (nearest < 0.01 * found.norm(dim=1)).all()
    covariance = np.cov(real.components.numpy(), rowvar=False)
    spread = np.diag(covariance)
    assert np.abs(covariance - np.diag(spread)).max() < 1e-4 * spread.max()  # uncorrelated, the largest variance first
    assert (np.diff(spread) <= 1e-6).all()
    assert torch.allclose(real.basis.T @ real.basis, torch.eye(imagenet.COMPONENTS), atol=1e-5)


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    generator = np.random.default_rng(0)
    found = torch.from_numpy(generator.normal(size=(50, 6)) @ generator.normal(size=(6, 6)) + 3)
    mean, basis, share = imagenet.principal(found, 2)
    values, vectors = np.linalg.eigh(np.cov(found.numpy(), rowvar=False))
    assert np.allclose(mean, found.numpy().mean(0)) and share == pytest.approx(values[-2:].sum() / values.sum())
    assert np.allclose(np.abs((basis.double().numpy() * vectors[:, :-3:-1]).sum(0)), 1, atol=1e-5)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[N, 3, 32, 32\]"):
        imagenet.features(torch.zeros(1, 32, 32, 3))
