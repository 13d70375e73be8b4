"""Matrices of low rank as two thin factors, such as a LoRA makes of a weight's change."""

import torch

BLOCK = 16  # directions that are looked for first; each next time twice as many


def balanced(out, into):
    """Return factors [O, r] and [r, K] of the same product, each direction as large in either, so that 16 bits hold both."""
    balance = (into.norm(dim=1) / out.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return out * balance, into / balance[:, None]


def factored(matrix, most, negligible):
    """Return (out [O, r], into [r, K], rest [O, K]) such that out @ into + rest is the matrix, float32 [O, K]. The norm of
    rest is at most `negligible`, unless that would take a rank above `most`. What is not finite makes factors that are not.

    Directions are found in blocks, from random products with what is left (Martinsson and Voronin 2016, doi
    10.1137/15M1026080); the same for the same matrix.
    """
    if not matrix.isfinite().all():
        return matrix.new_full((len(matrix), 1), torch.nan), matrix.new_full((1, matrix.shape[1]), torch.nan), matrix
    most, generator = min(most, *matrix.shape), torch.Generator().manual_seed(0)
    rest, basis, block = matrix, matrix.new_zeros(len(matrix), 0), BLOCK
    while basis.shape[1] < most and rest.norm() > negligible / 2:
        block = min(block, most - basis.shape[1])
        drawn = torch.randn(rest.shape[1], block, generator=generator).to(rest.device)
        basis = _orthonormal(torch.cat([basis, rest @ drawn], dim=1))
        rest = matrix - basis @ (basis.t() @ matrix)
        block *= 2
    if rest.norm() > negligible / 2:  # once more from all of the matrix: nearer to its leading directions than to drawn ones
        basis = _orthonormal(matrix @ (matrix.t() @ basis))
    out, into = _without_least(basis, basis.t() @ matrix, negligible)
    return *balanced(out, into), matrix - out @ into


def _orthonormal(columns):
    """Return an orthonormal basis of columns [O, r]; of so thin a matrix the CPU finds it faster than a GPU."""
    return torch.linalg.qr(columns.cpu())[0].to(columns.device)


def _without_least(basis, into, negligible):
    """Return factors of basis @ into of the least rank, basis orthonormal, that leave half of `negligible` out."""
    powers, turned = torch.linalg.eigh((into @ into.t()).double().cpu())  # ascending
    dropped = int((powers.clamp(min=0).cumsum(0) <= (negligible / 2) ** 2).sum())
    turned = turned[:, dropped:].to(into)
    return basis @ turned, turned.t() @ into
