"""Whether a MODEL is known to be evaluated as it is: neither quantized nor cached, by this pack or another."""

import torch

from . import caching, quantize

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_exact(network, model_options):
    """Return whether a network is known to be evaluated as it is in a sampling run with these model options.

    network: the host's diffusion model. Where another pack takes part in its evaluations nothing is known, and it is False.
    """
    options = model_options.get("transformer_options", {})
    if quantize.KEY in options or caching.KEY in options or "easycache" in options:
        return False
    wrappers = {key for by_key in options.get("wrappers", {}).values() for key, found in by_key.items() if found}
    if any(not str(key).startswith("iec") for key in wrappers):
        return False
    if "model_function_wrapper" in model_options or options.get("patches_replace") or "forward" in vars(network):
        return False
    return all(type(one) is torch.nn.Parameter and one.dtype in FLOATS for one in network.parameters())
