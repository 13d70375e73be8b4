"""Schedules, forecasts and the keys of the feature cache."""

import numpy as np
import pytest
import torch

from iec_core.caching import FORECASTS, FeatureCache, parse_cache_schedule


def test_first_of_every_interval_is_full():
    uniform = parse_cache_schedule("uniform")
    assert uniform.full_steps(12, 5) == {0, 5, 10}
    assert uniform.full_steps(5, 1) == set(range(5))


def test_steps_are_taken_as_written_and_the_first_always_is():
    assert parse_cache_schedule(" steps: 3, 7,19 ").full_steps(20, 5) == {0, 3, 7, 19}


@pytest.mark.parametrize("text", ["steps:3,20", "power:20,1.4", "power:40,2"])
def test_schedule_outside_the_run_is_refused(text):
    with pytest.raises(ValueError, match=r"^schedule: it names step (20|40), and the run has 20 steps, numbered from 0 to 19"):
        parse_cache_schedule(text).full_steps(20, 5)


@pytest.mark.parametrize(("center", "power"), [(15, 1.4), (0, 1.2), (10, 1.6), (40, 2.0), (7.5, 1.0)])
@pytest.mark.parametrize(("total", "interval"), [(50, 5), (100, 10), (50, 2)])
def test_power_schedule_is_the_papers_formula(center, power, total, interval):
    """The paper's evenly spaced roots, raised to the power again, with numpy; a root keeps its sign."""
    count = -(-total // interval)
    ends = np.array([-center, total - center], dtype=np.float64)
    low, high = np.sign(ends) * np.abs(ends) ** (1 / power)
    roots = np.linspace(low, high, count + 1)[:-1]
    expected = {0, *np.floor(np.sign(roots) * np.abs(roots) ** power + center + 1e-9).astype(int).tolist()}
    found = parse_cache_schedule(f"power:{center},{power}").full_steps(total, interval)
    assert found == expected and len(found) <= count
    if power > 1 and 0 < center < total and interval > 2:
        steps = sorted(found)
        gaps = np.diff([*steps, total])
        nearest = min(range(len(steps)), key=lambda number: abs(steps[number] - center))
        assert gaps[nearest] <= gaps.max() and gaps.min() < gaps.max()


@pytest.mark.parametrize("text", ["", "even", "power:15", "power:15,0.9", "steps:", "steps:1,x", "power:-3,1.2"])
def test_unknown_schedule_is_refused(text):
    with pytest.raises(ValueError, match=r"^schedule: "):
        parse_cache_schedule(text)


@pytest.mark.parametrize(("forecast", "degree"), list(zip(FORECASTS, (0, 1, 2))))
def test_forecast_is_exact_for_a_polynomial_of_its_degree(forecast, degree):
    coefficients = torch.randn(degree + 1, 2, 3, dtype=torch.float64)

    def feature(position):
        return sum(c * position**power for power, c in enumerate(coefficients))

    cache = FeatureCache(forecast)
    for position in (0, 3, 4.5, 9, 10):
        cache.store(["a"], feature(position), position)
    torch.testing.assert_close(cache.load(["a"], 2, 14), feature(14))


def test_forecast_begins_with_what_there_is():
    cache, (one, two) = FeatureCache("quadratic"), torch.randn(2, 2, 3)
    cache.store(["a"], one, 0)
    assert torch.equal(cache.load(["a"], 2, 3), one)
    cache.store(["a"], two, 2)
    torch.testing.assert_close(cache.load(["a"], 2, 4), 2 * two - one)


def test_feature_at_the_same_position_is_replaced():
    cache, (one, two, three) = FeatureCache("linear"), torch.randn(3, 2, 3)
    cache.store(["a"], one, 0)
    cache.store(["a"], two, 5)
    cache.store(["a"], three, 5)  # a correction at the step's own timestep
    torch.testing.assert_close(cache.load(["a"], 2, 10), 2 * three - one)


def test_features_are_found_by_key_in_any_grouping():
    cache, feature = FeatureCache(), torch.arange(8.0).reshape(4, 2)
    cache.store(["cond", "uncond"], feature, 0)
    assert torch.equal(cache.load(["uncond", "cond"], 4, 0), torch.cat([feature[2:], feature[:2]]))
    assert torch.equal(cache.load(["uncond"], 2, 0), feature[2:])
    assert cache.load(["cond", "other"], 4, 0) is None


def test_changed_batch_size_is_no_hit():
    cache = FeatureCache()
    cache.store(["cond"], torch.zeros(2, 3), 0)
    assert cache.load(["cond"], 4, 0) is None


def test_who_loads_a_feature_cannot_change_the_kept_one():
    cache = FeatureCache()
    cache.store(["cond"], torch.ones(2, 3), 0)
    cache.load(["cond"], 2, 0).zero_()
    assert torch.equal(cache.load(["cond"], 2, 0), torch.ones(2, 3))


def test_clear_forgets():
    cache = FeatureCache()
    cache.store(["cond"], torch.ones(1), 0)
    cache.clear()
    assert cache.load(["cond"], 1, 0) is None
