"""Attention over one segment of the past, and the exact merge of segments, in plain torch.

Each segment gives a partial output and the natural log of its sum of exponentials (lse); two
disjoint segments merge exactly (online softmax, https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import first_seen

Partial = tuple[Tensor, Tensor]  # out fp32 [Hq, T, Dv], lse fp32 [Hq, T]


def visible(
    queries: int, keys: int, q_start: int, k_start: int, causal: bool, window: int | None, device
) -> Tensor:
    """Bool [T, n]: which key each query may see, from the positions of both."""
    q = torch.arange(q_start, q_start + queries, device=device)[:, None]
    k = torch.arange(k_start, k_start + keys, device=device)[None, :]
    seen = k <= q if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen if window is None else seen & (k >= first_seen(q, window))


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False,
    window: int | None = None, q_start: int = 0, k_start: int = 0, bias: Tensor | None = None,
    seen: Tensor | None = None, softcap: float | None = None,
) -> Partial:
    """Softmax attention of `q` [Hq, T, Dk] over `k` [n, H, Dk], `v` [n, H, Dv], in fp32.

    causal: key position <= query position; window: key position >= `first_seen`, both
    counted from `q_start` and `k_start`. bias: fp32 [n, H], natural log, added to the logits of
    each key: how many tokens it stands for. softcap: logits x become softcap * tanh(x / softcap)
    before any bias (Gemma 2, https://arxiv.org/abs/2408.00118). seen: bool [T, n] in the place of
    the other rules. A query that sees no key gets zeros and lse = -inf.
    """
    heads, (n, kv_heads, dim) = q.shape[0], k.shape
    grouped = q.float().reshape(kv_heads, heads // kv_heads, -1, dim)
    logits = torch.einsum("hgtd,nhd->hgtn", grouped, k.float()) * scale
    logits = capped(logits, softcap)
    if bias is not None:
        logits = logits + bias.float().T[:, None, None]
    if seen is None and (causal or window is not None):
        seen = visible(q.shape[1], n, q_start, k_start, causal, window, q.device)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.nan_to_num(neginf=0.0)[..., None])
    out = torch.einsum("hgtn,nhd->hgtd", weights, v.float())
    return out.flatten(0, 1), lse.flatten(0, 1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits softly capped at `softcap`; None leaves them as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def with_sinks(part: Partial, sinks: Tensor | None) -> Partial:
    """`part`, out [..., Hq, T, D] and lse [..., Hq, T], merged with a sink for each query head.

    sinks: logits [Hq] that take weight from every query and give nothing (gpt-oss,
    https://arxiv.org/abs/2508.10925): a part of output zero. None: there are none.
    """
    if sinks is None:
        return part
    out, lse = part
    logits = sinks.float()[:, None]
    return out * torch.sigmoid(lse - logits)[..., None].to(out.dtype), torch.logaddexp(lse, logits)


def block_lse(q: Tensor, k: Tensor, *, scale: float, block_size: int) -> Tensor:
    """lse of `q` [Hq, T, D] over each block of `k` [N*S, H, D] alone: fp32 [Hq, T, N].

    exp(block lse - lse of everything) is the block's share of the attention; no policy needs the
    attention matrix itself.
    """
    heads, (n, kv_heads, dim) = q.shape[0], k.shape
    grouped = q.float().reshape(kv_heads, heads // kv_heads, -1, dim)
    logits = torch.einsum("hgtd,nhd->hgtn", grouped, k.float()) * scale
    return logits.unflatten(-1, (n // block_size, block_size)).logsumexp(-1).flatten(0, 1)


def merge(parts: list[Partial]) -> Partial:
    """Partial results over disjoint keys -> the result over all of them."""
    if len(parts) == 1:
        return parts[0][0].float(), parts[0][1]
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    weights = torch.exp(lses - total.nan_to_num(neginf=0.0))
    return sum(o.float() * w[..., None] for (o, _), w in zip(parts, weights)), total
