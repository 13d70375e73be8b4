"""Put a cache on a MODEL, of the kind that fits its network, and take it off again."""

import functools
from dataclasses import replace

import comfy.model_patcher
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP

from ....iec_core.caching.feature_cache import FeatureCache
from ..sampling.network_calls import uncompiled
from ..sampling.run_plan import follow_run
from .cache_run import KEY, other_cache, warn_once
from .transformer_cache import TransformerCache
from .unet_cache import UnetCache


def cache_kind(model):
    """Return the CacheRun subclass for a MODEL."""
    return UnetCache if isinstance(uncompiled(model.get_model_object("diffusion_model")), UNetModel) else TransformerCache


def branch_of(model, branch):
    """Return the branch that an input means for a MODEL: -1 is the network's cheapest."""
    return max(branch, cache_kind(model).cheapest_branch(model.get_model_object("diffusion_model")))


def with_cache(model, settings, make_run, node):
    """Return a clone of a MODEL with a cache; each sampling run gets a new cache run.

    settings: CacheSettings. make_run(new): returns the cache run; new(features, full_steps=None, consumed=None) makes a
    CacheRun. node: the node's display name, for messages.

    Raises ValueError if the MODEL cannot be cached, has no such branch, cannot have the speed, or has a cache already. A
    sampling run raises ValueError if the MODEL got another cache later, or has tiles that move.
    """
    if any(KEY in wrappers for wrappers in model.wrappers.values()):
        raise ValueError("model: this MODEL has a cache already; use only one DeepCache (IEC) or CacheQuant (IEC) node.")
    _check_other_cache(model.model_options, node)
    network, kind = model.get_model_object("diffusion_model"), cache_kind(model)
    branch, levels = branch_of(model, settings.branch), model.get_model_object("model_sampling")
    kind.check(network, branch)
    share = kind.cached_share(network, branch)
    settings = replace(settings, branch=branch, cached_share=share, levels=levels)
    if settings.speed * share >= 1:
        smaller = ", or a smaller branch" if branch > kind.cheapest_branch(network) else ""
        choices = f"choose less than {1 / share:.3g}{smaller}" if share < 1 else "write 0, to go by interval"
        raise ValueError(
            f"speed: {settings.speed:g} is not possible at branch {branch} of this network, because a cached step takes "
            f"{share:.2f} of the time of a full one; {choices}."
        )

    def begin_run(model_options):
        _check_other_cache(model_options, node)
        _check_tiles(model_options, node)
        return make_run(functools.partial(kind, settings, model_options=model_options))

    def evaluate(executor, *args, **kwargs):
        """The wrapper of both types. Other nodes' wrappers may pass on arguments by name, and leave out some."""
        kwargs.pop(KEY, None)
        args = [*args, *(kwargs.pop(name, None) for name in kind.arguments[len(args) :])]
        args[-1] = args[-1] or {}  # the transformer options
        run = args[-1].get(KEY)
        if run is None:
            warn_once("another node calls the network outside of a sampling run; these evaluations are done in full")
            return executor(*args, **kwargs)
        return run.evaluate(executor, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _keep_for_run(KEY, begin_run))
    follow_run(model)
    model.add_wrapper_with_key(kind.wrapper_type, KEY, evaluate)
    if kind.wrapper_type == WrappersMP.DIFFUSION_MODEL:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _mark)
    return model


def _keep_for_run(key, make_state):
    """Return an OUTER_SAMPLE wrapper that puts a new make_state(model_options) into `transformer_options[key]` for the run.

    model_options: the run's. When the run ends, also by interrupt or error, the state's `end()` is called and the guider's
    options are restored.
    """

    def outer_sample(executor, *args, **kwargs):
        guider = executor.class_obj
        before = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(before)
        state = guider.model_options["transformer_options"][key] = make_state(before)
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before
            state.end()

    return outer_sample


def without_cache(model):
    """Return a clone of a MODEL without the pack's cache."""
    model = model.clone()
    for wrappers in model.wrappers.values():
        wrappers.pop(KEY, None)
    return model


def _check_other_cache(model_options, node):
    """Raise ValueError if the host's own cache is on the MODEL too."""
    if other := other_cache(model_options):
        raise ValueError(
            f"model: both {other} and {node} are on this MODEL, and neither knows what the other leaves out; use only one of "
            "them."
        )


def _check_tiles(model_options, node):
    """Raise ValueError if another pack's node evaluates tiles of the latent whose places change from step to step."""
    if (name := type(model_options.get("model_function_wrapper")).__name__) == "SpotDiffusion":
        raise ValueError(
            f"model: {name} moves its tiles from step to step, but {node} reuses the feature of a tile; use tiles that do not "
            "move, such as MultiDiffusion's, or no cache."
        )


def _mark(executor, *args, **kwargs):
    """Call the network with one more argument than without a cache.

    The host's compiled network ignores the content of the transformer options, which include the cache's wrapper. The
    additional argument prevents the host from using a graph that it compiled for a run without a cache.
    """
    return executor(*args, **kwargs, **{KEY: True})


def apply_cache(model, settings):
    """Return a clone of a MODEL that caches as CacheSettings say. Raises ValueError like `with_cache`."""
    return with_cache(model, settings, lambda new: new(FeatureCache(settings.forecast)), "DeepCache (IEC)")
