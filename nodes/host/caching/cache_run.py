"""The part that U-Net and transformer caches share: which evaluations are full, and which kept features each may reuse."""

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch

from ....iec_core.caching.feature_cache import CacheSchedule
from ....iec_core.caching.placement import full_steps_by_noise, reuse_errors
from ....iec_core.log import logger
from ..sampling.run_plan import place

KEY = "iec_deepcache"

# What the correction of a full step does with the features: replace them (refresh, as in the authors' code), leave those of
# the step's own evaluation (keep), or reuse those and evaluate only the shallow blocks (reuse).
CORRECTION_PASSES = ("refresh", "keep", "reuse")

UNIFORM = CacheSchedule("uniform")


@dataclass(frozen=True)
class CacheSettings:
    """The settings of a cache.

    interval, branch: as in DeepCache; `with_cache` replaces -1 by the network's cheapest branch. schedule: a CacheSchedule.
    start, end: only steps at sigmas between these (start inclusive, end exclusive) are cached. forecast: one of
    `feature_cache.FORECASTS`. correction_pass: one of CORRECTION_PASSES. levels: the MODEL's `model_sampling`. speed: how many
    times as fast as without the cache a run is to be, instead of the interval; 0 for the interval. cached_share: the cost of a
    cached step as a share of a full one's.
    """

    interval: int
    branch: int
    schedule: CacheSchedule = UNIFORM
    start: float = math.inf
    end: float = -math.inf
    forecast: str = "hold"
    correction_pass: str = "refresh"
    levels: object = None
    speed: float = 0.0
    cached_share: float = 0.0

    def full_steps(self, sigmas):
        """Return the frozenset of the steps that are evaluated in full, for a schedule of n + 1 sigmas."""
        total = len(sigmas) - 1
        if total < 1:  # another pack's sampler may evaluate the network without a step
            return frozenset({0})
        outside = {step for step, sigma in enumerate(sigmas[:-1]) if not self.start >= sigma > self.end}
        interval = self._interval(total, len(outside))
        if self.schedule.kind == "auto":
            count = len(outside) + math.ceil((total - len(outside)) / interval)
            return full_steps_by_noise(*noise_and_signal(self.levels, sigmas), count, outside)
        return self.schedule.of(total, interval) | outside

    def _interval(self, total, outside):
        """Return how many of the steps that may be cached there are for each full one, an int or a Fraction.

        outside: how many of the `total` steps may not be cached.
        """
        if not self.speed or outside == total:
            return self.interval
        share = self.cached_share
        full = round((total / self.speed - total * share) / (1 - share))  # full + share * (total - full) = total / speed
        return Fraction(total - outside, min(max(full - outside, 1), total - outside))

    def expected(self, sigmas, full):
        """Return the ExpectedSteps of a run over n + 1 sigmas. full: its steps that are evaluated in full."""
        share = len(full) / max(len(sigmas) - 1, 1)
        errors = reuse_errors(*noise_and_signal(self.levels, sigmas), full)
        return ExpectedSteps(sorted(full), share + self.cached_share * (1 - share), errors)

    def warn_if_slower(self, expected):
        """Log a warning if a run cannot have the speed, because its steps are too few, or many of them may not be cached."""
        nearest = 0.5 * (1 - self.cached_share) / len(expected.errors)  # a number of full steps is whole
        if self.speed and expected.cost > 1 / self.speed + nearest + 1e-6:
            warn_once(
                f"speed: {self.speed:g} cannot be reached in this run of {len(expected.errors)} steps, of which "
                f"{len(expected.full)} have to be evaluated in full; expected is {1 / expected.cost:.3g}"
            )


@dataclass(frozen=True)
class ExpectedSteps:
    """What is expected of a cached run.

    full: the numbers of the steps that are evaluated in full, a list. cost: of the run, as a share of that without the cache,
    judged by the network's weights. errors: of each step, from the noise levels; see `placement.reuse_costs`.
    """

    full: list
    cost: float
    errors: list

    def __str__(self):
        return f"{len(self.full)} of {len(self.errors)} steps in full, an expected {self.cost:.2f} of the time without a cache"


