"""Which tokens become one entry: groups of each KV head, int64 [H, n] with values below `count`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kvlab.summary.base import Entries, Queries, products

VALUE_WEIGHT = 1.0  # of the distance between values, beside the one between logits


def contiguous(past: Entries, count: int) -> Tensor:
    """Runs of neighbours, as even as possible."""
    n, heads = past.bias.shape
    return ((torch.arange(n, device=past.k.device) * count) // n).expand(heads, n)


def alike(past: Entries, count: int, queries: Queries, weights: Tensor, steps: int) -> Tensor:
    """Weighted k-means over what `queries` can tell apart, from even runs on.

    Two tokens are as far apart as the logits that the queries give them; their values count as
    much, scaled to the same spread. weights: [H, n]; steps: of Lloyd's iteration.
    """
    x = products(queries.q, past.k).mT
    v = past.v.transpose(0, 1)
    spread = x.std() * (x.shape[-1] / v.shape[-1]) ** 0.5 / v.std().clamp_min(1e-6)
    spread = spread.nan_to_num(0.0)  # of values so large that their spread is not a number
    return kmeans(torch.cat([x, v * (VALUE_WEIGHT * spread)], -1), contiguous(past, count),
                  count, weights, steps)


def kmeans(x: Tensor, groups: Tensor, count: int, weights: Tensor, steps: int) -> Tensor:
    """Lloyd's iteration on x [H, n, F] from `groups` [H, n]; a group may end up empty."""
    centers = x.new_zeros(x.shape[0], count, x.shape[2])
    for _ in range(steps):
        member = one_hot(groups, count).float() * weights[..., None]
        total = member.sum(1)[..., None]
        centers = torch.where(total > 0, member.mT @ x / total.clamp_min(1e-30), centers)
        groups = torch.cdist(x, centers).argmin(-1)
    return groups
