"""Whether it is the network that answers an evaluation, or another pack's cache before it."""

import copy
import math

import torch
from comfy.patcher_extension import WrappersMP

KEY = "iec"
BEFORE_THE_NETWORK = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


class NetworkCalls:
    """Counts the evaluations of a run in which the network ran, by a wrapper around it, inside all others.

    It is put on where another pack has a wrapper that might answer. A network that does not call wrappers shows by the first
    evaluation, which nothing can answer before it; its evaluations are taken as its own.
    """

    def __init__(self):
        self._calls = 0
        self._shows = None  # whether the network calls its wrappers

    def watch(self, extra_args):
        """Return a sampler's extra arguments with the wrapper, where it is needed."""
        model_options = extra_args.get("model_options", {})
        options = model_options.get("transformer_options", {})
        wrappers = options.get("wrappers", {})
        keys = {key for kind in BEFORE_THE_NETWORK for key in wrappers.get(kind, {})}
        if all(key == "torch.compile" or str(key).startswith(KEY) for key in keys):
            self._shows = False
            return extra_args

        @torch.compiler.disable(recursive=False)
        def count(executor, *args, **kwargs):
            self._calls += 1
            return executor(*args, **kwargs)

        innermost = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), KEY: [count]}
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
