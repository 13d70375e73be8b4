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


def pareto_front(points):
    """Return the indices of the points that no other dominates, cheapest first; equal points are all in it.

    points: list of (cost, error). One dominates another where it has at most its cost and its error, and less of one.
    """
    front, lowest = [], math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest or (front and points[index] == points[front[-1]]):
            front.append(index)
            lowest = points[index][1]
    return front
