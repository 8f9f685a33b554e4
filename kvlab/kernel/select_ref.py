"""Which blocks a decoded token reads: scores of block digests and the choice, in plain torch.

A digest stands for a block's keys, [H, C, D] per block: C = 1 is one key (the score is its product
with the query), C = 2 are the channel-wise maximum and minimum (the score is an upper bound of the
query's product with any key of the block, Quest, https://arxiv.org/abs/2406.10774).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HOLE = -1  # in `where`: an evicted block; ids are device blocks, -2 - key are blocks on the host


class Chosen(NamedTuple):
    """Block tables per key/value head, in logical order: int32 [B, H, keep], and their lengths.

    Entries beyond a length are 0.
    """

    device: Tensor
    n_device: Tensor  # int32 [B, H]
    host: Tensor
    n_host: Tensor


def rows_of(digests, rows: Tensor) -> Tensor:
    """Digests [n, H, C, D] of the store's `rows` [n]; `digests`: `LayerPlanes` with one plane."""
    view, per_slab = digests.planes["digest"], digests.slab_blocks
    size = per_slab * view.block_stride_bytes
    parts = [torch.zeros(0, *view.shape, dtype=view.dtype, device=rows.device)]
    slabs, runs = torch.unique_consecutive(rows // per_slab, return_counts=True)
    for slab, local in zip(slabs.tolist(), (rows % per_slab).split(runs.tolist())):
        raw = digests.slabs[slab][view.offset_bytes : view.offset_bytes + size]
        parts.append(raw.view(view.dtype).view(per_slab, *view.shape)[local.long()])
    return torch.cat(parts)


def bound(q: Tensor, digests: Tensor, group: str) -> Tensor:
    """Scores fp32 [H, n] of `q` [Hq, D] against `digests` [n, H, C, D]; see the module.

    group: `max` or `sum` over the query heads that share a key/value head.
    """
    heads, kv_heads = q.shape[0], digests.shape[1]
    grouped = q.float().reshape(kv_heads, heads // kv_heads, -1)
    if digests.shape[2] == 2:
        grouped = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], -1)
    flat = digests.float().flatten(2)
    each = torch.einsum("hge,nhe->hgn", grouped, flat)
    return each.amax(1) if group == "max" else each.sum(1)


def score(
    q: Tensor, digests, rows: Tensor, counts: Tensor, *, group: str = "max"
) -> Tensor:
    """Scores fp32 [B, H, N] of each sequence's blocks for one query token per row.

    q: [B, Hq, D]; digests: `LayerPlanes` of this layer with one plane `digest`; rows: int32 [B, N],
    the digest row of each block in logical order, -1 for a hole, the first counts[b] of row b in
    use. group: see `bound`. -inf for holes and beyond a count.
    """
    kv_heads = digests.planes["digest"].shape[0]
    out = torch.full((len(q), kv_heads, rows.shape[1]), -torch.inf, device=q.device)
    for b, count in enumerate(counts.tolist()):
        there = (rows[b, :count] >= 0).nonzero()[:, 0]
        out[b][:, there] = bound(q[b], rows_of(digests, rows[b, there]), group)
    return out


def choose(
    scores: Tensor, where: Tensor, counts: Tensor, *, keep: int, first: int = 0, last: int = 0,
    hits: Tensor | None = None,
) -> Chosen:
    """The `keep` best blocks of each head, among them always the first and last ones.

    scores: fp32 [B, H, N]; where: int32 [B, N], see `HOLE`; holes are never chosen. The first
    `first` and the last `last` of the counts[b] blocks of row b are taken before all others. Of
    equal scores the earlier block wins. hits: int32 [B, N], counts up the heads that chose a block.
    """
    rows, heads, n = scores.shape
    index = torch.arange(n, device=scores.device)
    inside = index[None] < counts[:, None]
    there = inside & (where != HOLE)
    always = (index[None] < first) | (index[None] >= counts[:, None] - last)
    scores = scores.masked_fill(always[:, None], torch.inf)
    scores = scores.masked_fill(~there[:, None], -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)  # stable: ties end at the index
    taken = torch.zeros(rows, heads, n, dtype=torch.bool, device=scores.device)
    taken.scatter_(-1, order[..., :keep], True)
    taken &= there[:, None]
    if hits is not None:
        hits += taken.sum(1, dtype=torch.int32)
    device = compact(taken & (where >= 0)[:, None], where, keep)
    host = compact(taken & (where < HOLE)[:, None], -2 - where, keep)
    return Chosen(*device, *host)


def compact(taken: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The values [B, N] that `taken` [B, H, N] marks, in order: [B, H, width], and how many."""
    rows, heads, _ = taken.shape
    out = torch.zeros(rows, heads, width + 1, dtype=torch.int32, device=taken.device)
    at = torch.where(taken, taken.cumsum(-1) - 1, width)  # what is not taken lands behind the end
    out.scatter_(-1, at, values[:, None].expand(taken.shape).to(torch.int32))
    return out[..., :width].contiguous(), taken.sum(-1, dtype=torch.int32)
