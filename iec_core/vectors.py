"""Norms and inner products of each item of a batch, in float32 or wider: in float16 the square of a latent overflows."""

import torch


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norms(x: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of each item of x [B, ...], as [B]."""
    return torch.linalg.vector_norm(widened(x).flatten(1), dim=1)


def dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the inner product of each item of x and y [B, ...], as [B]."""
    return torch.linalg.vecdot(widened(x).flatten(1), widened(y).flatten(1))
