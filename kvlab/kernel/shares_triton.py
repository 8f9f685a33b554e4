"""How much attention each token gets from the last queries; same name and signature as its
reference in `shares_ref`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel.sides import next_power


@triton.jit
def shares_kernel(
    q, k, lse, out, n, T, scale, q_layer, q_head, q_token, k_layer, k_token, k_head, lse_layer,
    lse_head,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program for KEYS keys of one key/value head of a layer: all queries of all heads that
    read it."""
    head, j = tl.program_id(1), tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    layer = tl.program_id(2).to(tl.int64)
    q, k, lse = q + layer * q_layer, k + layer * k_layer, lse + layer * lse_layer
    out += (layer * tl.num_programs(1)) * n
    d, i = tl.arange(0, DP), tl.arange(0, ROWS)
    at = j.to(tl.int64)[:, None] * k_token + head * k_head + d[None, :]
    keys = tl.load(k + at, mask=(j < n)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.zeros([KEYS], tl.float32)
    for g in range(GROUP):
        row = head * GROUP + g
        for start in range(0, T, ROWS):
            t = start + i
            there = (t < T)[:, None] & (d < D)[None, :]
            at_q = row * q_head + t[:, None] * q_token + d[None, :]
            queries = tl.load(q + at_q, mask=there, other=0.0)
            x = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            whole = tl.load(lse + row * lse_head + t, mask=t < T, other=float("inf"))
            seen = (j[None, :] <= (n - T + t)[:, None]) & (t < T)[:, None]
            total += tl.sum(tl.where(seen, tl.exp(x - whole[:, None]), 0.0), 0)
    tl.store(out + head * n + j, total / (T * GROUP), mask=j < n)


def token_shares(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """See `shares_ref.token_shares`; the last dims of q and k are contiguous."""
    one = q.dim() == 3
    if one:
        q, k, lse = q[None], k[None], lse[None]
    (layers, heads, tokens, dim), (n, kv_heads) = q.shape, k.shape[1:3]
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    out = torch.empty(layers, kv_heads, n, dtype=torch.float32, device=k.device)
    rows, keys = min(64, max(16, next_power(tokens))), 64
    shares_kernel[(triton.cdiv(n, keys), kv_heads, layers)](
        q, k, lse, out, n, tokens, scale, *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2],
        GROUP=heads // kv_heads, D=dim, DP=max(16, next_power(dim)), ROWS=rows,
        KEYS=keys, num_warps=4,
    )
    return out[0] if one else out