def noise_and_signal(levels, sigmas):
    """Return (the factors of the noise, those of the image) in a latent at each sigma, two lists of floats.

    levels: an object with the methods of the host's `model_sampling`. The image has the variance 1. Without noise where another
    pack's object cannot tell.
    """
    if not hasattr(levels, "noise_scaling"):
        return [0.0] * len(sigmas), [1.0] * len(sigmas)
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)[:, None]
    noise = levels.noise_scaling(sigmas[:, 0], torch.ones_like(sigmas), torch.zeros_like(sigmas))
    signal = levels.noise_scaling(sigmas[:, 0], torch.zeros_like(sigmas), torch.ones_like(sigmas))
    return noise.flatten().tolist(), (signal * getattr(levels, "sigma_data", 1.0)).flatten().tolist()


@dataclass(frozen=True)
class Plan:
    """What an evaluation does with the cache.

    keys: the keys of its conditioning entries. position: its place on the schedule, in steps, None if it is not known. reuses:
    whether it reuses kept features if there are any. keeps: whether it keeps its own features if it is evaluated in full.
    since: features kept at an earlier position are too old.
    """

    keys: list
    position: float | None
    reuses: bool
    keeps: bool
    since: float = -math.inf

    def load(self, features, items, stream=""):
        """Return the feature that a FeatureCache has for a batch with `items` rows."""
        return features.load(self.keys, items, self.position, stream, self.since)


UNKNOWN = Plan([], None, False, False)


class CacheRun:
    """The cache of one sampling run.

    features: a FeatureCache or an object with its interface. full_steps(sigmas): returns the steps that are evaluated in full;
    None: as the settings say.

    The subclass for a kind of network defines `channel_dim`, the channel dimension of its features; `wrapper_type`, the kind of
    host wrapper that `evaluate(executor, ...)` implements, and `arguments`, the names of its arguments;
    `cheapest_branch(network)`; `check(network, branch)`; `cached_share(network, branch)`, the cost of a cached evaluation as a
    share of a full one's; and `feature_names(network, branch)`, the beginnings of its features' names. If `has_consumer` is
    true, its constructor takes `consumed(h, position)`, which maps the output of the block that consumes the feature.
    """

    def __init__(self, settings, features, full_steps=None):
        self.settings = settings
        self.features = features
        self.full_steps = full_steps or settings.full_steps
        self._schedule = self._full = None  # the schedule, and its steps that are evaluated in full
        self._expected = None  # the ExpectedSteps of the schedule
        self._evaluation, self._counts = None, Counter()  # how often each key occurred in the sampler's evaluation
        self._full_step, self._since = None, -math.inf  # the last step evaluated in full, and the position where it began
        self._networks = {}  # {network: its number}, in the order in which the run evaluates them

    def clear(self):
        """Forget the features."""
        self.features.clear()

    def end(self):
        """End the run: forget the features, and log what it was."""
        self.clear()
        if self._expected is not None:
            logger.info(f"Cache: {self._expected}.")

    def expected(self, sigmas):
        """Return the ExpectedSteps of a run over n + 1 sigmas."""
        return self.settings.expected(sigmas, self.full_steps(sigmas))

    def plan(self, x, transformer_options, network, variant=()):
        """Return the Plan of the evaluation of x [B, ...].

        network: the evaluated one; a guider may use several. variant: a hashable value that distinguishes this evaluation from
        other evaluations of the same conditioning entries. If the host's options do not contain the step or the entries,
        because another pack calls the network in its own way, the evaluation is full.
        """
        told, entries = place(transformer_options), _entries(x, transformer_options)
        if told is None or entries is None:
            warn_once(
                "another node calls the network without passing the step or the conditioning; these evaluations are done in "
                "full"
            )
            return UNKNOWN
        where = _where(x, transformer_options, told["latent"], len(entries))
        number = self._networks.setdefault(network, len(self._networks))
        keys = self._numbered(told["evaluation"], [(*entry, where, variant, number, x.device) for entry in entries])
        self._take_up(told["schedule"])
        step, position, is_correction = told["step"], told["position"], told["iteration"] > 0
        on_correction = self.settings.correction_pass
        reuses = step not in self._full or (is_correction and on_correction == "reuse")
        if step in self._full and step != self._full_step:
            self._begin_full_step(step, position)
        return Plan(keys, position, reuses, not (is_correction and on_correction == "keep"), self._since)

    def _take_up(self, schedule):
        """Begin a schedule. Another pack's sampler may call an IEC sampler several times in a run, each time with a part of the
        schedule.
        """
        if schedule is self._schedule:
            return
        if self._schedule is not None:
            self.clear()
            self._full_step, self._since = None, -math.inf
        self._schedule, self._full = schedule, self.full_steps(schedule.sigmas)
        if len(schedule.sigmas) > 1:
            self._expected = self.settings.expected(schedule.sigmas, self._full)
            self.settings.warn_if_slower(self._expected)

    def _begin_full_step(self, step, position):
        """Begin a step that is evaluated in full.

        From now on, an entry is evaluated in full until it has a feature that was kept in this step or later. Once it has one,
        a forecast also uses its older kept features.
        """
        self._full_step, self._since = step, position
        self.features.begin(position)

    def _numbered(self, evaluation, keys):
        """Return each key with the number of times it occurred before in the sampler's evaluation.

        A key can occur several times: a node may let the network evaluate one tile of the latent after the other, or the same
        entry in several ways.
        """
        if evaluation != self._evaluation:
            self._evaluation, self._counts = evaluation, Counter()
        numbered = []
        for key in keys:
            numbered.append((*key, self._counts[key]))
            self._counts[key] += 1
        return numbered


