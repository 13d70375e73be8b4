"""By what a MODEL is told from another: a sample of its own weights, before any patch."""

import torch

PLACES, VALUES = 256, 16


def fingerprint(model):
    """Return float32 [n <= 4096]: weights of the network at fixed places, as they were loaded; LoRAs and hooks do not show.

    A network in float32, float16 or bfloat16 has the same to about 0.3 %.
    """
    named = sorted(dict(model.model.diffusion_model.named_parameters()).items())
    chosen = [named[number * len(named) // PLACES] for number in range(PLACES)] if len(named) > PLACES else named
    sample = []
    for name, parameter in chosen:
        backup = model.backup.get(f"diffusion_model.{name}")  # of a weight that the host has patched in place
        weight = (parameter if backup is None else backup.weight).detach().flatten()
        places = torch.arange(min(VALUES, weight.numel()), device=weight.device) * weight.numel() // VALUES
        sample.append(weight[places].float().cpu())
    return torch.cat(sample)


def is_same(one, other):
    """Tell whether two fingerprints are of the same model."""
    return one.shape == other.shape and bool((one - other).norm() <= 0.01 * other.norm())
