"""Whether another pack takes part in an evaluation, and whether the network answers it or that pack does."""

import copy
import math

import torch
from comfy.patcher_extension import WrappersMP

IEC = "iec"  # what our own wrappers' keys begin with, and where the transformer options have what an IEC sampler tells
BEFORE_THE_NETWORK = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def base_of(denoiser):
    """Return the BaseModel that the host's denoiser, as samplers get it, evaluates; None where it does not show it."""
    return getattr(getattr(denoiser, "inner_model", None), "inner_model", None)


def network_of(denoiser):
    """Return the network that the host's denoiser, as samplers get it, evaluates; None where it does not show it."""
    return getattr(base_of(denoiser), "diffusion_model", None)


def others_take_part(model_options, network=None):
    """Return whether another pack takes part in the evaluations of a network (the host's diffusion model; None: not known) in a
    sampling run with these model options, and may answer in its place or change what it does: by a wrapper, by a function
    around the model, or by another `forward` of the network. What compiles it does neither.
    """
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    keys = {key for kind in BEFORE_THE_NETWORK for key, found in wrappers.get(kind, {}).items() if found}
    if any(key != "torch.compile" and not str(key).startswith(IEC) for key in keys):
        return True
    network = getattr(network, "_orig_mod", network)  # what torch.compile has wrapped
    return "model_function_wrapper" in model_options or "forward" in getattr(network, "__dict__", {})


class NetworkCalls:
    """Counts the evaluations of a run in which the network ran, by a wrapper around it, inside all others.

    It is put on where another pack takes part, which might answer. A network that does not call wrappers shows by the first
    evaluation, which nothing can answer before it; its evaluations are taken as its own.
    """

    def __init__(self):
        self._calls = 0
        self._shows = None  # whether the network calls its wrappers

    def watch(self, extra_args, network):
        """Return a sampler's extra arguments with the wrapper, where it is needed. network: as of `network_of`."""
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
        """Tell, after an evaluation, whether the network ran in it."""
        calls, self._calls = self._calls, 0
        if self._shows is None:
            self._shows = calls > 0
        return calls > 0 or not self._shows


def past_other_cache(transformer_options):
    """Return the options of an evaluation that the host's EasyCache or LazyCache lets pass and learns nothing from."""
    cache = transformer_options.get("easycache")
    if not hasattr(cache, "end_t"):
        return transformer_options
    cache = copy.copy(cache)
    cache.end_t = math.inf  # as behind the end of the schedule that it is for
    return {**transformer_options, "easycache": cache}
