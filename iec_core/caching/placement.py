"""Which steps of a run to evaluate in full: dynamic programming, and what reuse is expected to cost at given noise levels.

The expected cost needs no calibration and no model, only the noise levels of the run's steps. A step that reuses what an
earlier step has computed has an error as large as the change of the network's prediction between the two. For images whose
power at spatial frequency f is S(f) ~ f^-EXPONENT, the best prediction of the image s from `x = signal s + noise n` is the
Wiener filter, `D = signal S / (signal^2 S + noise^2) x` in each frequency. Along the probability flow, x is in proportion to
`sqrt(signal^2 S + noise^2)`, so that D is in proportion to `signal S / sqrt(signal^2 S + noise^2)`: a known function of the
noise levels. (SeaCache, CVPR 2026, filters the input of each step in this way.) An error of the prediction moves the latent by
the share `1 - r' / r` of itself, where r and r' are noise / signal before and after the step, as in an Euler or a DDIM step.
"""

import math
from collections.abc import Container, Sequence

import numpy as np

EXPONENT = 3.0  # of 2 to 3.5, tried on both built-in models, the only one never significantly worse than evenly spaced steps
FREQUENCIES = np.arange(1.0, 33.0)  # of a latent of 64 x 64, in periods over its side
LONGEST = 2  # a group of steps is at most this many times as long as the mean group
MOST_STEPS = 1000  # for more, the table of costs would be large, and steps are so short that it does not matter where they are


def least_cost_groups(costs: np.ndarray, count: int, shortest: int = 1) -> list[int] | None:
    """Return the first steps of the `count` contiguous groups with the least total cost, in ascending order.

    costs: [steps, longest]; costs[i, k] is the cost of step i + k in a group that begins at step i, and infinite where there is
    no such step. Each group is between `shortest` and `longest` steps long. Returns None where there are no such groups. The
    minimum is exact; of equal ones, the last group is the longest.
    """
    steps, longest = costs.shape
    of_group = np.cumsum(costs, axis=1)  # [i, k]: of the group of k + 1 steps that begins at i
    least = np.full(steps + 1, math.inf)  # by the number of steps that the groups so far contain
    least[0] = 0
    lengths = np.zeros((count, steps + 1), dtype=np.int32)  # of the last group
    for number in range(count):
        before, least = least, np.full(steps + 1, math.inf)
        for length in range(longest, shortest - 1, -1):
            candidate = before[: steps + 1 - length] + of_group[: steps + 1 - length, length - 1]
            is_less = candidate < least[length:]
            least[length:][is_less] = candidate[is_less]
            lengths[number, length:][is_less] = length
    if not math.isfinite(least[steps]):
        return None
    firsts, end = [], steps
    for number in range(count - 1, -1, -1):
        end -= int(lengths[number, end])
        firsts.append(end)
    return firsts[::-1]


def moved_shares(noise: Sequence[float], signal: Sequence[float]) -> np.ndarray:
    """Return by what share of itself an error of the prediction moves the latent in each step: float64 [steps], 0 to 1.

    noise, signal: as for `reuse_costs`.
    """
    noise_of, signal_of = np.asarray(noise, dtype=np.float64), np.asarray(signal, dtype=np.float64)
    here, then = noise_of[:-1] * signal_of[1:], noise_of[1:] * signal_of[:-1]  # their quotient is r / r'
    larger = np.maximum(here, then)
    return np.abs(here - then) / np.where(larger > 0, larger, 1)


def reuse_costs(noise: Sequence[float], signal: Sequence[float], longest: int) -> np.ndarray:
    """Return the expected costs of reuse, as `least_cost_groups` takes them: float64 [steps, longest].

    noise, signal: the factors of the noise and of the image in the latent, n + 1 each, at the start of each step and the end of
    the last. A cost is a root mean square over a latent of variance 1, in the coordinates of the image.
    """
    moved, predictions = moved_shares(noise, signal), _predictions(noise, signal)
    steps = len(moved)
    costs = np.full((steps, longest), math.inf)
    costs[:, 0] = 0
    for lag in range(1, min(longest, steps)):
        costs[:-lag, lag] = moved[lag:] * _distances(predictions[lag:], predictions[:-lag])
    return costs


def _predictions(noise: Sequence[float], signal: Sequence[float]) -> np.ndarray:
    """Return the amplitude of the best prediction at the start of each step, by frequency: [steps, frequencies]."""
    power = FREQUENCIES**-EXPONENT
    power /= np.average(power, weights=FREQUENCIES)  # there are about 2 pi f frequencies of the magnitude f
    a, b = np.asarray(signal, dtype=np.float64)[:-1, None], np.asarray(noise, dtype=np.float64)[:-1, None]
    return a * power / np.sqrt(np.maximum(a**2 * power + b**2, 1e-300))


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.sqrt(np.average((one - other) ** 2, axis=1, weights=FREQUENCIES))


def reuse_errors(noise: Sequence[float], signal: Sequence[float], full: Container[int]) -> list[float]:
    """Return the expected error of each step, as in `reuse_costs`: 0 for the steps in `full`, which has step 0."""
    predictions, starts = _predictions(noise, signal), list[int]()
    for step in range(len(predictions)):
        starts.append(step if step in full or not starts else starts[-1])
    return (moved_shares(noise, signal) * _distances(predictions, predictions[starts])).tolist()


def full_steps_by_noise(
    noise: Sequence[float], signal: Sequence[float], count: int, forced: Container[int] = frozenset()
) -> frozenset[int]:
    """Return the `count` steps whose full evaluation leaves the least expected error; step 0 is always one of them.

    noise, signal: as for `reuse_costs`. forced: steps that are among them in any case. No group of steps, from one that is
    evaluated in full to the last that reuses it, is longer than LONGEST times the mean of those that are not forced, if that
    is possible. Evenly spaced steps, besides those, in a run of more than MOST_STEPS steps, without noise, or with noise levels
    that are not finite.
    """
    steps = len(noise) - 1
    wanted = [step for step in range(steps) if step in forced]
    free = [step for step in range(steps) if step not in forced]
    count = min(max(count, len(wanted) + (0 not in wanted)), steps)
    chosen = count - len(wanted)
    evenly = frozenset(wanted) | {free[number * len(free) // chosen] for number in range(chosen)}
    if steps > MOST_STEPS or not any(noise) or not np.isfinite([*noise, *signal]).all():
        return evenly
    longest = min(LONGEST * max(math.ceil(len(free) / max(chosen, 1)), 1), steps)
    while True:
        costs = reuse_costs(noise, signal, longest)
        for step in wanted:
            for lag in range(1, min(longest, step + 1)):
                costs[step - lag, lag] = math.inf
        firsts = least_cost_groups(costs, count)
        if firsts is not None:
            return frozenset(firsts)
        if longest == steps:  # only with costs that are not finite, of noise levels near the largest float
            return evenly
        longest = min(2 * longest, steps)
