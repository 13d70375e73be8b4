"""Networks with random weights, for tests that hold for any weights."""

import torch


def randomize(network, seed):
    """Give a network random weights, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.state_dict().items():
        scale = max(1, weight[0].numel()) ** -0.5 if weight.dim() > 1 else 0.1
        value = torch.randn(weight.shape, generator=generator) * scale
        weight.copy_(1 + value if weight.dim() == 1 and "weight" in name else value)
