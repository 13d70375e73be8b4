"""Make the MODELs of a search's candidates."""

import math

import comfy.model_management

from ....iec_core.caching.feature_cache import parse_cache_schedule
from ....iec_core.correction.iteration import CorrectionSettings
from ....iec_core.quantization.packing import WeightFormat
from ....iec_core.run_report import RunReport
from ....iec_core.search.candidates import NONE
from ..caching.cache_run import CacheSettings
from ..caching.cached_model import apply_cache
from ..caching.cachequant import apply_profile, calibrate
from ..correction.sampler import apply_correction
from ..easycache import with_easycache
from ..quantization.quantize import LayerRules, Quantization, quantize_model
from ..quantization.quantized_layers import FASTEST, ActivationFormat
from ..quantization.weight_calibration import calibrate_weights, factors_of
from ..sampling.calibration_runs import no_bars
from .space import CACHEQUANT, DEEPCACHE, EASYCACHE, EIGHT_BITS, FP8

KINDS = {EIGHT_BITS: "int8", FP8: "fp8"}
RANK = 16  # of the 4-bit weights, as with Calibrate Weights (IEC)
MEMORY = 4 * 2**30  # bytes that their calibration may take, as there


class Variants:
    """Makes the MODELs of candidates from a MODEL in full precision.

    Only one quantized model exists at a time. Profiles of caches are kept. runs: the Runs of calibrations. levels: the Levels.
    """

    def __init__(self, model, runs, levels):
        self._model, self._runs, self._levels = model, runs, levels
        self._quantized = NONE, model
        self._profiles = {}

    def model(self, candidate):
        """Return the MODEL of a candidate. Raises ValueError, with a sentence, if it cannot be made."""
        way = candidate.way
        model = self._cached(self._with_weights(way.weights), candidate)
        if way.correction == NONE:
            return model
        settings = CorrectionSettings.parse(way.correction)
        return apply_correction(model, settings, lambda: RunReport("found settings", settings.summary()))

    def _with_weights(self, weights):
        if weights == NONE:
            return self._model
        if self._quantized[0] != weights:
            self._quantized = NONE, self._model  # frees the previous one before the next one is made
            comfy.model_management.soft_empty_cache()
            self._quantized = weights, self._quantize(weights)
        return self._quantized[1]

    def _quantize(self, weights):
        activation, rules = ActivationFormat(8, False, FASTEST), LayerRules()
        if weights in KINDS:
            return quantize_model(self._model, Quantization(WeightFormat(KINDS[weights]), activation, rules, False))
        form = WeightFormat("int4", calibrated=True, rank=RANK, factors=factors_of(self._model))
        with no_bars():
            return calibrate_weights(self._model, Quantization(form, activation, rules, False), self._runs, MEMORY)[0]

    def _cached(self, model, candidate):
        cache = candidate.way.cache
        if cache == DEEPCACHE:
            levels, speed = model.get_model_object("model_sampling"), self._levels.speed(candidate)
            auto = parse_cache_schedule("auto")
            return apply_cache(model, CacheSettings(1, -1, auto, math.inf, -math.inf, "auto", "refresh", levels, speed))
        if cache == CACHEQUANT:
            return apply_profile(model, self._profile(model, candidate), "refresh")
        return with_easycache(model, self._levels.count(candidate)) if cache == EASYCACHE else model

    def _profile(self, model, candidate):
        """Return the CacheProfile, the same with and without a correction."""
        way, interval = candidate.way, self._levels.interval(candidate)
        key = way.weights, way.sampler, way.scheduler, interval
        if key not in self._profiles:
            runs = self._runs.with_sampling(sampler_name=way.sampler, scheduler=way.scheduler)
            auto = parse_cache_schedule("auto")
            with no_bars():
                self._profiles[key] = calibrate(model, self._model, runs, interval, -1, auto, "linear", False)
        return self._profiles[key]
