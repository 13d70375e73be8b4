"""Cache profiles: the schedule compared with brute force, the correction with written-out least squares, and files."""

import itertools
import json
import math

import pytest
import torch
from meta_device import Copies

from iec_core.caching.cachequant import (
    CacheProfile,
    ChannelFit,
    ConsumerStatistics,
    CorrectedFeatures,
    FeatureFits,
    StepDistances,
    group_steps,
    mapped,
)
from iec_core.errors import ModelError, ProfileError


def cost_of(cost, firsts, total):
    """Return the sum of |F_s - F_start| over all steps."""
    ends = [*firsts[1:], total]
    return sum(cost[first][step] for first, end in zip(firsts, ends) for step in range(first + 1, end))


def all_splits(total, count, shortest, longest):
    for later in itertools.combinations(range(1, total), count - 1):
        firsts = [0, *later]
        lengths = [end - first for first, end in zip(firsts, [*later, total])]
        if all(shortest <= length <= longest for length in lengths):
            yield firsts


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("total", [1, 5, 9, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_grouping_is_optimal(total, interval, seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(total, total, generator=generator, dtype=torch.float64).tolist()
    count = math.ceil(total / interval)
    shortest = min(math.ceil(interval / 2), total // count)
    splits = list(all_splits(total, count, shortest, 2 * interval))
    firsts = group_steps(cost, interval)
    assert firsts in splits
    assert cost_of(cost, firsts, total) == pytest.approx(min(cost_of(cost, split, total) for split in splits), abs=1e-12)


def test_costs_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match=r"^model: its features overflow in a calibration run\."):
        group_steps([[math.inf] * 6] * 6, 2, 2)


def test_grouping_puts_more_full_steps_where_features_change():
    place = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 2.0, 4.0, 6.0, 8.0, 8.1, 8.2])
    cost = (place[:, None] - place).abs().tolist()
    assert group_steps(cost, 3) == [0, 3, 7, 9]  # 4.6 in total; every third step costs 6.9


def channels(x, channel_dim):
    return x.movedim(channel_dim, 0).flatten(1).double()


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 3, 4, 5), 1), ((2, 7, 3), -1)])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("columns", [5, 65536])
def test_fit_is_the_least_squares_solution(monkeypatch, shape, channel_dim, terms, columns):
    monkeypatch.setattr("iec_core.caching.cachequant.COLUMNS", columns)
    generator = torch.Generator().manual_seed(3)
    fit, rows = ChannelFit(channel_dim), []
    for _ in range(3):
        xs = [torch.randn(shape, generator=generator) for _ in range(terms)]
        y = 0.7 * xs[0] + 0.3 * torch.randn(shape, generator=generator) + 1.5
        fit.add(xs, y)
        rows.append(torch.stack([channels(value, channel_dim) for value in (*xs, torch.ones_like(y), y)], dim=2))
    table = torch.cat(rows, dim=1)  # [C, n, terms + 2]
    expected = torch.linalg.lstsq(table[:, :, :-1], table[:, :, -1:]).solution[:, :, 0]
    torch.testing.assert_close(fit.solve(), expected, rtol=1e-9, atol=1e-9)
    if terms == 1:  # the paper's a = cov / var
        x, y = table[:, :, 0], table[:, :, -1]
        covariance = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1)
        torch.testing.assert_close(fit.solve()[:, 0], covariance / x.var(1, correction=0), rtol=1e-9, atol=1e-9)


def test_fit_of_a_constant_has_slope_one_and_an_offset():
    constant, y = torch.full((1, 1, 4), 2.0), torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    fit = ChannelFit(1)
    fit.add([constant], y)
    assert fit.solve().tolist() == [[1.0, 1.0]]
    twice = ChannelFit(1)
    twice.add([y, y], 3 * y)  # the two terms cannot be distinguished
    weights = twice.solve()
    torch.testing.assert_close(weights[:, :2].sum(1), torch.tensor([3.0], dtype=torch.float64))


def feature(step, scale=1.0):
    """Return a feature of two conditioning entries with three channels, each linear in the step."""
    base = torch.arange(24.0).reshape(2, 3, 4) / 10 + 1
    return base * (1 + 0.1 * step) * scale + torch.tensor([0.0, 0.2, -0.1])[:, None] * step


def curve(step):
    """Return a feature that no map of a single other step gives: two patterns, each with its own course over the steps."""
    one, other = torch.arange(24.0).reshape(2, 3, 4) / 10, torch.arange(24.0).reshape(2, 3, 4).sin()
    return one * (1 + 0.1 * step) + other * (1 + 0.3 * step) ** 0.5


