import math
import random

import pytest
import torch

from iec_core.metrics import pareto_front, psnr, relative_error


def test_relative_error_is_per_item():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert relative_error(reference + torch.tensor([[0.0, 0.5], [1.0, 0.0]]), reference).tolist() == [0.1, 0.5]


def test_psnr():
    reference = torch.full((1, 4, 4, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20, abs=1e-5)
    assert psnr(reference, reference) == math.inf
    assert psnr(torch.ones(1, 1), torch.full((1, 1), 1.5)) == math.inf  # both are white on a screen


def dominated(point, points):
    """Return whether another point dominates a point, by the definition."""
    return any(all(a <= b for a, b in zip(other, point)) and other != point for other in points)


@pytest.mark.parametrize("seed", range(20))
def test_pareto_front_has_all_points_that_are_not_dominated(seed):
    draw = random.Random(seed)
    highest = 6 if seed % 2 else 1000  # few values: ties in cost, in error and in both
    points = [(draw.randint(0, highest), draw.randint(0, highest)) for _ in range(25)]
    front = pareto_front(points)
    assert sorted(front) == [i for i, point in enumerate(points) if not dominated(point, points)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_front_of_no_points_and_of_equal_points():
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 0.5), (2.0, 0.5), (1.0, 0.5)]) == [0, 2]
