"""Error measures between a run and its full-precision reference."""

import math
from collections.abc import Sequence

import torch


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return ||x - reference|| / ||reference|| of each item of a batch [B, ...], as float64 [B]."""
    x, reference = x.double().flatten(1), reference.double().flatten(1)
    return torch.linalg.vector_norm(x - reference, dim=1) / torch.linalg.vector_norm(reference, dim=1)


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1], over all their pixels; inf for equal images."""
    error = (image.double().clamp(0, 1) - reference.double().clamp(0, 1)).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point dominates, cheapest first; equal points are all included.

    points: (cost, error) each. A point dominates another if neither of its values is larger and one is smaller.
    """
    front: list[int] = []
    lowest = math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest or (front and points[index] == points[front[-1]]):
            front.append(index)
            lowest = points[index][1]
    return front