FACTS = {
    "network": "Net", "scheduler": "even", "sampler_name": "euler", "branch": "0", "interval": "2", "quantization": "none",
}  # fmt: skip


def fitted(steps, full_steps, terms=1, of=feature, quantized=None):
    fits = FeatureFits(lambda total: frozenset(full_steps), terms, 1)
    assert fits.full_steps(range(steps + 1)) == {*range(steps)}
    for step in range(steps):
        fits.is_reference = True
        fits.store(["cond", "uncond"], of(step), float(step))
        if quantized is not None:
            fits.is_reference = False
            fits.store(["cond", "uncond"], quantized(of(step)), float(step))
    fits.clear()
    return fits.maps()


def profile(steps=6, full_steps=(0, 2, 4), **settings):
    sigmas = torch.linspace(10, 0, steps + 1, dtype=torch.float64)
    maps = fitted(steps, full_steps, **settings)
    return CacheProfile(dict(FACTS), torch.randn(8), sigmas, full_steps, 1, maps)


def test_distances_are_means_up_to_twice_the_interval():
    distances = StepDistances(2)
    distances.full_steps(range(7))
    for step in [0.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 5.0]:  # a sampler may evaluate a step more than once
        distances.store(["cond", "uncond"], feature(step), step)
    cost = distances.cost()
    for start, step in [(0, 1), (0, 3), (2, 5)]:
        parts = zip(feature(start).chunk(2), feature(step).chunk(2))
        assert cost[start][step] == pytest.approx(sum((y - x).abs().mean().item() for x, y in parts), rel=1e-6)
    assert cost[0][4] == 0 and cost[3][1] == 0


@pytest.mark.parametrize("quantized", [None, lambda x: 0.9 * x - 0.3])
@pytest.mark.parametrize(("of", "terms", "error"), [(feature, 1, 1e-4), (feature, 2, 1e-4), (curve, 2, 1e-4), (curve, 1, None)])
def test_corrected_features_equal_the_steps_own(quantized, of, terms, error):
    """A feature that the map can express is exact; the map also corrects errors of the network that it can express."""
    full_steps = (0, 1, 3)
    cache, worst = CorrectedFeatures(profile(full_steps=full_steps, of=of, terms=terms, quantized=quantized)), 0.0
    assert cache.full_steps(torch.linspace(10, 0, 7, dtype=torch.float64).tolist()) == {*full_steps}
    for step in range(6):
        if step in full_steps:
            cache.store(["cond", "uncond"], (quantized or (lambda x: x))(of(step)), float(step))
        else:
            loaded = cache.load(["uncond", "cond"], 2, float(step))
            worst = max(worst, (loaded - of(step).flip(0)).abs().max().item())
    assert worst < error if error else worst > 1e-3


def test_a_run_over_part_of_the_schedule_uses_the_matching_steps():
    cache = CorrectedFeatures(profile())
    sigmas = torch.linspace(10, 0, 7, dtype=torch.float64)[1:].tolist()
    assert cache.full_steps(sigmas) == {0, 1, 3}
    cache.store(["cond"], feature(1)[:1], 0.0)
    cache.store(["cond"], feature(2)[:1], 1.0)
    torch.testing.assert_close(cache.load(["cond"], 1, 2.0), feature(3)[:1], rtol=1e-4, atol=1e-4)


def test_a_run_that_begins_within_a_group_is_not_corrected_there():
    cache = CorrectedFeatures(profile(full_steps=(0, 3)))
    cache.full_steps(torch.linspace(10, 0, 7, dtype=torch.float64)[1:].tolist())
    cache.store(["cond"], feature(1)[:1], 0.0)
    assert torch.equal(cache.load(["cond"], 1, 1.0), feature(1)[:1])


def test_a_run_that_ends_early_may_take_its_last_step_to_zero():
    cache = CorrectedFeatures(profile())
    sigmas = [*torch.linspace(10, 0, 7, dtype=torch.float64)[1:4].tolist(), 0.0]
    assert cache.full_steps(sigmas) == {0, 1}