def weights_in(module):
    """Return the number of weights in a module, also of quantized ones."""
    return sum(tensor.numel() for tensor in itertools.chain(module.parameters(), module.buffers()))


@functools.cache
def warn_once(text):
    """Log a warning, once per process, about a node that prevents caching."""
    logger.warning(f"Cache: {text}.")


def expected_of_run(extra_args, sigmas):
    """Return the ExpectedSteps of the cache of a sampling run, None if the run has no cache.

    extra_args: as a sampler gets them. sigmas: n + 1 floats. Raises ValueError if the cache does not fit these sigmas.
    """
    cache = extra_args.get("model_options", {}).get("transformer_options", {}).get(KEY)
    return None if cache is None else cache.expected(sigmas)


def other_cache(model_options):
    """Return the name of the host's own cache (EasyCache, LazyCache) in model options, "" if there is none."""
    return getattr(model_options.get("transformer_options", {}).get("easycache"), "name", "")


def _entries(x, transformer_options):
    """Return a tuple for each conditioning entry of the batch, made of the host's ids for it; None if the host gives no ids."""
    told = [transformer_options.get(name) for name in ("cond_or_uncond", "uuids")]
    given = [names for names in told if names]
    if not given or any(len(names) != len(given[0]) for names in given) or x.shape[0] % len(given[0]):
        return None
    if told[1]:
        return list(zip(*given))
    # Several entries may have the same number. The numbers of the whole batch distinguish them.
    return [(*entry, *given[0]) for entry in zip(*given)]


def _where(x, transformer_options, latent, entries):
    """Return a key for the part of the latent that an evaluation covers, and for its patches.

    If the keys of two evaluations are equal, one can reuse the feature of the other. The key contains the shapes of x and of
    the latent, the frames of a context window (of the host or of AnimateDiff), and the patched blocks: perturbed-attention
    guidance evaluates an entry twice, once with a replaced attention. If the number of rows of x is
    not the latent's times the number of entries, several tiles may be in the batch; the key then also contains the entries.
    """
    replaced = transformer_options.get("patches_replace", {})
    patched = frozenset((kind, block) for kind, blocks in replaced.items() for block in blocks)
    window = getattr(transformer_options.get("context_window"), "index_list", ())
    frames = (transformer_options.get("ad_params") or {}).get("sub_idxs") or ()
    is_whole = not latent or x.shape[0] == latent[0] * entries
    batch = () if is_whole else tuple(map(str, transformer_options.get("uuids") or transformer_options["cond_or_uncond"]))
    return tuple(x.shape[1:]), latent[1:], tuple(map(int, window)), tuple(map(int, frames)), patched, batch
