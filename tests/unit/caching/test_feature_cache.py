"""Schedules, forecasts and the keys of the feature cache."""

import numpy as np
import pytest
import torch

from iec_core.caching.feature_cache import FORECASTS, REMEMBERED, UNTRIED, FeatureCache, parse_cache_schedule


def test_first_of_every_interval_is_full():
    uniform = parse_cache_schedule("uniform")
    assert uniform.of(12, 5) == {0, 5, 10}
    assert uniform.of(5, 1) == set(range(5))


def test_listed_steps_are_full_and_so_is_the_first():
    assert parse_cache_schedule(" steps: 3, 7,19 ").of(20, 5) == {0, 3, 7, 19}


@pytest.mark.parametrize("text", ["steps:3,20", "power:20,1.4", "power:40,2"])
def test_schedule_outside_the_run_is_refused(text):
    with pytest.raises(ValueError, match=r"^schedule: it names step (20|40), but the run has 20 steps, numbered from 0 to 19"):
        parse_cache_schedule(text).of(20, 5)


@pytest.mark.parametrize(("center", "power"), [(15, 1.4), (0, 1.2), (10, 1.6), (40, 2.0), (7.5, 1.0)])
@pytest.mark.parametrize(("total", "interval"), [(50, 5), (100, 10), (50, 2)])
def test_power_schedule_is_the_papers_formula(center, power, total, interval):
    """The expected schedule is the paper's, with numpy: evenly spaced roots, raised to the power again; a root keeps
    its sign.
    """
    count = -(-total // interval)
    ends = np.array([-center, total - center], dtype=np.float64)
    low, high = np.sign(ends) * np.abs(ends) ** (1 / power)
    roots = np.linspace(low, high, count + 1)[:-1]
    expected = {0, *np.floor(np.sign(roots) * np.abs(roots) ** power + center + 1e-9).astype(int).tolist()}
    found = parse_cache_schedule(f"power:{center},{power}").of(total, interval)
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


DEGREES = {"hold": 0, "linear": 1, "quadratic": 2, "auto": 1}


@pytest.mark.parametrize("forecast", FORECASTS)
def test_forecast_is_exact_for_a_polynomial_of_its_degree(forecast):
    coefficients = torch.randn(DEGREES[forecast] + 1, 2, 3, dtype=torch.float64)

    def feature(position):
        return sum(c * position**power for power, c in enumerate(coefficients))

    cache = FeatureCache(forecast)
    for position in (0, 3, 4.5, 9, 10):
        cache.store(["a"], feature(position), position)
    torch.testing.assert_close(cache.load(["a"], 2, 14), feature(14))


def test_forecast_of_lower_degree_with_few_features():
    cache, (one, two) = FeatureCache("quadratic"), torch.randn(2, 2, 3)
    cache.store(["a"], one, 0)
    assert torch.equal(cache.load(["a"], 2, 3), one)
    cache.store(["a"], two, 2)
    torch.testing.assert_close(cache.load(["a"], 2, 4), 2 * two - one)


def auto_restated(features, position):
    """Return the forecast of one item's [(position, feature)], with numpy: the share of the line that the trials support."""
    (before, last), (at, held) = features[-2:]
    met = moved = 0.0
    for (p, f), (q, g), (r, true) in zip(features, features[1:], features[2:]):
        move = (g - f) * (r - q) / (q - p)
        met, moved = REMEMBERED * met + np.sum((true - g) * move), REMEMBERED * moved + np.sum(move * move)
    share = UNTRIED if len(features) == 2 else min(max(met / moved, 0), 1)
    return held + share * (held - last) * (position - at) / (at - before)


def test_auto_forecast_equals_its_restatement():
    generator = np.random.default_rng(4)
    drift, noise = generator.normal(size=(2, 5)), generator.normal(size=(6, 2, 5))
    places = [0, 2, 3, 5, 6.5, 9]
    items = [[(at, (0.3, 1.5)[item] * drift[item] * at + n[item]) for at, n in zip(places, noise)] for item in range(2)]
    cache, shares = FeatureCache("auto"), []
    for count, at in enumerate(places, 1):
        cache.store(["a"], torch.from_numpy(np.stack([item[count - 1][1] for item in items])), at)
        if count >= 2:
            expected = np.stack([auto_restated(item[:count], at + 1) for item in items])
            found = cache.load(["a"], 2, at + 1)
            torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)  # the share is in float32
            hold, line = (torch.from_numpy(np.stack([item[k][1] for item in items])) for k in (count - 1, count - 2))
            shares.append(((found - hold) / (hold - line)).mean(1) * (at - places[count - 2]))
    assert all(share[0] != share[1] for share in shares[1:])  # each image by its own trials


