"""Caching on a MODEL: which cache it gets, and how it is put there."""

import functools

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP

from ...iec_core.caching import FeatureCache
from .caching import KEY
from .dit_cache import TransformerCache
from .runs import keep_for_run
from .unet_cache import UnetCache


def cache_kind(model):
    """Return the kind of CacheRun for a MODEL."""
    return UnetCache if isinstance(model.get_model_object("diffusion_model"), UNetModel) else TransformerCache


def with_cache(model, settings, make_run):
    """Return a clone of a MODEL whose evaluations a cached run decides on, one made anew for each sampling run.

    settings: CacheSettings. make_run(new): the run; new(features, full_steps=None, consumed=None) makes a CacheRun.

    Raises ValueError where the MODEL cannot be cached, has no such branch, or has a cache already.
    """
    if any(KEY in wrappers for wrappers in model.wrappers.values()):
        raise ValueError("model: this MODEL has a cache already; use one IECDeepCache or IECCacheQuant node only.")
    network, kind = model.get_model_object("diffusion_model"), cache_kind(model)
    kind.check(network, settings.branch)

    def evaluate(executor, *args, **kwargs):
        kwargs.pop(KEY, None)
        return args[5][KEY].evaluate(executor, *args, **kwargs)  # the host's transformer options

    new = functools.partial(kind, settings)
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, keep_for_run(KEY, lambda: make_run(new)))
    model.add_wrapper_with_key(kind.wrapper_type, KEY, evaluate)
    if kind.wrapper_type == WrappersMP.DIFFUSION_MODEL:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _mark)
    return model


def _mark(executor, *args, **kwargs):
    """Give the network an argument more than it has without a cache. The host compiles a network without regard to what is in
    the transformer options, among it the cache's wrapper; by this argument what it compiled for a run without one is not taken.
    """
    return executor(*args, **kwargs, **{KEY: True})


def apply_cache(model, settings):
    """Return a clone of a MODEL that caches as CacheSettings say. Raises ValueError as `with_cache`."""
    return with_cache(model, settings, lambda new: new(FeatureCache(settings.forecast)))
