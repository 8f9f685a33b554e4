"""What is not sealed: the open tail of each sequence, and the tokens of the step itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlab.pool import BlockPool
from kvlab.source.base import Ask, Part, Read, Source, Token
from kvlab.source.step import Extent
from kvlab.source.tables import DecodeTables


class Tail(Source):
    """Tokens in the compute dtype: of each sequence one open block between steps, at most, and the
    newest whole ones where the format has a residual. Policies do not hear of these."""

    obstacle = ""

    def __init__(self, pool: BlockPool):
        self.pool = pool

    @property
    def nbytes(self) -> int:
        """Of all open places, those of origins included."""
        return self.pool.open.nbytes

    def parts(self, ask: Ask) -> Iterator[Part]:
        e, own = ask.extent, (ask.k, ask.v)
        single = e.single and ask.before is None
        tail = self.before(ask.layer, e)
        start = e.past - (len(tail[0]) if tail else 0)
        if tail:
            if single:  # one query sees tail and itself: one part instead of two
                own = tuple(map(torch.cat, zip(tail, own)))
            else:
                yield Part(*tail, start)
        if ask.before is not None:
            reach = torch.arange(len(ask.k), device=ask.q.device)
            yield Part(*own, seen=reach < ask.before[:, None])
        else:
            yield Part(*own, start if single else e.past, causal=not single)

    def decode(self, ask: Token) -> list[Read]:
        """The kernel that reads sealed blocks reads the open one, too."""
        return []

    def append(self, layer: int, k: Tensor, v: Tensor, tables: DecodeTables) -> None:
        """Store one token of every row, k and v [B, H, D]."""
        pool = self.pool
        pool.fused.append(k, v, pool.open.layer(layer), tables.open_slot, tables.open_len)

    def before(self, layer: int, e: Extent) -> tuple[Tensor, ...]:
        """What is there before the step, [n, H, D] twice; () where nothing is."""
        parts = [self.pool.read_open(layer, place, self.pool.block_size) for place in e.recent]
        if e.fill:
            parts.append(self.pool.read_open(layer, e.tail, e.fill))
        return tuple(map(torch.cat, zip(*parts))) if len(parts) > 1 else (parts or [()])[0]

    def joined(self, layer: int, e: Extent, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The open tail and the step's tokens behind it, [fill + T, H, D]."""
        if not e.fill:
            return k, v
        return tuple(map(torch.cat, zip(self.pool.read_open(layer, e.tail, e.fill), (k, v))))
