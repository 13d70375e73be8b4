"""Where full steps are placed: compared with all placements, and with the Wiener filter written out over frequencies."""

import itertools
import math

import numpy as np
import pytest

from iec_core.caching.placement import (
    EXPONENT,
    FREQUENCIES,
    LONGEST,
    MOST_STEPS,
    full_steps_by_noise,
    least_cost_groups,
    reuse_costs,
    reuse_errors,
)


def flow(steps):
    """Return (noise, signal) of a flow model's straight path."""
    sigmas = [1 - step / steps for step in range(steps + 1)]
    return sigmas, [1 - sigma for sigma in sigmas]


def karras(steps, high=14.6, low=0.03, rho=7):
    ramp = [(high ** (1 / rho) + step / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for step in range(steps)]
    return [*ramp, 0.0], [1.0] * (steps + 1)


def written_out(noise, signal, start, step):
    """Return the expected error where a step reuses the prediction of an earlier one, frequency by frequency."""
    power = {f: f**-EXPONENT for f in FREQUENCIES}
    mean = sum(f * power[f] for f in power) / sum(power)
    error = 0.0
    for f in power:
        s = power[f] / mean

        def wiener(at, s=s):
            """The gain of the Wiener filter, times the amplitude of what it filters."""
            return signal[at] * s / (signal[at] ** 2 * s + noise[at] ** 2) * math.sqrt(signal[at] ** 2 * s + noise[at] ** 2)

        error += f / sum(power) * (wiener(start) - wiener(step)) ** 2
    ratio = [n / s if s else math.inf for n, s in zip(noise, signal)]
    left = ratio[step + 1] / ratio[step] if math.isfinite(ratio[step]) else 0.0
    return (1 - left) * math.sqrt(error)


@pytest.mark.parametrize("levels", [flow(7), karras(7)])
def test_costs_are_the_wiener_filter_s(levels):
    costs = reuse_costs(*levels, longest=4)
    assert costs.shape == (7, 4) and not costs[:, 0].any()
    for start, lag in itertools.product(range(7), (1, 2, 3)):
        expected = written_out(*levels, start, start + lag) if start + lag < 7 else math.inf
        assert costs[start, lag] == pytest.approx(expected, rel=1e-9)


def test_costs_do_not_depend_on_the_scale_of_the_latent():
    noise, signal = flow(9)
    scaled = reuse_costs([3 * one for one in noise], [3 * one for one in signal], 5)
    np.testing.assert_allclose(scaled, reuse_costs(noise, signal, 5), rtol=1e-12)


def all_placements(steps, count, longest, forced):
    for later in itertools.combinations(range(1, steps), count - 1):
        firsts = (0, *later)
        if forced <= set(firsts) and all(end - first <= longest for first, end in zip(firsts, (*later, steps))):
            yield firsts


@pytest.mark.parametrize("forced", [frozenset(), {9}, {0, 1, 8, 9}])
@pytest.mark.parametrize("count", [3, 5, 6])
@pytest.mark.parametrize("levels", [flow(10), karras(10)])
def test_placement_is_the_best_of_all(levels, count, forced):
    count = max(count, len(forced) + 1)
    longest = LONGEST * math.ceil((10 - len(forced)) / (count - len(forced)))

    def cost(firsts):
        return sum(
            written_out(*levels, first, step) for first, end in zip(firsts, (*firsts[1:], 10)) for step in range(first + 1, end)
        )

    found = full_steps_by_noise(*levels, count, forced)
    assert len(found) == count and forced | {0} <= found
    assert cost(sorted(found)) == pytest.approx(min(map(cost, all_placements(10, count, longest, forced))), rel=1e-9)


def test_flow_models_get_dense_steps_at_the_beginning_and_karras_even_ones():
    assert sorted(full_steps_by_noise(*flow(20), 10)) == [0, 1, 2, 3, 5, 8, 11, 14, 17, 19]
    assert sorted(full_steps_by_noise(*karras(20), 10)) == list(range(0, 20, 2))


def test_number_of_full_steps_is_kept_at_its_limits():
    levels = flow(6)
    assert full_steps_by_noise(*levels, 6) == full_steps_by_noise(*levels, 99) == set(range(6))
    assert full_steps_by_noise(*levels, 1) == full_steps_by_noise(*levels, 0) == {0}
    assert full_steps_by_noise(*levels, 1, {4, 5}) == {0, 4, 5}
    assert full_steps_by_noise(*levels, 1, set(range(6))) == set(range(6))
    assert full_steps_by_noise([1.0, 0.0], [0.0, 1.0], 1) == {0}


def test_longest_run_of_cached_steps_is_bounded():
    for steps, count in itertools.product((20, 50, 101), (2, 5, 9)):
        firsts = [*sorted(full_steps_by_noise(*flow(steps), count)), steps]
        assert max(np.diff(firsts)) <= LONGEST * math.ceil(steps / count) and len(firsts) == count + 1


@pytest.mark.parametrize("direction", [1, -1])
def test_schedules_that_go_up_are_placed_too(direction):
    """A run from the image to the noise has the same steps in the opposite order."""
    noise, signal = karras(9)[0][::direction], [1.0] * 10
    assert len(full_steps_by_noise(noise, signal, 4)) == 4


def test_even_steps_without_noise_and_in_very_long_runs():
    assert full_steps_by_noise([0.0] * 11, [1.0] * 11, 3) == {0, 3, 6}
    noise, signal = flow(MOST_STEPS + 1)
    assert full_steps_by_noise(noise, signal, 2) == {0, (MOST_STEPS + 1) // 2}


@pytest.mark.parametrize("noise", [
    [math.nan] * 8, [14.0, 8.0, 5.0, 2.0, 1.0, 0.5, math.nan, 0.0], [math.inf, 8.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0],
    [1e308, 1e307, 1e306, 2.0, 1.0, 0.5, 0.1, 0.0],
])  # fmt: skip
@pytest.mark.parametrize("forced", [(), {4, 5}, {0, 1}])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_noise_levels_that_are_not_finite_end_in_as_many_steps(noise, forced):
    for count in (1, 3, 7):
        found = full_steps_by_noise(noise, [1.0] * 8, count, forced)
        assert 0 in found and set(forced) <= found <= set(range(7))
        assert len(found) == max(count, len({0, *forced}))


def test_even_steps_are_besides_the_forced_ones():
    assert full_steps_by_noise([0.0] * 41, [1.0] * 41, 30, set(range(20))) == {*range(20), *range(20, 40, 2)}
    noise, signal = flow(1100)
    assert len(full_steps_by_noise(noise, signal, 825, set(range(550)))) == 825


def test_error_of_each_step_is_that_of_its_reuse():
    noise, signal = flow(8)
    found = reuse_errors(noise, signal, {0, 1, 5})
    starts = [0, 1, 1, 1, 1, 5, 5, 5]
    expected = [written_out(noise, signal, start, step) for step, start in enumerate(starts)]
    assert found == pytest.approx(expected, rel=1e-9) and found[0] == found[1] == found[5] == 0
    assert reuse_errors([1.0], [0.0], {0}) == []
    assert len(reuse_errors(*flow(10000), {0})) == 10000  # in no time, and in little memory


def test_no_groups_where_their_lengths_do_not_fit():
    costs = np.zeros((5, 2))
    assert least_cost_groups(costs, 2) is None
    assert least_cost_groups(costs, 3, shortest=2) is None
    assert least_cost_groups(costs, 3) == [0, 1, 3]
