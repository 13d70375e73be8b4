"""Derivatives of networks that change their activations in place."""

import torch


def saved_apart() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which autograd saves copies of activations. ComfyUI's transformer blocks change them in place.

    `torch.autograd.graph.allow_mutation_on_saved_tensors` copies only the tensors that are changed, but identifies tensors by
    their address. Within some thousands of steps it confuses two tensors.
    """

    def copy_activation(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, torch.nn.Parameter) else tensor.clone()

    return torch.autograd.graph.saved_tensors_hooks(copy_activation, lambda tensor: tensor)
