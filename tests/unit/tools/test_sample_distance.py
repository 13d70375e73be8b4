"""Distances of sample distributions compared with their formulas in float64, and the coverage of their intervals."""

import re

import numpy as np
import pytest
import scipy.linalg
from sample_distance import (
    frechet_distance,
    kernel_distance,
    mean_with_interval,
    measured,
    ratio_with_interval,
)


def features(rows, width=5, shift=0.0, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, width)) @ (np.eye(width) + 0.3 * generator.normal(size=(width, width))) + shift


def frechet_of_the_paper(x, y):
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    means = np.square(x.mean(0) - y.mean(0)).sum()
    return means + np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)


def kernel_of_the_paper(x, y):
    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    within = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    among = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    return np.mean(within) + np.mean(among) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_frechet_distance_is_the_papers():
    x, y = features(300), features(200, shift=0.4, seed=1)
    assert frechet_distance(x, y) == pytest.approx(frechet_of_the_paper(x, y), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_rows_than_columns():
    """The covariances are singular, for which the general matrix square root is ill-conditioned."""
    x, y = features(6, 20), features(7, 20, seed=1)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
    a, b = (x - x.mean(0)) / np.sqrt(5), (y - y.mean(0)) / np.sqrt(6)
    expected -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()  # the nuclear norm, by factors of the covariances
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_the_papers():
    x, y = features(40), features(30, shift=0.4, seed=1)
    assert kernel_distance(x, y) == pytest.approx(kernel_of_the_paper(x, y), rel=1e-10)


def test_kernel_distance_has_no_bias():
    """For two sets of one distribution its mean is zero, while the Fréchet distance is above zero."""
    generator = np.random.default_rng(2)
    pairs = [generator.normal(size=(2, 50, 4)) for _ in range(200)]
    kernel = np.array([kernel_distance(x, y) for x, y in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(len(kernel))
    assert min(frechet_distance(x, y) for x, y in pairs) > 0


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_intervals_cover_the_mean_at_their_level(kind):
    """95 % of the intervals contain the mean, over seeds, of the distance of as many samples."""
    generator = np.random.default_rng(3)
    real = generator.normal(size=(60, 3)) + 0.7
    measure = {"frechet": frechet_distance, "kernel": kernel_distance}[kind]
    true = np.mean([measure(generator.normal(size=(200, 3)), real) for _ in range(400)])
    covered = 0
    for trial in range(100):
        found, _ = measured(kind, generator.normal(size=(200, 3)), real, resamples=100, seed=trial)
        assert found.low < found.value < found.high
        covered += found.low <= true <= found.high
    assert 85 <= covered <= 100


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_intervals_of_paired_changes_are_narrower_than_unpaired(kind):
    real, x = features(80, seed=4), features(300, seed=5, shift=0.2)
    near = x + 0.05 * np.random.default_rng(6).normal(size=x.shape) + 0.1
    alone, (own, paired) = measured(kind, near, real), measured(kind, near, real, x)
    _, strangers = measured(kind, near[::-1], real, x)
    measure = {"frechet": frechet_distance, "kernel": kernel_distance}[kind]
    assert paired.value == pytest.approx(measure(near, real) - measure(x, real))
    assert paired.high - paired.low < 0.5 * (strangers.high - strangers.low)
    assert paired.low < paired.value < paired.high
    assert alone == (own, None)


def test_no_change_has_no_width():
    real, x = features(80, seed=4), features(300, seed=5)
    _, same = measured("frechet", x, real, x)
    assert same.low == same.value == same.high == 0


def test_interval_of_a_mean_is_the_normal_one_of_many_values():
    values = np.random.default_rng(7).exponential(size=4000)
    found, half = mean_with_interval(values), 1.96 * values.std() / np.sqrt(4000)
    assert found.value == values.mean()
    assert [found.low, found.high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)


def test_the_same_seed_gives_the_same_interval():
    x, y = features(100), features(50, seed=1)
    assert measured("kernel", x, y) == measured("kernel", x, y)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.zeros(5), "samples: its shape is (5,); features are [N, C] with two or more rows."),
        (np.zeros((1, 5)), "samples: its shape is (1, 5); features are [N, C] with two or more rows."),
        (np.full((4, 5), np.nan), "samples: it has values that are not finite numbers; features are finite."),
        (np.zeros((4, 3)), "features: their widths differ (samples 3, real 5); they come from one network."),
    ],
)
def test_bad_features_are_refused(x, told):
    for measure in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
            measure(x, features(10))


def test_pairs_must_be_as_many():
    with pytest.raises(ValueError, match="baseline: it has 9 rows and samples has 10; pairs need as many"):
        measured("frechet", features(10), features(10), features(9))


def test_interval_of_a_ratio_is_of_pairs():
    generator = np.random.default_rng(8)
    before = generator.exponential(size=4000) + 0.1
    share = ratio_with_interval(0.6 * before, before, 0.95)
    assert [share.value, share.low, share.high] == pytest.approx([0.6] * 3)
    after = before * (0.6 + 0.2 * generator.normal(size=4000))
    found, ratio = ratio_with_interval(after, before, 0.95), after.mean() / before.mean()
    half = 1.96 * (after - ratio * before).std() / before.mean() / np.sqrt(4000)  # by the delta method
    assert found.value == pytest.approx(ratio)
    assert [found.low, found.high] == pytest.approx([ratio - half, ratio + half], abs=0.1 * half)
    with pytest.raises(ValueError, match="baseline: it has 9 rows and values has 10; pairs need as many"):
        ratio_with_interval(np.ones(10), np.ones(9), 0.95)
