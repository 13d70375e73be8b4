"""Calibrate a cache on runs of the full-precision model, and make a MODEL that caches by the resulting profile."""

import functools

from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ....iec_core.caching.cachequant import (
    CacheProfile,
    ConsumerStatistics,
    CorrectedFeatures,
    FeatureFits,
    StepDistances,
    group_steps,
)
from ....iec_core.caching.feature_cache import KEPT, CacheSchedule, FeatureCache
from ....iec_core.caching.placement import moved_shares
from ..quantization import quantize
from ..quantization.activation_scales import calibrated, scales_of
from ..quantization.weights import fingerprint, is_same
from ..sampling.calibration_runs import Bar
from .cache_run import CacheSettings, noise_and_signal
from .cached_model import branch_of, cache_kind, with_cache


def calibrate(model, full_precision, runs, interval, branch, schedule, forecast, correct_consumer):
    """Return the CacheProfile of a MODEL, from Runs in full precision.

    full_precision: the MODEL that a quantized `model` was made from; ignored if `model` is not quantized. schedule: a
    CacheSchedule, None for the schedule that dynamic programming finds. forecast: "hold" maps one feature, "linear" the last
    two. correct_consumer: whether the output of the block that consumes the feature also gets a map, if the model is
    quantized. Raises ValueError if the MODEL cannot be cached, or if a quantized MODEL is given without its source.
    """
    kind, settings = cache_kind(model), CacheSettings(interval, branch_of(model, branch))
    bits = quantize.quantization_of(model) or "none"
    source = model if bits == "none" else quantize.source_of(model, full_precision)
    correct_consumer = correct_consumer and bits != "none" and kind.has_consumer
    is_by_distance = schedule is None or schedule.kind == "auto"
    passes = 1 + is_by_distance + correct_consumer
    cached = functools.partial(with_cache, source, settings, node="Calibrate CacheQuant (IEC)")
    sample = functools.partial(runs.sample, Bar(passes * runs.steps))

    if is_by_distance:
        distances = StepDistances(interval)
        sample(cached(lambda new: new(distances, distances.full_steps)))
        distances.check_every_step_was_seen()
        levels = None if schedule is None else model.get_model_object("model_sampling")
        schedule = CacheSchedule("steps", tuple(_group_steps(distances, interval, levels)))
    fits = FeatureFits(lambda steps: schedule.of(steps, interval), KEPT[forecast], kind.channel_dim)
    paired = functools.partial(_PairedRun, kind, model, fits)
    sample(cached(lambda new: paired(*(new(fits, fits.full_steps) for _ in range(2)))))
    fits.check_every_step_was_seen()

    facts = {
        "network": type(model.get_model_object("diffusion_model")).__name__, "branch": settings.branch, "interval": interval,
        "forecast": forecast, "quantization": bits, "prompts": len(runs.prompts), "runs": runs.count,
        **runs.sampling,
    }  # fmt: skip
    profile = CacheProfile(
        {name: str(value) for name, value in facts.items()}, fingerprint(model), fits.sigmas, tuple(sorted(fits.firsts)),
        kind.channel_dim, fits.maps(),
    )  # fmt: skip
    if correct_consumer:
        profile.consumer = _fit_consumer(model, cached, profile, fits.full_steps, sample)
    return profile


def _group_steps(distances, interval, levels):
    """Return the first steps of the groups by StepDistances. levels: the `model_sampling`; None for the paper's groups.

    With levels, the distance of a step counts by how far the step moves the latent, and groups may be short.
    """
    if levels is None:
        return group_steps(distances.cost(), interval)
    shares = moved_shares(*noise_and_signal(levels, distances.sigmas))
    return group_steps(distances.cost() * shares, interval, shortest=1)


def _fit_consumer(model, cached, profile, all_steps, sample):
    """Return the map from the consuming block's output in the quantized, cached network to its output in full precision.

    The network is cached by the profile.
    """
    statistics = ConsumerStatistics(profile.channel_dim)

    def make_run(new):
        features = CorrectedFeatures(profile)
        reference = new(FeatureCache(), all_steps, consumed=statistics.consumed)
        measured = new(features, features.full_steps, consumed=statistics.consumed)
        return _PairedRun(cache_kind(model), model, statistics, reference, measured)

    sample(cached(make_run))
    return statistics.map(len(profile.sigmas) - 1)


