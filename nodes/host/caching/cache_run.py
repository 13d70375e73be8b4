"""What the caches of U-Nets and of transformers share: when an evaluation is full, and whose features are whose."""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from ....iec_core.caching.feature_cache import CacheSchedule
from ....iec_core.log import logger
from ..sampling.run_plan import place

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
    """What an evaluation does with the cache. keys: of its conditioning entries. position: its place on the schedule, in steps,
    None where it is not known. reuses: whether it takes up kept features where there are any. keeps: whether a full evaluation
    keeps its own. since: the position from which on a kept feature is not too old.
    """

    keys: list
    position: float | None
    reuses: bool
    keeps: bool
    since: float = -math.inf

    def load(self, features, items, stream=""):
        """Return what a FeatureCache has for a batch with `items` rows."""
        return features.load(self.keys, items, self.position, stream, self.since)


UNKNOWN = Plan([], None, False, False)


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
        self._schedule = self._full = None  # whose steps these are
        self._evaluation, self._counts = None, Counter()  # how often each key came in the sampler's evaluation
        self._full_step, self._since = None, -math.inf  # the last step that was evaluated in full, and where that began

    def clear(self):
        """Forget the features."""
        self.features.clear()

    def plan(self, x, transformer_options, variant=()):
        """Return the Plan of the evaluation of x [B, ...]. variant: what else tells it from others of its entries.

        Where the host's options leave out the steps or the entries, as of a pack that calls the network in its own way, it is
        evaluated in full.
        """
        told, entries = place(transformer_options), _entries(x, transformer_options)
        if told is None or entries is None:
            warn_once("another node calls the network without telling it the step or the conditioning; it is evaluated in full")
            return UNKNOWN
        where = _where(x, transformer_options, told["latent"], len(entries))
        keys = self._numbered(told["evaluation"], [(*entry, where, variant) for entry in entries])
        self._take_up(told["schedule"])
        step, position, is_correction = told["step"], told["position"], told["iteration"] > 0
        on_correction = self.settings.correction_pass
        reuses = step not in self._full or (is_correction and on_correction == "reuse")
        if step in self._full and step != self._full_step:
            self._begin_full_step(step, position)
        return Plan(keys, position, reuses, not (is_correction and on_correction == "keep"), self._since)

    def _take_up(self, schedule):
        """Begin a schedule. A sampler of another pack may call one of IEC's several times, each with a part of the run's."""
        if schedule is self._schedule:
            return
        if self._schedule is not None:
            self.clear()
            self._full_step, self._since = None, -math.inf
        self._schedule, self._full = schedule, self.full_steps(schedule.sigmas)

    def _begin_full_step(self, step, position):
        """Begin to evaluate a step in full; no feature from before it is taken up any more."""
        self._full_step, self._since = step, position
        self.features.begin(position)

    def _numbered(self, evaluation, keys):
        """Return the keys, each with how often it came before in the sampler's evaluation: a node may have the network evaluate
        one tile of the latent after the other, or the same entry in several ways.
        """
        if evaluation != self._evaluation:
            self._evaluation, self._counts = evaluation, Counter()
        numbered = []
        for key in keys:
            numbered.append((*key, self._counts[key]))
            self._counts[key] += 1
        return numbered


@functools.cache
def warn_once(text):
    """Log a warning, once a process, of a node that keeps a cache from its work."""
    logger.warning(f"Cache: {text}.")


def full_steps(extra_args, sigmas):
    """Return the steps that the cache of a sampling run evaluates in full, None where it has none.

    extra_args: as a sampler gets them. sigmas: n + 1 floats. Raises ValueError where the cache is not for these.
    """
    cache = extra_args.get("model_options", {}).get("transformer_options", {}).get(KEY)
    return None if cache is None else sorted(cache.full_steps(sigmas))


def other_cache(model_options):
    """Return the name of the host's own cache (EasyCache, LazyCache) in model options, "" without one."""
    return getattr(model_options.get("transformer_options", {}).get("easycache"), "name", "")


def _entries(x, transformer_options):
    """Return what names each conditioning entry in the batch: how the host numbers it. None where it is not told."""
    told = [transformer_options.get(name) for name in ("cond_or_uncond", "uuids")]
    given = [names for names in told if names]
    if not given or any(len(names) != len(given[0]) for names in given) or x.shape[0] % len(given[0]):
        return None
    if told[1]:
        return list(zip(*given))
    return [(*entry, *given[0]) for entry in zip(*given)]  # one number may be of several entries: they are known in their batch


def _where(x, transformer_options, latent, entries):
    """Return where in the latent an evaluation is, and how: equal ones mean that one's feature can serve the other.

    That takes its shape and the latent's, the frames of a context window, of the host or of AnimateDiff, if there is one, and
    which blocks are patched: perturbed-attention guidance evaluates an entry twice, once with a replaced attention. And the
    entries of the batch, where these have not the rows of the latent: several tiles may be in it.
    """
    replaced = transformer_options.get("patches_replace", {})
    patched = frozenset((kind, block) for kind, blocks in replaced.items() for block in blocks)
    window = getattr(transformer_options.get("context_window"), "index_list", ())
    frames = (transformer_options.get("ad_params") or {}).get("sub_idxs") or ()
    is_whole = not latent or x.shape[0] == latent[0] * entries
    batch = () if is_whole else tuple(map(str, transformer_options.get("uuids") or transformer_options["cond_or_uncond"]))
    return tuple(x.shape[1:]), latent[1:], tuple(map(int, window)), tuple(map(int, frames)), patched, batch