def test_only_features_of_the_profiles_full_steps_are_stored():
    """A sampler's evaluation between two steps, or a correction at the next step's sigma, does not replace the step's own
    feature.
    """
    cache = CorrectedFeatures(profile())
    cache.full_steps(torch.linspace(10, 0, 7, dtype=torch.float64).tolist())
    cache.store(["cond"], feature(2)[:1], 2.0)
    for elsewhere in (2.52, 3.0):
        cache.store(["cond"], torch.zeros_like(feature(2)[:1]), elsewhere)
    torch.testing.assert_close(cache.load(["cond"], 1, 3.0), feature(3)[:1], rtol=1e-4, atol=1e-4)
    cache.store(["cond"], feature(2)[:1] + 1, 2.0)  # a correction at the step's own sigma refreshes it
    assert not torch.allclose(cache.load(["cond"], 1, 3.0), feature(3)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("terms", [1, 2])
def test_a_later_conditioning_is_corrected_once_it_has_full_steps(terms):
    def fit(entries):
        fits = FeatureFits(lambda total: frozenset({0, 2, 4}), terms, 1)
        fits.full_steps(range(7))
        for step in range(6):
            fits.store(["cond"], feature(step)[:1], float(step))
            if "late" in entries and step >= 3:  # missing at step 2, whose feature step 3 would reuse
                fits.store(["late"], 5 - feature(step)[1:] ** 2, float(step))
        return fits.maps()[""]

    alone, both = fit([]), fit(["late"])
    assert torch.equal(alone[:5], both[:5])
    assert torch.equal(alone[5], both[5]) == (terms == 2)  # it has the feature of step 4, but not of both steps 2 and 4


def test_steps_that_a_sampler_never_evaluates_are_reported():
    distances = StepDistances(2)
    distances.full_steps(range(5))
    for position in (0.0, 0.7, 1.4, 2.0):
        distances.store(["cond"], feature(0)[:1], position)
    with pytest.raises(ValueError, match=r"^sampler_name: it does not evaluate the network at the start of step 1 of"):
        distances.check_every_step_was_seen()


def test_consumer_statistics_map_one_network_to_the_other():
    statistics = ConsumerStatistics(1)
    for step in range(2):
        statistics.is_reference = True
        statistics.consumed(feature(step), float(step))
        statistics.is_reference = False
        statistics.consumed(0.5 * feature(step) - step, float(step))
    weights = statistics.map(2)
    torch.testing.assert_close(weights[1], torch.tensor([[2.0, 2.0]]).expand(3, 2), rtol=1e-4, atol=1e-4)
    corrected = profile(full_steps=(0, 2, 4))
    corrected.consumer = weights
    cache = CorrectedFeatures(corrected)
    torch.testing.assert_close(cache.consumed(0.5 * feature(1) - 1, 1.0), feature(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigmas", [[10.0, 5.0, 0.0], [9.0, 8.0, 7.0], [*range(12, -1, -1)]])
def test_another_schedule_is_refused(sigmas):
    with pytest.raises(ValueError, match=r"^profile: it was calibrated for 6 steps of euler on even from sigma 10 to 0, but"):
        CorrectedFeatures(profile()).full_steps(sigmas)


def test_another_schedule_with_the_same_ends_is_refused():
    sigmas = profile().sigmas.tolist()
    sigmas[3] *= 1.1
    with pytest.raises(
        ValueError,
        match=rf"from {sigmas[0]:g} to 0, and its step 3 begins at {sigmas[3]:.4g} instead of {sigmas[3] / 1.1:.4g};",
    ):
        CorrectedFeatures(profile()).full_steps(sigmas)


def test_the_schedule_tolerance_is_relative_to_the_runs_sigma():
    """The tolerance is relative to the run's sigma. Relative to the larger calibrated sigma, this difference would still be
    within the tolerance.
    """
    sigmas = profile().sigmas.tolist()
    sigmas[3] -= 0.9995e-3 * sigmas[3] + 1e-4
    with pytest.raises(ProfileError, match="and its step 3 begins"):
        CorrectedFeatures(profile()).full_steps(sigmas)


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sigmas_that_are_not_finite_are_refused(step, value):
    sigmas = profile().sigmas.tolist()
    sigmas[step] = value
    with pytest.raises(ProfileError, match=r"^profile: it was calibrated for"):
        CorrectedFeatures(profile()).full_steps(sigmas)


def test_profile_survives_its_file(tmp_path):
    before = profile(terms=2)
    before.consumer = torch.ones(6, 3, 2)
    before.save(tmp_path / "p.safetensors")
    after = CacheProfile.load(tmp_path / "p.safetensors")
    assert (after.facts, after.full_steps, after.channel_dim) == (before.facts, before.full_steps, before.channel_dim)
    for name in ("fingerprint", "sigmas", "consumer"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert set(after.features) == set(before.features) == {""}
    assert torch.equal(after.features[""], before.features[""])


SPOILED = {
    "no sigmas": lambda tensors, about: tensors.pop("sigmas"),
    "no facts": lambda tensors, about: about.pop("facts"),
    "facts that are no table": lambda tensors, about: about.update(facts="[1]"),
    "facts without a branch": lambda tensors, about: about.update(facts='{"network": "Net"}'),
    "no channels": lambda tensors, about: about.update(channel_dim="x"),
    "a map of fewer steps": lambda tensors, about: tensors.update({"feature.": tensors["feature."][:3].clone()}),
    "a map of no channels": lambda tensors, about: tensors.update({"feature.": torch.zeros(6)}),
    "NaN": lambda tensors, about: tensors["feature."].fill_(float("nan")),
    "a step beyond the last": lambda tensors, about: tensors.update(full_steps=torch.tensor([0, 6])),
    "half a step": lambda tensors, about: tensors.update(full_steps=torch.tensor([0, 2.5])),
    "steps out of order": lambda tensors, about: tensors.update(full_steps=torch.tensor([0, 4, 2])),
    "a step twice": lambda tensors, about: tensors.update(full_steps=torch.tensor([0, 2, 2])),
    "no first step": lambda tensors, about: tensors.update(full_steps=torch.tensor([2, 4])),
    "steps in a table": lambda tensors, about: tensors.update(full_steps=torch.tensor([[0, 2]])),
    "no step": lambda tensors, about: tensors.update(full_steps=torch.tensor([], dtype=torch.int64)),
    "sigmas in a table": lambda tensors, about: tensors.update(sigmas=tensors["sigmas"][None].clone()),
    "whole sigmas": lambda tensors, about: tensors.update(sigmas=tensors["sigmas"].long()),
    "an interval in words": lambda tensors, about: spoil_fact(about, "interval", "two"),
    "no interval": lambda tensors, about: spoil_fact(about, "interval", "0"),
    "half a branch": lambda tensors, about: spoil_fact(about, "branch", "0.5"),
    "a branch below -1": lambda tensors, about: spoil_fact(about, "branch", "-2"),
    "a fact that is no text": lambda tensors, about: spoil_fact(about, "sampler_name", ["euler"]),
    "channels where none are": lambda tensors, about: about.update(channel_dim="7"),
    "no map": lambda tensors, about: tensors.pop("feature."),
    "maps of several kinds": lambda tensors, about: tensors.update({"feature.x": torch.ones(6, 3, 3)}),
    "a map of many features": lambda tensors, about: tensors.update({"feature.": torch.ones(6, 3, 4)}),
    "a consumer's map of two": lambda tensors, about: tensors.update(consumer=torch.ones(6, 3, 3)),
}


def spoil_fact(about, name, value):
    about["facts"] = json.dumps({**json.loads(about["facts"]), name: value})


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_profile_is_refused(spoiled, kind):
    path = spoiled(profile(), SPOILED[kind])
    with pytest.raises(ValueError, match=r"^its content is not that of a cache profile; calibrate again$"):
        CacheProfile.load(path)


def test_maps_for_another_number_of_channels_are_refused():
    spoiled = profile()
    spoiled.features = {"": torch.ones(6, 5, 2)}
    with pytest.raises(ValueError, match=r"^profile: its corrections are for 5 channels, but this model has 3;"):
        CorrectedFeatures(spoiled).store(["cond"], feature(0), 0.0)
    spoiled.consumer = torch.ones(6, 4, 2)
    with pytest.raises(ValueError, match=r"^profile: its corrections are for 4 channels, but this model has 3;"):
        CorrectedFeatures(spoiled).consumed(feature(0), 0.0)


def test_maps_move_to_a_device_once_per_run_without_waiting():
    calibrated = profile()
    calibrated.consumer = torch.ones(6, 3, 2)
    features = CorrectedFeatures(calibrated)
    features.full_steps(calibrated.sigmas)
    with Copies() as copies:
        features.store(["cond"], feature(0).to("meta"), 0.0)
        counts = []
        for position in (1.0, 1.0, 1.5):
            held = feature(0)
            taken = features.load(["cond"], len(held), position)
            assert taken.device.type == features.consumed(taken, position).device.type == "meta"
            counts.append(copies.count)
    assert counts[0] > 0 and counts == counts[:1] * 3


def test_mapping_keeps_the_dtype():
    x, old = torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.full((2, 3, 4), 2, dtype=torch.bfloat16)
    weights = torch.tensor([[1.0, 0.5, 1.0], [2.0, 0.0, 1.0], [3.0, -1.0, 1.0]])
    result = mapped([x, old], weights, 1)
    assert result.dtype == torch.bfloat16 and result[0, :, 0].tolist() == [3.0, 3.0, 2.0]
