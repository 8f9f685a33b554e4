"""How much attention each token gets from the last queries; the ground truth of `shares_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernel.attend_ref import visible

ROWS = 256  # queries whose logits are made at a time


def token_shares(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """Share of attention of each key, the mean over queries and heads that read it, fp32 [H, n].

    q [Hq, T, D] are the last T of the tokens whose keys are k [n, H, D]; each sees those up to its
    own. lse fp32 [Hq, T] is over everything that they saw, which may be more. Several layers at
    once with a further dim in front of all of them, and of the result.
    """
    if q.dim() == 4:
        each = (token_shares(*layer, scale=scale) for layer in zip(q, k, lse))
        return torch.stack(list(each))
    heads, tokens, dim = q.shape
    n, kv_heads = k.shape[:2]
    grouped = q.float().reshape(kv_heads, heads // kv_heads, tokens, dim)
    whole, keys = lse.reshape(kv_heads, -1, tokens, 1), k.float()
    total = keys.new_zeros(kv_heads, n)
    for start in range(0, tokens, ROWS):
        mine = slice(start, start + ROWS)
        x = torch.einsum("hgtd,nhd->hgtn", grouped[:, :, mine], keys) * scale - whole[:, :, mine]
        seen = visible(x.shape[2], n, n - tokens + start, 0, True, None, k.device)
        total += x.masked_fill_(~seen, -torch.inf).exp_().sum((1, 2))
    return total / (tokens * (heads // kv_heads))
