"""Least squares in batches: every leading dim is one problem, solved together with the others."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30


def nnls(a: Tensor, b: Tensor, start: Tensor, *, damping: float, steps: int) -> Tensor:
    """x >= 0 [.., n] with least |a x - b|^2 + damping * |s (x - start)|^2; a [.., m, n], b [.., m].

    s are the lengths of the columns of `a`, so `damping` has no unit. Projected gradient with
    Nesterov's acceleration (FISTA, https://doi.org/10.1137/080716542) in columns of unit length:
    matrix products only, where an active set would branch for every head.
    """
    size = a.norm(dim=-2).clamp_min(TINY)
    unit = a / size[..., None, :]
    eye = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
    gram = unit.mT @ unit + damping * eye
    first = start * size
    aim = (unit.mT @ b[..., None])[..., 0] + damping * first
    rate = 1.0 / gram.abs().sum(-1).amax(-1, keepdim=True)  # no eigenvalue exceeds a row's sum
    x = y = first
    pace = 1.0
    for _ in range(steps):
        new = (y - rate * ((gram @ y[..., None])[..., 0] - aim)).clamp_min(0.0)
        faster = (1.0 + (1.0 + 4.0 * pace * pace) ** 0.5) / 2.0
        y = new + (pace - 1.0) / faster * (new - x)
        x, pace = new, faster
    return x / size


def ridge(a: Tensor, b: Tensor, start: Tensor, *, damping: float) -> Tensor:
    """x [.., n, d] with least |a x - b|^2 + damping * mean |row of a|^2 * |x - start|^2.

    a [.., m, n], b [.., m, d]. Solved in the m dims of the equations, so more unknowns than
    equations are no trouble.
    """
    gram = a @ a.mT
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(TINY)
    eye = torch.eye(a.shape[-2], device=a.device, dtype=a.dtype)
    return start + a.mT @ torch.linalg.solve(gram + damping * size * eye, b - a @ start)
