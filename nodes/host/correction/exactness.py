"""Whether a MODEL is known to be evaluated exactly: neither quantized nor cached, by this pack or another."""

import torch

from ..caching import cache_run as caching
from ..quantization import quantize
from ..sampling.network_calls import others_take_part

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_exact(network, model_options):
    """Return whether a network is known to be evaluated exactly in a sampling run with these model options.

    network: the host's diffusion model. Return False if another pack takes part in its evaluations, because then nothing is
    known.
    """
    options = model_options.get("transformer_options", {})
    if quantize.KEY in options or caching.KEY in options or "easycache" in options:
        return False
    if others_take_part(model_options, network) or options.get("patches_replace"):
        return False
    return all(type(one) is torch.nn.Parameter and one.dtype in FLOATS for one in network.parameters())
