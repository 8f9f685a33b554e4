"""A look at the past that leaves no trace: queries of padding, whose tokens are not stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.cache.step import Extent
from kvlab.cache.sum import Sum
from kvlab.kernel import attend_ref, attend_sdpa


def look(
    group, layer: int, e: Extent, q: Tensor, k: Tensor, v: Tensor, before: Tensor, scale: float
) -> Tensor:
    """Attention of q [Hq, P, D] over all that sequence `e.seq` holds and the first `before[p]` of
    the step's tokens, k and v [n, H, D]: fp32 [Hq, P, D]. No policy hears of it.

    Asked before the step's tokens are stored. A query that sees nothing gets zeros.
    """
    total, past, table = Sum(None), group.past, group.tables[e.seq]
    span = {"scale": scale}
    for piece in past.pieces(e, table):
        keys, values = group.pool.read(layer, piece.blocks, piece.ids)
        total.add(attend_sdpa.attend(past.turned(q, piece), keys, values, **span))
    for piece in past.pieces_away(e, None):
        total.add(attend_sdpa.attend(q, *group.away.shelf.read(layer, piece.blocks), **span))
    group.summaries.attend(layer, e.seq, q, scale, None, total)
    if e.fill:
        total.add(attend_sdpa.attend(q, *group.pool.read_open(layer, e.tail, e.fill), **span))
    seen = torch.arange(len(k), device=q.device) < before[:, None]
    total.add(attend_ref.attend(q, k, v, seen=seen, **span))
    return total.result()[0]