def apply_profile(model, profile, correction_pass):
    """Return a clone of a MODEL that caches by a CacheProfile.

    Raises ValueError if the profile was calibrated for another model, or if the MODEL cannot be cached.
    """
    is_for_another = profile.channel_dim != cache_kind(model).channel_dim
    if is_for_another or not is_same(fingerprint(model), profile.fingerprint):
        raise ValueError(
            f"profile: it was calibrated for another model, a {profile.facts['network']} with other weights; calibrate for "
            "this model, or load its profile."
        )
    names = cache_kind(model).feature_names(model.get_model_object("diffusion_model"), int(profile.facts["branch"]))
    if not all(name.startswith(names) for name in profile.features):
        raise ValueError(
            "profile: its features have the names that an earlier version of this pack gave them; calibrate again, or use the "
            "profile with that version."
        )

    def make_run(new):
        features = CorrectedFeatures(profile)
        consumer = {} if profile.consumer is None else {"consumed": features.consumed}
        return _ProfiledRun(new(features, features.full_steps, **consumer), profile)

    interval, branch = int(profile.facts["interval"]), int(profile.facts["branch"])
    settings = CacheSettings(interval, branch, correction_pass=correction_pass)
    return with_cache(model, settings, make_run, "CacheQuant (IEC)")


class _PairedRun:
    """A cache run that evaluates the full-precision network and then, if the model is quantized, the quantized network.

    Both are evaluated on the same input. The sampler gets the full-precision result.
    """

    def __init__(self, kind, model, statistics, reference, measured):
        self._kind, self._statistics = kind, statistics
        self._quantized, self._scales = model.model if quantize.quantization_of(model) else None, scales_of(model)
        self._reference, self._measured = reference, measured

    def evaluate(self, executor, x, t, c, y, control, transformer_options, /, **kwargs):
        """Evaluate like the `evaluate` of a CacheRun."""
        self._statistics.is_reference = True
        result = self._reference.evaluate(executor, x, t, c, y, _own(control), transformer_options, **kwargs)
        if self._quantized is not None:
            self._statistics.is_reference = False
            with calibrated(self._quantized.diffusion_model, self._scales, x.device, transformer_options):
                self._measured.evaluate(self._on_quantized(executor), x, t, c, y, control, transformer_options, **kwargs)
        return result

    def _on_quantized(self, executor):
        """Return an executor like this one that calls the quantized model."""
        if self._kind.wrapper_type == WrappersMP.APPLY_MODEL:
            owner = self._quantized
            function = owner._apply_model
        else:
            owner = self._quantized.diffusion_model
            function = owner._forward
        return WrapperExecutor.new_class_executor(function, owner, executor.wrappers, executor.idx)

    def expected(self, sigmas):
        """Return the same as `expected` of a CacheRun."""
        return self._reference.expected(sigmas)

    def end(self):
        self._reference.clear()
        self._measured.clear()


def _own(control):
    """Return a ControlNet's residuals in new lists, because the host empties the lists that it gets."""
    return control and {name: list(residuals) for name, residuals in control.items()}


class _ProfiledRun:
    """A cache run that raises ValueError if the model is quantized differently than in the calibration."""

    def __init__(self, run, profile):
        self._run, self._profile = run, profile

    def evaluate(self, executor, x, t, c, y, control, transformer_options, /, **kwargs):
        """Evaluate like the `evaluate` of a CacheRun."""
        bits, calibrated = transformer_options.get(quantize.KEY, "none"), self._profile.facts["quantization"]
        if bits != calibrated:
            raise ValueError(
                f"profile: it was calibrated with quantization {calibrated}, but this MODEL has quantization {bits}; "
                "quantize the MODEL as in the calibration, or calibrate again."
            )
        return self._run.evaluate(executor, x, t, c, y, control, transformer_options, **kwargs)

    def expected(self, sigmas):
        """Return the same as `expected` of a CacheRun."""
        return self._run.expected(sigmas)

    def end(self):
        self._run.end()
