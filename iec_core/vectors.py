"""Norms and inner products of the items of a batch. In float32 at least: in float16 a latent's square overflows."""

import torch


def widened(x):
    """Return x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norms(x):
    """Return the Euclidean norm of every item of x [B, ...], as [B]."""
    return torch.linalg.vector_norm(widened(x).flatten(1), dim=1)


def dots(x, y):
    """Return the inner product of every item of x and y [B, ...], as [B]."""
    return torch.linalg.vecdot(widened(x).flatten(1), widened(y).flatten(1))
