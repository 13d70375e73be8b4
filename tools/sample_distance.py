"""Measure how far the distribution of samples is from that of real images, in the features of a network.

Fréchet distance: Heusel et al. 2017, arXiv 1706.08500. Kernel distance: Binkowski et al. 2018, arXiv 1801.01401. With other
features than Inception's, these distances must not be called FID and KID.

The intervals are bootstrap intervals (Efron 1979): samples are drawn again, with replacement. The real images are kept, since
all rows are compared with the same ones. A resampled row holds copies. The kernel distance leaves out the pairs of an item with
itself; so it must also leave out pairs of copies, which `_Kernel` does.
"""

import functools
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float


def _checked(**features):
    """Return the features as float64 arrays.

    Raises ValueError if one is not a matrix of at least two rows and finite numbers, or if the widths differ.
    """
    arrays = {name: np.asarray(value, np.float64) for name, value in features.items()}
    for name, array in arrays.items():
        if array.ndim != 2 or len(array) < 2:
            raise ValueError(f"{name}: its shape is {array.shape}; features are [N, C] with two or more rows.")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: it has values that are not finite numbers; features are finite.")
    if len({array.shape[1] for array in arrays.values()}) > 1:
        widths = ", ".join(f"{name} {array.shape[1]}" for name, array in arrays.items())
        raise ValueError(f"features: their widths differ ({widths}); they come from one network.")
    return list(arrays.values())


def _square_root(matrix):
    """Return the symmetric square root of a symmetric positive semidefinite matrix; eigenvalues below zero (rounding) count as
    zero.
    """
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


class _Frechet:
    """The Fréchet distance of weighted samples to a real set."""

    def __init__(self, samples, real):
        self._samples, self._mean, self._covariance = samples, real.mean(0), np.cov(real, rowvar=False)
        self._root = _square_root(self._covariance)

    def __call__(self, counts):
        """Return the distance; counts: how often each sample is taken, integers [N]."""
        total = counts.sum()
        mean = counts @ self._samples / total
        centred = self._samples - mean
        covariance = (centred * counts[:, None]).T @ centred / (total - 1)
        # the eigenvalues of the symmetric R^1/2 S R^1/2 are those of R S, and give tr (R S)^1/2
        product = np.linalg.eigvalsh(self._root @ covariance @ self._root)
        shift = np.square(mean - self._mean).sum()
        return shift + np.trace(covariance) + np.trace(self._covariance) - 2 * np.sqrt(product.clip(min=0)).sum()

    def of_draws(self, counts):
        """Return the distances [R] of counts [R, N]."""
        return np.array([self(drawn) for drawn in counts])


class _Kernel:
    """The unbiased squared maximum mean discrepancy of weighted samples to a real set, with the kernel (x.y / C + 1)^3."""

    def __init__(self, samples, real):
        def kernel(x, y):
            return (x @ y.T / x.shape[1] + 1) ** 3

        self._within, across, among = kernel(samples, samples), kernel(samples, real), kernel(real, real)
        np.fill_diagonal(self._within, 0)
        self._across = across.mean(1)
        np.fill_diagonal(among, 0)
        self._among = among.sum() / (len(real) * (len(real) - 1))

    def __call__(self, counts):
        """Return the distance; counts: how often each sample is taken, integers [N]."""
        return self.of_draws(counts[None])[0]

    def of_draws(self, counts):
        """Return the distances [R] of counts [R, N]. Copies are the same item: their pairs count neither in the sum nor in the
        number of pairs.
        """
        total = counts.sum(1)
        pairs = total**2 - np.square(counts).sum(1)
        within = np.einsum("rn,rn->r", counts @ self._within, counts)
        return within / pairs - 2 * counts @ self._across / total + self._among


MEASURES = {"frechet": _Frechet, "kernel": _Kernel}


