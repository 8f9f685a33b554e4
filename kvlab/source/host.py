"""Blocks that left for host memory, and how a step reads them there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlab.blocks import Holes
from kvlab.core import BlockId, SeqId
from kvlab.offload import NoShelf
from kvlab.pool import BlockPool, away
from kvlab.source.base import Ask, Part, Read, Source, Token
from kvlab.source.entries import Summaries
from kvlab.source.host_tables import HostTables, held
from kvlab.source.sealed import Sealed
from kvlab.source.step import Extent, Piece
from kvlab.source.tables import DecodeTables, wide_enough


class Host(Source):
    """What its `tables` say lies in host memory; without offload that is nothing, ever.

    summaries: what else may stand for blocks that leave.
    """

    obstacle = ""

    def __init__(self, shelf: NoShelf, pool: BlockPool, sealed: Sealed, summaries: Summaries):
        self.shelf, self.pool, self.size = shelf, pool, pool.geometry.block_size
        self.sealed, self.summaries = sealed, summaries
        self.tables = HostTables(shelf, self.size)
        self.decoding: DecodeTables | None = None  # the rows of the step, of all those below
        self._tables: DecodeTables | None = None
        self._no_tail: Tensor | None = None

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        self.tables.open(seq)

    def close(self, seq: SeqId) -> None:
        self.tables.close(seq)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        self.tables.fork(parent, child)

    def crop(self, seq: SeqId, length: int) -> None:
        self.tables.crop(seq, length)

    def leave(self, blocks: list[BlockId], holes: Holes, tables: dict) -> list[int]:
        """Copies of blocks for the caller, a key for each, if host memory takes any; where `tables`
        are about to lose them, what a summary makes of them and a key of the sequence's own stay.
        """
        keys = dict(zip(blocks, self.shelf.spill(blocks)))
        for seq, indices in holes:
            lost = [tables[seq].ids[index] for index in indices]
            self.summaries.spill(seq, indices, lost)
            for index, block in zip(indices, lost) if keys else ():
                self.tables.note(seq, index, keys[block])
        return list(keys.values())

    # ---- a chunk

    def parts(self, ask: Ask) -> Iterator[Part]:
        """While one piece is attended to, the next is copied; after the last one, with no other
        sequence in between, the first of the next layer."""
        layer, e = ask.layer, ask.extent
        pieces = self.pieces(e, ask.window)
        for number, piece in enumerate(pieces):
            pair = self.shelf.read(layer, piece.blocks)
            if number + 1 < len(pieces):
                self.shelf.prefetch(layer, pieces[number + 1].blocks)
            elif e.alone and ask.before is None and layer + 1 < self.pool.geometry.layers:
                self.shelf.prefetch(layer + 1, pieces[0].blocks)
            yield Part(*pair, piece.start)

    def pieces(self, e: Extent, window: int | None) -> list[Piece]:
        """Bounded pieces of what lies in host memory.

        In the order of the keys, not of the tokens, where positions do not matter: whatever order
        the policy chose to evict in, neighbours there are copied together.
        """
        if window not in e.away:
            table, many = self.tables.of[e.seq], self.sealed.segment_blocks
            keys = sorted(held(table))
            e.away[window] = (
                [Piece(0, keys[i : i + many]) for i in range(0, len(keys), many)] if window is None
                else [Piece(*found) for found in self.sealed.split(e, table, window)]
            )
        return e.away[window]

    # ---- one token in every row

    def __getstate__(self) -> dict:
        """A copy reads a shelf of its own."""
        return vars(self) | {"decoding": None, "_tables": None}

    def widen(self, rows: int, blocks: int) -> None:
        tables = wide_enough(self._tables, rows, blocks, self.pool.device)
        if tables is not self._tables:
            self._tables = tables
            self._no_tail = torch.zeros(len(tables.table), dtype=torch.int32,
                                        device=self.pool.device)  # fmt: skip

    def prepare(self, extents: list[Extent], rows: int) -> None:
        tables, rows_of = self.tables.of, self.pool.apart.rows
        self.widen(rows, max((len(tables[e.seq]) for e in extents), default=0))
        self.decoding = self._tables.of(rows)
        self._tables.refresh(
            extents, tables, [[0]] * len(extents), lambda key: rows_of.get(away(key))
        )

    def in_place(self) -> list:
        return [self.decoding]

    def decode(self, ask: Token) -> list[Read]:
        return [self.decode_over(ask, self.decoding.table, self.decoding.n_blocks)]

    def decode_over(self, ask: Token, table: Tensor, n_blocks: Tensor) -> Read:
        """Over the keys of `table`, see `paged_decode`, read in place over the bus."""
        pool, t = self.pool, self.decoding
        return Read(*pool.fused.paged_decode(
            ask.q, self.shelf.planes(ask.layer), pool.format, table, n_blocks,
            pool.open.layer(ask.layer), t.open_slot, self._no_tail[: len(t.table)],
            scale=ask.scale,
            scratch=pool.workspace.scratch,
            apart=pool.apart.first(ask.layer, t.first_row, t.first),
        ))

    # ---- accounts

    @property
    def host_nbytes(self) -> int:
        return self.shelf.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Tables of keys and of slab addresses."""
        return self.shelf.device_nbytes + (0 if self._tables is None else self._tables.nbytes)
