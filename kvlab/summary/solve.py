"""Least squares in batches: every leading dim is one problem, solved together with the others."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30


def largest(a: Tensor) -> Tensor:
    """The largest magnitude of each problem, [.., 1, 1]; 1 where all is 0.

    Both sides of a system are divided by it: squares of what is left neither overflow nor vanish.
    """
    size = a.abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, 1.0)


def nnls(a: Tensor, b: Tensor, start: Tensor, *, damping: float, steps: int) -> Tensor:
    """x >= 0 [.., n] with least |a x - b|^2 + damping * |s (x - start)|^2; a [.., m, n], b [.., m].

    s are the lengths of the columns of `a`, so `damping` has no unit. Projected gradient with
    Nesterov's acceleration (FISTA, https://doi.org/10.1137/080716542) in columns of unit length:
    matrix products only, where an active set would branch for every head.
    """
    whole = largest(a)
    a, b = a / whole, b / whole[..., 0]
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

    a [.., m, n], b [.., m, d]. Solved by Cholesky in the m dims of the equations, so more unknowns
    than equations are no trouble. Damping is at least what keeps the system above rounding; where
    it is not positive definite nevertheless (or not finite), x is NaN.
    """
    whole = largest(a)
    a, rest = a / whole, (b - a @ start) / whole
    gram = a @ a.mT
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(a.shape[-2], device=a.device, dtype=a.dtype)
    damping = max(damping, a.shape[-2] * torch.finfo(a.dtype).eps)
    system = gram + damping * torch.where(size > 0, size, 1.0) * eye
    factor, failed = torch.linalg.cholesky_ex(system)
    found = start + a.mT @ torch.cholesky_solve(rest, factor)
    return torch.where(failed[..., None, None] == 0, found, torch.nan)
