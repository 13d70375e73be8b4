"""MODELs that differ from another MODEL only by their weights."""

import copy

import torch


def with_weights(model, change):
    """Return a MODEL whose network's parameters are change(parameter)."""
    other = model.clone()
    other.model = type(model.model).__new__(type(model.model))
    torch.nn.Module.__init__(other.model)
    other.model.__dict__.update({key: value for key, value in model.model.__dict__.items() if key != "_modules"})
    network = copy.deepcopy(model.model.diffusion_model)
    for parameter in network.parameters():
        parameter.data = change(parameter.data)
    other.model._modules = {**model.model._modules, "diffusion_model": network}
    return other


def tuned(model, share=0.1):
    """Return a fine-tune: its matrices differ by a share of their spread, and its gains and offsets do not differ."""
    generator = torch.Generator().manual_seed(1)

    def tune(weight):
        return weight + share * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim > 1 else weight

    return with_weights(model, tune)
