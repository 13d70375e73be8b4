"""Low-rank matrices as two thin factors, such as those with which a LoRA changes a weight."""

import torch

BLOCK = 16  # directions that the first pass searches for; each further pass searches for twice as many

Factors = tuple[torch.Tensor, torch.Tensor]  # out [O, r] and into [r, K]: out @ into is a matrix [O, K] of rank r


def balanced(out: torch.Tensor, into: torch.Tensor) -> Factors:
    """Return factors [O, r] and [r, K] with the same product. Each direction has the same norm in both factors, so that both
    fit in 16 bits.
    """
    balance = (into.norm(dim=1) / out.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return out * balance, into / balance[:, None]


def factored(matrix: torch.Tensor, most: int, negligible: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (out [O, r], into [r, K], rest [O, K]) such that out @ into + rest is the matrix, float32 [O, K].

    The rank r is at most `most`. The norm of rest is at most `negligible`, unless that needs a rank above `most`. A matrix with
    non-finite values gives factors of NaN.

    Directions are found in blocks, from products of the remaining matrix with random vectors (Martinsson and Voronin 2016, doi
    10.1137/15M1026080). The random vectors have a fixed seed, so that the same matrix gives the same factors.
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
    if rest.norm() > negligible / 2:  # one power iteration with the whole matrix: closer to its leading directions
        basis = _orthonormal(matrix @ (matrix.t() @ basis))
    out, into = _without_least(basis, basis.t() @ matrix, negligible)
    return *balanced(out, into), matrix - out @ into


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis [O, r] of columns [O, r]. The CPU computes it faster than a GPU for so thin a matrix."""
    return torch.linalg.qr(columns.cpu())[0].to(columns.device)


def _without_least(basis: torch.Tensor, into: torch.Tensor, negligible: float) -> Factors:
    """Return the factors of least rank whose product differs from basis @ into by a norm of at most `negligible` / 2. The basis
    is orthonormal.
    """
    powers, turned = torch.linalg.eigh((into @ into.t()).double().cpu())  # ascending
    dropped = int((powers.clamp(min=0).cumsum(0) <= (negligible / 2) ** 2).sum())
    turned = turned[:, dropped:].to(into)
    return basis @ turned, turned.t() @ into
