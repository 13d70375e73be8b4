"""The Space of a search over a MODEL's settings: what can be tried, at which levels, and its expected cost."""

import functools
import math

import comfy.samplers

from ....iec_core.search.candidates import NONE, Space, Way
from ..caching.cached_model import branch_of, cache_kind
from ..sampling.stock_samplers import ONE, evaluations_of

CORRECTED = "auto"
DEEPCACHE, CACHEQUANT, EASYCACHE = "DeepCache", "CacheQuant", "EasyCache"
EIGHT_BITS, FP8, FOUR_BITS = "8 bits", "fp8", "4 bits"
# Samplers without added noise, whose result is comparable; those that helped most often first.
SAMPLERS = ("dpmpp_2m", "res_multistep", "uni_pc", "deis", "ipndm", "euler", "heun")
# Parts of the names of the samplers that add noise, so that runs of another number of steps end elsewhere.
WITH_NOISE = ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver")
CONVERGED_NEEDS = "needs a sampler that comes to the same result with more steps"
SCHEDULERS = ("simple", "karras", "beta", "normal", "sgm_uniform", "kl_optimal")
THRESHOLDS = {3.0: 0.2, 1.5: 0.25, 0.8: 0.3, 0.5: 0.35, 0.3: 0.4, 0.2: 0.5, 0.1: 0.65, 0.05: 0.8, 0.03: 0.9}
MAKING = {CACHEQUANT: 2.0, FOUR_BITS: 2.0}  # what making them costs, in full runs
# The options of the node, and the values that each adds to the space.
TRIED = {
    "caches": {"cache": (DEEPCACHE, EASYCACHE)},
    "correction": {"correction": (CORRECTED,)},
    "eight_bits": {"weights": (EIGHT_BITS,)},
    "fp8": {"weights": (FP8,)},
    "other_samplers": {"sampler": SAMPLERS, "scheduler": SCHEDULERS},
    "calibrated_cache": {"cache": (CACHEQUANT,)},
    "four_bits": {"weights": (FOUR_BITS,)},
}


def adds_noise(sampler):
    """Tell whether a sampler of the host adds noise."""
    return any(part in sampler for part in WITH_NOISE)


class Levels:
    """The levels of the ways to sample a MODEL: how much of the network each evaluates.

    own: the Way of the full run. steps: its steps. fewer: whether a run without a cache may have fewer.
    """

    def __init__(self, model, own, steps, fewer):
        self.own, self._steps, self._fewer = own, steps, fewer
        network = model.get_model_object("diffusion_model")
        self._cached = functools.cache(lambda: cache_kind(model).cached_share(network, branch_of(model, -1)))

    def counts(self, way):
        """Return, for each level from 1 on: the steps; with a cache the full steps; with EasyCache the threshold."""
        if way.cache == EASYCACHE:
            return list(THRESHOLDS)
        if way.cache == DEEPCACHE:
            return list(range(1, self._steps))
        if way.cache == CACHEQUANT:
            return sorted({math.ceil(self._steps / interval) for interval in range(2, self._steps + 1)})
        return list(range(1, self._steps + 1)) if self._fewer else [self._steps]

    def count(self, candidate):
        """Return the entry of `counts` for a candidate."""
        return self.counts(candidate.way)[candidate.level - 1]

    def steps(self, candidate):
        """Return the number of steps of a candidate's run."""
        return self._steps if candidate.way.cache != NONE else self.count(candidate)

    def speed(self, candidate):
        """Return the `speed` of DeepCache at which as many steps are in full as the candidate has."""
        return 1 / self._share(self.count(candidate))

    def interval(self, candidate):
        """Return the interval of CacheQuant at which as many steps are in full as the candidate has."""
        return math.ceil(self._steps / self.count(candidate))

    def expected(self, candidate):
        """Return the expected cost as a share of the full run's, without what quantized weights save."""
        way, count = candidate.way, self.count(candidate)
        if way.cache == EASYCACHE:
            share = THRESHOLDS[count]
        elif way.cache == NONE:
            share = 1.0  # of the evaluations of as many steps
        else:
            share = self._share(count)
        return share * _evaluations(way.sampler, self.steps(candidate)) / _evaluations(self.own.sampler, self._steps)

    def _share(self, full):
        """Return the cost of a cached run with so many full steps as a share of the cost without the cache."""
        share = full / self._steps
        return share + self._cached() * (1 - share)


def _evaluations(sampler, steps):
    """Return how often a sampler evaluates the model in a run; of an unknown one once per step."""
    known = evaluations_of(comfy.samplers.sampler_object(sampler).sampler_function, {}) or ONE
    return len(known.of_steps([1.0] * steps + [0.0]))


def space_of(model, sampling, tried):
    """Return (the Space, its Levels) of a MODEL. sampling: as in Runs. tried: {option of TRIED or "fewer_steps": whether}."""
    own = Way(sampling["sampler_name"], sampling["scheduler"])
    levels = Levels(model, own, sampling["steps"], tried["fewer_steps"])
    options = {}
    for option in (option for option in TRIED if tried[option]):
        for field, values in TRIED[option].items():
            options[field] = (*options.get(field, ()), *(value for value in values if value != getattr(own, field)))
    known = {"sampler": comfy.samplers.KSampler.SAMPLERS, "scheduler": comfy.samplers.KSampler.SCHEDULERS}
    options = {field: [value for value in values if value in known.get(field, values)] for field, values in options.items()}
    space = Space(own, options, lambda way: len(levels.counts(way)), levels.expected, _fits, _making)
    return space, levels


def _fits(way):
    """Tell whether the correction of a way, if it has one, changes anything: `automatic` corrects only some samplers."""
    if way.correction == NONE:
        return True
    return way.cache != EASYCACHE and way.sampler in ("euler", "ddim", "euler_ancestral", "ddpm")


def _making(way):
    return MAKING.get(way.cache, 0.0) + MAKING.get(way.weights, 0.0)


def described(levels, candidate):
    """Return the settings of a candidate in words, such as "8 bits, DeepCache (7 of 20 steps in full)"."""
    way, count, steps = candidate.way, levels.count(candidate), levels.steps(candidate)
    own = levels.own
    parts = [] if way.weights == NONE else [way.weights]
    if way.sampler != own.sampler or way.scheduler != own.scheduler:
        parts.append(f"{way.sampler} on {way.scheduler}")
    if way.cache == EASYCACHE:
        parts.append(f"EasyCache (threshold {count:g})")
    elif way.cache != NONE:
        parts.append(f"{way.cache} ({count} of {steps} steps in full)")
    else:
        parts.append(f"{steps} steps")
    if way.correction != NONE:
        parts.append("corrected")
    return ", ".join(parts)


def as_dict(levels, candidate):
    """Return the settings of a candidate as they go into JSON, under the names of the nodes that make them."""
    way, count = candidate.way, levels.count(candidate)
    found = {"steps": levels.steps(candidate), "sampler_name": way.sampler, "scheduler": way.scheduler, "weights": way.weights}
    found |= {"cache": way.cache, "correction_steps": way.correction}
    if way.cache == EASYCACHE:
        return found | {"reuse_threshold": count}
    return found if way.cache == NONE else found | {"full_steps": count}
