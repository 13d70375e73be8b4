import math

import pytest
import torch

from iec_core.metrics import psnr, relative_error


def test_relative_error_is_per_item():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert relative_error(reference + torch.tensor([[0.0, 0.5], [1.0, 0.0]]), reference).tolist() == [0.1, 0.5]


def test_psnr():
    reference = torch.full((1, 4, 4, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20, abs=1e-5)
    assert psnr(reference, reference) == math.inf
    assert psnr(torch.ones(1, 1), torch.full((1, 1), 1.5)) == math.inf  # both are white on a screen
