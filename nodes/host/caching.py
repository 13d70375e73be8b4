"""What the caches of U-Nets and of transformers share: when an evaluation is full, and whose features are whose."""

import math
from dataclasses import dataclass

from ...iec_core.caching import CacheSchedule
from .steps import Schedule

KEY = "iec_deepcache"

# What the correction of a full step does: refresh the features (in the authors' code), leave those of the step's own
# evaluation (keep), or take these up and be evaluated over the shallow blocks alone (reuse).
CORRECTION_PASSES = ("refresh", "keep", "reuse")

UNIFORM = CacheSchedule("uniform")


@dataclass(frozen=True)
class CacheSettings:
    """interval, branch: DeepCache's. schedule: a CacheSchedule. start, end: sigmas between which (start inclusive, end
    exclusive) steps are cached. forecast: one of iec_core.caching.FORECASTS. correction_pass: one of CORRECTION_PASSES.
    """

    interval: int
    branch: int
    schedule: CacheSchedule = UNIFORM
    start: float = math.inf
    end: float = -math.inf
    forecast: str = "hold"
    correction_pass: str = "refresh"

    def full_steps(self, sigmas):
        """Return the frozenset of the steps that are evaluated in full over a schedule of n + 1 sigmas."""
        full = self.schedule.full_steps(max(len(sigmas) - 1, 1), self.interval)
        outside = {step for step, sigma in enumerate(sigmas[:-1]) if not self.start >= sigma > self.end}
        return full | outside


@dataclass(frozen=True)
class Plan:
    """What an evaluation does with the cache. keys: of its conditioning entries. position: its place on the schedule, in steps.
    reuses: whether it takes up kept features where there are any. keeps: whether a full evaluation keeps its own.
    """

    keys: list
    position: float
    reuses: bool
    keeps: bool


class CacheRun:
    """One sampling run's cache.

    features: what a FeatureCache does. full_steps(sigmas): the steps that are evaluated in full; None: as the settings say.
    A kind of network has a `channel_dim`, of its features; a `wrapper_type`, the host's wrapper whose place
    `evaluate(executor, ...)` takes; `check(network, branch)`; and may take `consumed(h, position)`, through which it passes the
    output of the block that consumes the feature (`has_consumer`).
    """

    def __init__(self, settings, features, full_steps=None):
        self.settings = settings
        self.features = features
        self.full_steps = full_steps or settings.full_steps
        self._schedule = self._full = None

    def clear(self):
        """Forget the features."""
        self.features.clear()

    def plan(self, x, transformer_options):
        """Return the Plan of the evaluation of x [B, ...]."""
        if self._schedule is None:
            self._schedule = Schedule(transformer_options)
            self._full = self.full_steps(self._schedule.sigmas)
        step, position = self._schedule.locate(transformer_options)
        is_correction = transformer_options.get("iec", {}).get("iteration", 0) > 0
        on_correction = self.settings.correction_pass
        reuses = step not in self._full or (is_correction and on_correction == "reuse")
        return Plan(_entry_keys(x, transformer_options), position, reuses, not (is_correction and on_correction == "keep"))


def full_steps(extra_args, sigmas):
    """Return the steps that the cache of a sampling run evaluates in full, None where it has none.

    extra_args: as a sampler gets them. sigmas: n + 1 floats. Raises ValueError where the cache is not for these.
    """
    cache = extra_args.get("model_options", {}).get("transformer_options", {}).get(KEY)
    return None if cache is None else sorted(cache.full_steps(sigmas))


def other_cache(extra_args):
    """Return the name of the host's own cache (EasyCache, LazyCache) on the MODEL of a sampling run, "" without one."""
    options = extra_args.get("model_options", {}).get("transformer_options", {})
    return getattr(options.get("easycache"), "name", "")


def _entry_keys(x, transformer_options):
    """Return a key for each conditioning entry in the batch: equal keys mean that one's feature can serve the other.

    Besides the entry, as the host numbers it, that takes the shape, the context window if there is one, and which blocks
    are patched: perturbed-attention guidance evaluates an entry twice, once with a replaced attention.
    """
    replaced = transformer_options.get("patches_replace", {})
    patched = frozenset((kind, block) for kind, blocks in replaced.items() for block in blocks)
    window = getattr(transformer_options.get("context_window"), "index_list", ())
    place = (tuple(x.shape[1:]), tuple(window), patched)
    return [(*entry, *place) for entry in zip(transformer_options["cond_or_uncond"], transformer_options["uuids"])]
