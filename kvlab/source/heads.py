"""Sealed blocks where heads hold unlike numbers of them: each head is read as a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvlab.pool import HeadPool
from kvlab.source.base import Ask, Part, Read, Token
from kvlab.source.sealed import Sealed
from kvlab.source.tables import DecodeTables, room_for, upload

NOTHING = -1000.0  # bias of a key that a head does not have: its weight is 0 in fp32


class HeadTables(DecodeTables):
    """What the decode kernel reads of a batch, each key/value head a row of its own.

    table      int32 [L, B * H, max_blocks], rows of the pool; the first n_blocks[l, line] count
    n_blocks   int32 [L, B * H]
    open_slot  int32 [B * H], see `HeadPool.open_by_head`; open_len, open_now likewise
    """

    def __init__(self, rows: int, max_blocks: int, pool: HeadPool):
        super().__init__(rows * pool.places[1], 1, pool.device)
        layers, heads = pool.places
        self.pool, self.heads = pool, heads
        with torch.inference_mode(False):
            size = layers, rows * heads, max_blocks
            self.table = torch.zeros(size, dtype=torch.int32, device=pool.device)
            self.n_blocks = torch.zeros(size[:2], dtype=torch.int32, device=pool.device)
        self._seen = [None] * rows

    @property
    def max_blocks(self):
        return self.table.shape[2]

    @property
    def nbytes(self):
        return super().nbytes + self.n_blocks.nbytes

    def of(self, rows):
        return self

    def fits(self, rows, max_blocks):
        return len(self._seen) == rows and max_blocks <= self.max_blocks

    def _rewrite(self, row, table, whole):
        rows = self.pool.rows(table.ids[:whole])  # [n, L, H]
        there = rows >= 0
        mine = slice(row * self.heads, (row + 1) * self.heads)
        upload(there.sum(0).astype(np.int32), self.n_blocks[:, mine])
        first = np.take_along_axis(rows, (~there).argsort(0, kind="stable"), 0)
        if len(first):
            held = np.ascontiguousarray(first.transpose(1, 2, 0).astype(np.int32))
            upload(held, self.table[:, mine, : len(first)])

    def refresh(self, extents, tables, open_rows, first_row=None):
        for row, e in enumerate(extents):
            table = tables[e.seq]
            if self._seen[row] != (e.seq, table.changes):
                self._rewrite(row, table, e.stored_blocks(table.block_size))
                self._seen[row] = e.seq, table.changes
        slots = [r * self.heads + h for r in open_rows for h in range(self.heads)]
        fills = [e.fill for e in extents for _ in range(self.heads)]
        numbers = [fills, [n + 1 for n in fills], slots]
        upload(np.array(numbers, dtype=np.int32), self._numbers.view(6, -1)[3:])


class HeadSealed(Sealed):
    """`Sealed` over a `HeadPool`."""

    pool: HeadPool

    def parts(self, ask: Ask) -> Iterator[Part]:
        for piece in self.pieces(ask.extent, ask.window):
            rows = self.pool.rows(piece.blocks)[:, ask.layer]
            blocks = [b for b, row in zip(piece.blocks, rows) if (row >= 0).any()]
            if not blocks:
                continue
            there = self.pool.present(ask.layer, blocks)
            bias = None if there is None else (~there).float() * NOTHING
            yield Part(*self.pool.read(ask.layer, blocks), piece.start, bias=bias, blocks=blocks)

    def widen(self, rows, blocks):
        """Tables are made for the very rows of a step."""

    def prepare(self, extents, rows):
        longest = max((e.past // self.block_size for e in extents), default=0)
        if self.decoding is None or not self.decoding.fits(rows, longest):
            self.decoding = HeadTables(rows, room_for(longest), self.pool)
        open_rows = [self.pool.open_row(e.writing) for e in extents]
        self.decoding.refresh(extents, self.tables, open_rows)

    @property
    def workspace_nbytes(self):
        return 0 if self.decoding is None else self.decoding.nbytes

    def decode(self, ask: Token) -> list[Read]:
        pool, t, layer = self.pool, ask.tables, ask.layer
        rows, heads, dim = ask.q.shape
        lines = rows * t.heads
        new = ask.new and tuple(x.reshape(lines, 1, dim) for x in ask.new)
        out, lse = pool.fused.paged_decode(
            ask.q.reshape(lines, -1, dim), pool.sealed.layer(0), pool.format, t.table[layer],
            t.n_blocks[layer], pool.open_by_head(layer), t.open_slot, t.open_now, scale=ask.scale,
            scratch=pool.workspace.scratch, new=new,
        )
        return [Read(out.view(rows, heads, dim), lse.view(rows, heads))]

    def reads(self, table):
        sealed, fill = divmod(table.length, self.block_size)
        held = self.pool.held(table.ids[:sealed]).sum() / self.pool.count
        return round(held * self.block_size) + fill
