"""Attention over the past as a stream of pieces, each with its log-sum-exp, merged exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.cache.away import Away, held
from kvlab.cache.step import Extent, Piece
from kvlab.cache.sum import Sum
from kvlab.cache.watch import Watch
from kvlab.kernel import attend_sdpa
from kvlab.pool import BlockPool
from kvlab.window import NoWindow


class Past:
    """How the sealed past of one layer group is read.

    segment_blocks: blocks dequantized at a time; inv_freq: the model's rotary frequencies [D / 2],
    for windows that rotate keys to new positions.
    """

    def __init__(
        self, pool: BlockPool, window: NoWindow, watch: Watch, segment_blocks: int,
        inv_freq: Tensor | None, away: Away,
    ):
        self.pool, self.window, self.watch, self.away = pool, window, watch, away
        self.segment_blocks, self.inv_freq = segment_blocks, inv_freq
        self.block_size = pool.geometry.block_size

    def attend(
        self, layer: int, e: Extent, table: BlockTable, q: Tensor, scale: float,
        window: int | None, total: Sum,
    ) -> None:
        """Add the attention of q [Hq, T, D] over all sealed blocks of `table` to `total`."""
        self._attend_away(layer, e, q, scale, window, total)
        for piece in self.pieces(e, table, window):
            keys, values = self.pool.read(layer, piece.blocks, piece.ids)
            turned = self.turned(q, piece)
            self.watch.segment(piece.blocks, turned, keys, values, scale)
            total.add(attend_sdpa.attend_parts(
                turned, keys, values, scale=scale, window=window, q_start=e.past,
                k_start=piece.start,
            ))

    def _attend_away(
        self, layer: int, e: Extent, q: Tensor, scale: float, window: int | None, total: Sum
    ) -> None:
        """The same over host memory: while one piece is attended to, the next is copied."""
        pieces, shelf = self.pieces_away(e, window), self.away.shelf
        for number, piece in enumerate(pieces):
            keys, values = shelf.read(layer, piece.blocks)
            if number + 1 < len(pieces):
                shelf.prefetch(layer, pieces[number + 1].blocks)
            elif e.alone and layer + 1 < self.pool.geometry.layers:
                shelf.prefetch(layer + 1, pieces[0].blocks)
            total.add(attend_sdpa.attend_parts(
                q, keys, values, scale=scale, window=window, q_start=e.past, k_start=piece.start
            ))

    def pieces_away(self, e: Extent, window: int | None) -> list[Piece]:
        """Bounded pieces of what lies in host memory.

        In the order of the keys, not of the tokens, where positions do not matter: whatever order
        the policy chose to evict in, neighbours there are copied together.
        """
        if window not in e.away:
            table, many = self.away.tables[e.seq], self.segment_blocks
            keys = sorted(held(table))
            e.away[window] = (
                [Piece(0, keys[i : i + many]) for i in range(0, len(keys), many)]
                if window is None else [Piece(*found) for found in self._split(e, table, window)]
            )
        return e.away[window]

    def pieces(self, e: Extent, table: BlockTable, window: int | None = None) -> list[Piece]:
        """Bounded pieces of the readable past; the same objects for every layer of a step.

        Positions matter under the model's own sliding window and where keys are rotated anew;
        there a piece also ends at a hole.
        """
        if window not in e.pieces:
            e.pieces[window] = [
                Piece(*found, self.pool.ids(found[1])) for found in self._split(e, table, window)
            ]
        return e.pieces[window]

    def _split(self, e: Extent, table: BlockTable, window: int | None):
        size, horizon = self.block_size, 0 if window is None else e.past - window + 1
        exact = window is not None or self.window.rerotate
        whole = table.ids[: e.past // size]
        pieces: list[tuple[int, list[int], int]] = []
        previous, missing = None, whole.count(None)
        for index, block in enumerate(whole):
            if block is None:
                missing -= 1
                continue
            if (index + 1) * size <= horizon:
                continue
            gap = exact and previous != index - 1
            if not pieces or gap or len(pieces[-1][1]) == self.segment_blocks:
                pieces.append((index * size, [], missing * size))
            pieces[-1][1].append(block)
            previous = index
        return pieces

    def turned(self, q: Tensor, piece: Piece) -> Tensor:
        """Queries as they meet a piece: moved back over the gap where the window closes it.

        Rotating a query by -gap is rotating the keys by +gap, without touching a sealed block.
        """
        if not (self.window.rerotate and piece.gap):
            return q
        angle = piece.gap * self.inv_freq.to(q.device, torch.float32)
        cos, sin = angle.cos(), angle.sin()
        first, second = q.float().chunk(2, -1)
        turned = torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
        return turned.to(q.dtype)
