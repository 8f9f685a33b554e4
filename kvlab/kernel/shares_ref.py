"""How much attention each token gets from the last queries; the ground truth of `shares_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernel.attend_ref import visible


def token_shares(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """Share of attention of each key, the mean over queries and heads that read it, fp32 [H, n].

    q [Hq, T, D] are the last T of the tokens whose keys are k [n, H, D]; each sees those up to its
    own. lse fp32 [Hq, T] is over everything that they saw, which may be more.
    """
    heads, tokens, dim = q.shape
    n, kv_heads = k.shape[:2]
    grouped = q.float().reshape(kv_heads, heads // kv_heads, tokens, dim)
    x = torch.einsum("hgtd,nhd->hgtn", grouped, k.float()) * scale
    x = x - lse.reshape(kv_heads, -1, tokens, 1)
    seen = visible(tokens, n, n - tokens, 0, True, None, k.device)
    return x.masked_fill(~seen, -torch.inf).exp().mean((1, 2))
