"""Calibration of a cache on runs of the full-precision model, and a MODEL that caches by what it found."""

import contextlib
import functools

import comfy.sample
import comfy.utils

from ...iec_core.cachequant import (
    CacheProfile,
    ConsumerStatistics,
    CorrectedFeatures,
    FeatureFits,
    StepDistances,
    group_steps,
)
from ...iec_core.caching import FORECASTS, CacheSchedule, FeatureCache
from . import quantize
from .cached_model import cache_kind, with_cache
from .caching import CacheSettings
from .fingerprint import fingerprint, is_same


def calibrate(
    model, prompts, negative, latent_image, seed, runs, sampling, interval, branch, schedule, forecast, correct_consumer
):  # fmt: skip
    """Return the CacheProfile of a MODEL, from `runs` sampling runs of each prompt (CONDITIONING) without its quantization.

    sampling: steps, cfg, sampler_name and scheduler, as the host's KSampler has them. schedule: a CacheSchedule, None for the
    one that is found by dynamic programming. forecast: "hold", one feature is mapped, or "linear", the last two.
    correct_consumer: whether the output of the block that consumes the feature gets a map too, if the model is quantized.
    Raises ValueError where the MODEL cannot be cached.
    """
    kind, settings = cache_kind(model), CacheSettings(interval, branch)
    bits = quantize.quantization_of(model) or "none"
    correct_consumer = correct_consumer and bits != "none" and kind.has_consumer
    passes = 1 + (schedule is None) + correct_consumer
    bar = _Bar(passes * runs * len(prompts) * sampling["steps"])
    sample = functools.partial(_sample_all, prompts, negative, latent_image, seed, runs, sampling, bar)

    if schedule is None:
        distances = StepDistances(interval)
        sample(with_cache(model, settings, lambda new: _ReferenceRun(new(distances, distances.full_steps))))
        distances.check_every_step_was_seen()
        schedule = CacheSchedule("steps", tuple(group_steps(distances.cost(), interval)))
    fits = FeatureFits(lambda steps: schedule.full_steps(steps, interval), FORECASTS.index(forecast) + 1, kind.channel_dim)
    sample(with_cache(model, settings, lambda new: _PairedRun(*2 * [new(fits, fits.full_steps)], fits)))
    fits.check_every_step_was_seen()

    facts = {
        "network": type(model.get_model_object("diffusion_model")).__name__, "branch": branch, "interval": interval,
        "forecast": forecast, "quantization": bits, "prompts": len(prompts), "runs": runs, **sampling,
    }  # fmt: skip
    profile = CacheProfile(
        {name: str(value) for name, value in facts.items()}, fingerprint(model), fits.sigmas, tuple(sorted(fits.firsts)),
        kind.channel_dim, fits.maps(),
    )  # fmt: skip
    if correct_consumer:
        profile.consumer = _fit_consumer(model, settings, profile, fits.full_steps, sample)
    return profile


def _fit_consumer(model, settings, profile, all_steps, sample):
    """Return the map of the consuming block's output from the quantized network, cached by the profile, on full precision."""
    statistics = ConsumerStatistics(profile.channel_dim)

    def make_run(new):
        features = CorrectedFeatures(profile)
        reference = new(FeatureCache(), all_steps, consumed=statistics.consumed)
        return _PairedRun(reference, new(features, features.full_steps, consumed=statistics.consumed), statistics)

    sample(with_cache(model, settings, make_run))
    return statistics.map(len(profile.sigmas) - 1)


def apply_profile(model, profile, correction_pass):
    """Return a clone of a MODEL that caches by a CacheProfile.

    Raises ValueError where the profile is of another model, or the MODEL cannot be cached.
    """
    if not is_same(fingerprint(model), profile.fingerprint):
        raise ValueError(
            f"profile: it was calibrated for another model, a {profile.facts['network']} with other weights; calibrate for "
            "this model, or load its own profile."
        )

    def make_run(new):
        features = CorrectedFeatures(profile)
        consumer = {} if profile.consumer is None else {"consumed": features.consumed}
        return _ProfiledRun(new(features, features.full_steps, **consumer), profile)

    interval, branch = int(profile.facts["interval"]), int(profile.facts["branch"])
    return with_cache(model, CacheSettings(interval, branch, correction_pass=correction_pass), make_run)


class _Bar:
    """The node's progress bar, over the steps of all runs."""

    def __init__(self, total):
        self._bar = comfy.utils.ProgressBar(total)

    def __call__(self, step, denoised, x, total_steps):
        self._bar.update(1)


def _sample_all(prompts, negative, latent_image, seed, runs, sampling, callback, model):
    """Run the model on every prompt, each run with noise of its own."""
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # newer hosts' empty latents have these
    ratios = {name: latent_image[name] for name in ratios if name in latent_image}
    latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], **ratios)
    for prompt in prompts:
        for run in range(runs):
            noise = comfy.sample.prepare_noise(latent, seed + run)
            samples = comfy.sample.sample(
                model, noise, positive=prompt, negative=negative, latent_image=latent, seed=seed + run, callback=callback,
                disable_pbar=True, **sampling,
            )  # fmt: skip
            parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
            if not all(part.isfinite().all() for part in parts):
                raise ValueError(
                    "model: it returned NaN or infinity in a calibration run, from which nothing can be found out; try another "
                    "precision of the model, or fewer patches on it."
                )


class _ReferenceRun:
    """Evaluates the network in full precision."""

    def __init__(self, run):
        self._run = run

    def evaluate(self, executor, *args, **kwargs):
        """As CacheRun.evaluate."""
        quantized = args[5].get(quantize.KEY)  # the host's transformer options
        with contextlib.nullcontext() if quantized is None else quantized.paused():
            return self._run.evaluate(executor, *_own_control(args), **kwargs)

    def clear(self):
        self._run.clear()


class _PairedRun:
    """Evaluates the full-precision network, whose result the sampler gets, then the quantized one at the same place."""

    def __init__(self, reference, measured, statistics):
        self._reference, self._measured, self._statistics = _ReferenceRun(reference), measured, statistics

    def evaluate(self, executor, *args, **kwargs):
        """As CacheRun.evaluate."""
        self._statistics.is_reference = True
        result = self._reference.evaluate(executor, *args, **kwargs)
        if args[5].get(quantize.KEY) is not None:
            self._statistics.is_reference = False
            self._measured.evaluate(executor, *_own_control(args), **kwargs)
        return result

    def clear(self):
        self._reference.clear()
        self._measured.clear()


def _own_control(args):
    """Return the arguments with lists of their own for the ControlNet's residuals, which the host uses up."""
    before, control, after = args[:4], args[4], args[5:]
    return *before, control and {name: list(residuals) for name, residuals in control.items()}, *after


class _ProfiledRun:
    """A cached run that is refused where the model is quantized otherwise than in the calibration."""

    def __init__(self, run, profile):
        self._run, self._profile = run, profile

    def evaluate(self, executor, *args, **kwargs):
        """As CacheRun.evaluate."""
        quantized = args[5].get(quantize.KEY)
        bits, calibrated = "none" if quantized is None else quantized.name, self._profile.facts["quantization"]
        if bits != calibrated:
            raise ValueError(
                f"profile: it was calibrated with quantization {calibrated}, and this model is sampled with quantization "
                f"{bits}; quantize it likewise, or calibrate anew."
            )
        return self._run.evaluate(executor, *args, **kwargs)

    def clear(self):
        self._run.clear()