def frechet_distance(samples, real):
    """Return the Fréchet distance of the Gaussians fitted to features [N, C] and [M, C]; covariances with N - 1, float64.

    Raises ValueError for features that are not such matrices.
    """
    samples, real = _checked(samples=samples, real=real)
    return float(_Frechet(samples, real)(np.ones(len(samples), np.int64)))


def kernel_distance(samples, real):
    """Return the unbiased squared MMD of features [N, C] and [M, C] with (x.y / C + 1)^3; it may be negative.

    Raises ValueError for features that are not such matrices.
    """
    samples, real = _checked(samples=samples, real=real)
    return float(_Kernel(samples, real)(np.ones(len(samples), np.int64)))


@functools.cache  # drawing them for every row of the docs would take half of the time
def _draws(size, resamples, seed):
    """Return how often each of `size` items is drawn, integers [resamples, size], read-only because the result is cached."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)


def _estimate(value, resampled, level=LEVEL):
    """Return the Estimate from the quantiles of the resampled values, shifted so that their mean is the value.

    The Fréchet distance of finite samples is too high by an amount that falls as 1/N. Resampling makes copies, which adds this
    amount once more: without the shift, the quantiles would lie above the value. The interval applies to the distance at this
    number of samples, so that only rows with equally many samples are comparable.
    """
    margin = (1 - level) / 2
    low, high = np.quantile(resampled, [margin, 1 - margin]) - np.mean(resampled)
    return Estimate(float(value), float(value + low), float(value + high))


def measured(kind, samples, real, baseline=None, resamples=200, seed=0):
    """Return (the Estimate of a distance of MEASURES, the Estimate of its change from a baseline's distance), with 95 %
    intervals.

    The second is None without a baseline. samples, real: features [N, C] and [M, C]. baseline: [N, C] of the same seeds in the
    same order. Samples and baseline are resampled in pairs, so that what they have in common cancels. Raises ValueError for
    features that are not such matrices, or if the numbers of samples and baseline differ.
    """
    samples, real = _checked(samples=samples, real=real)
    draws = _draws(len(samples), resamples, seed)
    distance, resampled = _of_all_and_draws(kind, samples, real, draws)
    if baseline is None:
        return _estimate(distance, resampled), None
    samples, baseline = _checked(samples=samples, baseline=baseline)
    if len(samples) != len(baseline):
        raise ValueError(f"baseline: it has {len(baseline)} rows and samples has {len(samples)}; pairs need as many.")
    before, resampled_before = _of_all_and_draws(kind, baseline, real, draws)
    return _estimate(distance, resampled), _estimate(distance - before, resampled - resampled_before)


def _of_all_and_draws(kind, samples, real, draws):
    """Return the distance of the samples, and the distances [R] of the resampled ones; draws: counts [R, N]."""
    measure = MEASURES[kind](samples, real)
    return measure(np.ones(len(samples), np.int64)), measure.of_draws(draws)


def mean_with_interval(values, resamples=1000, seed=0):
    """Return the Estimate of the mean of values [N]. Raises ValueError if they are not at least two finite numbers."""
    (column,) = _checked(values=np.asarray(values, np.float64)[:, None])
    resampled = _draws(len(column), resamples, seed) @ column[:, 0] / len(column)
    return _estimate(column.mean(), resampled)


def ratio_with_interval(values, baseline, level, resamples=2000, seed=0):
    """Return the Estimate of the mean of values [N] over the mean of a baseline's [N], resampled in pairs.

    If each value is the same multiple of its baseline value, the interval has no width. Raises ValueError if they are not at
    least two finite numbers, equally many of each.
    """
    values, baseline = _checked(values=np.stack([values], 1), baseline=np.stack([baseline], 1))
    if len(values) != len(baseline):
        raise ValueError(f"baseline: it has {len(baseline)} rows and values has {len(values)}; pairs need as many.")
    draws = _draws(len(values), resamples, seed)
    ratios = (draws @ values / (draws @ baseline))[:, 0]
    return _estimate(values.mean() / baseline.mean(), ratios, level)
