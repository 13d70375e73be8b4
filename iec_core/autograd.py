"""Derivatives of networks that change their activations in place."""

import torch


def saved_apart():
    """Return a context in which autograd saves copies, since the host's transformer blocks add to their input in place.

    `torch.autograd.graph.allow_mutation_on_saved_tensors` copies only what is changed, but knows tensors by their address
    alone, and so, in some thousands of steps, takes one for another.
    """

    def copy_activation(tensor):
        return tensor if isinstance(tensor, torch.nn.Parameter) else tensor.clone()

    return torch.autograd.graph.saved_tensors_hooks(copy_activation, lambda tensor: tensor)