@pytest.mark.parametrize("trend", [0, 1])
def test_auto_becomes_hold_for_noise_and_linear_for_a_line(trend):
    torch.manual_seed(1)
    cache, drift = FeatureCache("auto"), torch.randn(1, 4096)
    features = [trend * at * drift + (1 - trend) * torch.randn(1, 4096) for at in range(6)]
    for at, feature in enumerate(features):
        cache.store(["a"], feature, at)
    found = cache.load(["a"], 1, 6)
    torch.testing.assert_close(found, trend * 6 * drift if trend else features[-1])


def test_auto_in_half_precision_and_with_constant_features():
    cache, large = FeatureCache("auto"), torch.full((1, 4096), 300.0, dtype=torch.float16)  # their product is above 65504
    for at, factor in enumerate((1, 1, 1, 1, 2, 3)):
        cache.store(["a"], factor * large, at)
        found = cache.load(["a"], 1, at + 1)
        assert found.dtype == torch.float16 and found.isfinite().all()
        if at < 4:
            assert torch.equal(found, large)


def test_auto_learns_nothing_from_a_replaced_feature_and_forgets_with_the_run():
    cache, noise = FeatureCache("auto"), torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    features = 2 * torch.arange(4.0)[:, None, None] + noise
    for at, feature in enumerate(features[:3]):
        cache.store(["a"], feature, at)
    cache.store(["a"], features[3], 2)  # a correction at the step's own timestep
    move = features[1] - features[0]
    share = ((features[2] - features[1]) * move).sum() / (move * move).sum()
    assert 0.1 < share < 0.9
    expected = features[3] + share * (features[3] - features[1])
    torch.testing.assert_close(cache.load(["a"], 1, 3), expected)
    cache.clear()
    cache.store(["a"], features[0], 0)
    cache.store(["a"], features[1], 1)
    torch.testing.assert_close(cache.load(["a"], 1, 2), features[1] + UNTRIED * (features[1] - features[0]))


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


def test_another_batch_size_is_a_cache_miss():
    cache = FeatureCache()
    cache.store(["cond"], torch.zeros(2, 3), 0)
    assert cache.load(["cond"], 4, 0) is None


def test_a_feature_that_is_too_old_is_a_cache_miss():
    cache = FeatureCache()
    cache.store(["cond", "uncond"], torch.ones(2, 3), 0)
    cache.store(["cond"], torch.ones(1, 3), 3)
    assert cache.load(["cond"], 1, 4, since=3) is not None
    assert cache.load(["uncond"], 1, 4, since=3) is None and cache.load(["uncond"], 1, 4, since=0) is not None


def test_changing_a_loaded_feature_does_not_change_the_cached_one():
    cache = FeatureCache()
    cache.store(["cond"], torch.ones(2, 3), 0)
    cache.load(["cond"], 2, 0).zero_()
    assert torch.equal(cache.load(["cond"], 2, 0), torch.ones(2, 3))


def test_clear_removes_all_features():
    cache = FeatureCache()
    cache.store(["cond"], torch.ones(1), 0)
    cache.clear()
    assert cache.load(["cond"], 1, 0) is None


@pytest.mark.parametrize("forecast", FORECASTS)
def test_entries_no_longer_evaluated_are_dropped(forecast):
    """Moving context windows leave such entries. The memory in use does not grow with the steps; other entries keep their
    history.
    """
    coefficients = torch.randn(DEGREES[forecast] + 1, 2, 3, dtype=torch.float64)
    cache, held = FeatureCache(forecast), []
    for step in range(8):
        feature = sum(c * step**power for power, c in enumerate(coefficients))
        cache.begin(step)
        cache.begin(step)  # as from two runs that share the cache
        cache.store([f"window {step}", "stays"], torch.cat([feature, feature]), step)
        held.append(sum(len(kept) for kept in cache._slices.values()))
        assert cache.load([f"window {step}"], 2, step, since=step) is not None
    assert len(set(held[3:])) == 1 and held[-1] <= 6
    expected = sum(c * 9**power for power, c in enumerate(coefficients))
    torch.testing.assert_close(cache.load(["stays"], 2, 9), expected)
    if forecast == "auto":
        assert len(cache._trials) == 1


def test_entries_with_features_of_different_shapes_are_not_joined():
    cache = FeatureCache()
    for key, tokens in (("a", 7), ("b", 14)):
        cache.store([key], torch.ones(1, tokens, 2), 0.0)
    assert cache.load(["a", "b"], 2, 1.0) is None
    assert cache.load(["a"], 1, 1.0).shape == (1, 7, 2)
