"""The host's own EasyCache, on a MODEL on which it is exact."""

from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode


def with_easycache(model, threshold, start=0.15, end=0.95):
    """Return a clone of a MODEL with EasyCache: the larger the threshold, the more steps are left out; 0 leaves out none."""
    return EasyCacheNode.execute(with_own_input(model), threshold, start, end, False).result[0]


def with_own_input(model):
    """Return a clone of a MODEL whose network gets a copy of its input.

    On the steps that it leaves out, EasyCache adds to the network's input in place. For a flow model in float32 this is the
    same tensor as the latent from which the host then computes the denoised prediction (in half precision it is a copy).
    """

    def copied(network, x, *rest, **named):
        return network(x.clone(), *rest, **named)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "own_input", copied)
    return model
