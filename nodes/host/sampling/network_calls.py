"""Whether another pack takes part in an evaluation, and whether the network itself was evaluated."""

import copy
import math

import torch
from comfy.patcher_extension import WrappersMP

IEC = "iec"  # prefix of our wrappers' keys; also the key in the transformer options for what an IEC sampler tells
BEFORE_THE_NETWORK = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def base_of(denoiser):
    """Return the BaseModel that the host's denoiser, as samplers get it, evaluates; None if it is not accessible."""
    return getattr(getattr(denoiser, "inner_model", None), "inner_model", None)


def network_of(denoiser):
    """Return the network that the host's denoiser, as samplers get it, evaluates; None if it is not accessible."""
    return getattr(base_of(denoiser), "diffusion_model", None)


def uncompiled(network):
    """Return the network, or block, inside torch.compile's wrapper."""
    return getattr(network, "_orig_mod", network)


def others_take_part(model_options, network=None):
    """Return whether another pack takes part in evaluations of a network, and so may replace or change them.

    The pack may do so by a wrapper, by a function around the model, or by another `forward` of the network. torch.compile does
    not count. model_options: those of the sampling run. network: the host's diffusion model, None if it is not known.
    """
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    keys = {key for kind in BEFORE_THE_NETWORK for key, found in wrappers.get(kind, {}).items() if found}
    if any(key != "torch.compile" and not str(key).startswith(IEC) for key in keys):
        return True
    network = uncompiled(network)
    return "model_function_wrapper" in model_options or "forward" in getattr(network, "__dict__", {})


class NetworkCalls:
    """Counts the evaluations of a run in which the network itself ran, by a wrapper inside all other wrappers.

    The wrapper is used only if another pack takes part, which may answer instead of the network. At the first evaluation
    nothing can answer instead. If the wrapper is not called there, the network does not call wrappers, and every evaluation
    counts as one of the network.
    """

    def __init__(self):
        self._calls = 0
        self._shows = None  # whether the network calls its wrappers; None: not known yet

    def watch(self, extra_args, network):
        """Return a sampler's extra arguments, with the wrapper if it is needed. network: as from `network_of`."""
        model_options = extra_args.get("model_options", {})
        options = model_options.get("transformer_options", {})
        wrappers = options.get("wrappers", {})
        if not others_take_part(model_options, network):
            self._shows = False
            return extra_args

        @torch.compiler.disable(recursive=False)
        def count(executor, *args, **kwargs):
            self._calls += 1
            return executor(*args, **kwargs)

        innermost = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), IEC: [count]}
        options = {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: innermost}}
        return {**extra_args, "model_options": {**model_options, "transformer_options": options}}

    def have_been(self):
        """Return, after an evaluation, whether the network ran in it."""
        calls, self._calls = self._calls, 0
        if self._shows is None:
            self._shows = calls > 0
        return calls > 0 or not self._shows


def past_other_cache(transformer_options):
    """Return options with which the host's EasyCache or LazyCache neither skips an evaluation nor learns from it."""
    cache = transformer_options.get("easycache")
    if not hasattr(cache, "end_t"):
        return transformer_options
    cache = copy.copy(cache)
    cache.end_t = math.inf  # the cache acts as after the end of its part of the schedule
    return {**transformer_options, "easycache": cache}
