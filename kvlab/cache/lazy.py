"""How lazy a layer is: what it looks at beyond the window."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.cache.scores import OBSERVED_QUERIES, logits


def window_share(
    q: Tensor, k: Tensor, lse: Tensor, window, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention that the last 32 queries give the tokens that the `window` keeps, the mean over
    queries and heads, fp32 scalar (SimLayerKV, https://arxiv.org/abs/2410.13846).

    q [Hq, T, D] are the last T of the tokens whose keys are k [n, H, D]; lse [Hq, T] is over
    everything that they saw. Of each query its own window counts.
    """
    n, last = len(k), min(OBSERVED_QUERIES, q.shape[1])
    inside = torch.zeros(last, n, dtype=torch.bool)
    for row in range(last):
        for begin, end in window.protected(n - last + row + 1):
            inside[row, begin:end] = True
    x = logits(q, k, scale, inside.to(k.device), last, softcap) - lse[:, -last:, None]
    return x.exp().sum(-1).mean()
