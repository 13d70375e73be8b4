"""Error measures between a run and its full-precision reference."""

import math

import torch


def relative_error(x, reference):
    """Return ||x - reference|| / ||reference|| of every item of a batch [B, ...], in float64, as [B]."""
    x, reference = x.double().flatten(1), reference.double().flatten(1)
    return torch.linalg.vector_norm(x - reference, dim=1) / torch.linalg.vector_norm(reference, dim=1)


def psnr(image, reference):
    """Return the peak signal-to-noise ratio in dB between images in 0..1, over all their pixels; inf if equal."""
    error = (image.double().clamp(0, 1) - reference.double().clamp(0, 1)).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)
