"""DeepCache (arXiv 2312.00858): which steps are evaluated in full, and the deep features kept between them."""

import torch


def is_full_step(step, interval):
    """Tell whether `step` (from 0) is evaluated in full: the first of every `interval` steps."""
    return step % interval == 0


class FeatureCache:
    """The deep feature of the last full evaluation, one slice for each conditioning entry that was in the batch.

    A host may evaluate its conditioning entries in one batch or apart, in any order: a feature is found by the keys of
    its entries, never by its place in a batch.
    """

    def __init__(self):
        self._slices = {}

    def store(self, keys, feature):
        """Keep `feature` [len(keys) * b, ...]: equal slices along dimension 0, one a key. The tensor is copied."""
        for key, part in zip(keys, feature.detach().clone().chunk(len(keys))):
            self._slices[key] = part

    def load(self, keys, items):
        """Return the feature for a batch of these entries with `items` rows in all, as a tensor of its own, or None
        where an entry has none or where the batch size has changed.
        """
        parts = [self._slices.get(key) for key in keys]
        if any(part is None or part.shape[0] * len(keys) != items for part in parts):
            return None
        return torch.cat(parts)

    def clear(self):
        """Forget every feature."""
        self._slices.clear()
