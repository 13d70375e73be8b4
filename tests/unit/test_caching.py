import torch

from iec_core.caching import FeatureCache, is_full_step


def test_first_of_every_interval_is_full():
    assert [step for step in range(12) if is_full_step(step, 5)] == [0, 5, 10]
    assert all(is_full_step(step, 1) for step in range(5))


def test_features_are_found_by_key_in_any_grouping():
    cache, feature = FeatureCache(), torch.arange(8.0).reshape(4, 2)
    cache.store(["cond", "uncond"], feature)
    assert torch.equal(cache.load(["uncond", "cond"], 4), torch.cat([feature[2:], feature[:2]]))
    assert torch.equal(cache.load(["uncond"], 2), feature[2:])
    assert cache.load(["cond", "other"], 4) is None


def test_changed_batch_size_is_no_hit():
    cache = FeatureCache()
    cache.store(["cond"], torch.zeros(2, 3))
    assert cache.load(["cond"], 4) is None


def test_neither_side_can_change_the_kept_feature():
    cache, feature = FeatureCache(), torch.ones(2, 3)
    cache.store(["cond"], feature)
    feature.zero_()
    cache.load(["cond"], 2).zero_()
    assert torch.equal(cache.load(["cond"], 2), torch.ones(2, 3))


def test_clear_forgets():
    cache = FeatureCache()
    cache.store(["cond"], torch.ones(1))
    cache.clear()
    assert cache.load(["cond"], 1) is None
