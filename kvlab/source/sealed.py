"""Sealed blocks on the device, read piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.core import SeqId, first_seen
from kvlab.pool import BlockPool
from kvlab.source.base import Ask, Part, Read, Source, Token
from kvlab.source.step import Extent, Piece
from kvlab.source.tables import DecodeTables, wide_enough
from kvlab.window import NoWindow


class Sealed(Source):
    """The sealed past of one layer group, as far as it is on the device.

    tables: which blocks, by sequence. segment_blocks: blocks dequantized at a time. inv_freq: the
    model's rotary frequencies [D / 2], for windows that rotate keys to new positions.
    """

    obstacle = ""

    def __init__(
        self, pool: BlockPool, tables: dict[SeqId, BlockTable], window: NoWindow,
        segment_blocks: int, inv_freq: Tensor | None = None,
    ):
        self.pool, self.tables, self.window = pool, tables, window
        self.segment_blocks, self.inv_freq = segment_blocks, inv_freq
        self.block_size = pool.geometry.block_size
        self.decoding: DecodeTables | None = None  # the rows of the step, of all those below
        self._tables: DecodeTables | None = None
        self.kernels: list[Callable] | None = None  # by layer: `paged_decode` over these tables
        self._bound: dict[int, list[Callable]] = {}  # the same by rows of a step

    def __getstate__(self) -> dict:
        """A copy reads a pool of its own."""
        return vars(self) | {"decoding": None, "_tables": None, "kernels": None, "_bound": {}}

    # ---- a chunk

    def parts(self, ask: Ask) -> Iterator[Part]:
        for piece in self.pieces(ask.extent, ask.window):
            pair = self.pool.read(ask.layer, piece.blocks, piece.ids)
            queries = self.turned(ask.q, piece)
            yield Part(*pair, piece.start, queries=queries, blocks=piece.blocks)

    def pieces(self, e: Extent, window: int | None = None) -> list[Piece]:
        """Bounded pieces of the readable past; the same objects for every layer of a step."""
        if window not in e.pieces:
            found = self.split(e, self.tables[e.seq], window)
            e.pieces[window] = [Piece(*piece, self.pool.ids(piece[1])) for piece in found]
        return e.pieces[window]

    def split(
        self, e: Extent, table: BlockTable, window: int | None
    ) -> list[tuple[int, list[int], int]]:
        """(position, ids, tokens missing behind it) of pieces of `table`.

        Positions matter under the model's own sliding window and where keys are rotated anew;
        there a piece also ends at a hole.
        """
        size, horizon = self.block_size, first_seen(e.past, window)
        exact = window is not None or self.window.rerotate
        whole = table.ids[: e.stored_blocks(size)]
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

    # ---- one token in every row

    def widen(self, rows: int, blocks: int) -> None:
        opened = 1 + self.pool.format.residual // self.block_size
        tables = wide_enough(self._tables, rows, blocks, self.pool.device, opened)
        if tables is not self._tables:
            self._tables, self._bound = tables, {}

    def prepare(self, extents: list[Extent], rows: int) -> None:
        self.widen(rows, max([e.past for e in extents], default=0) // self.block_size)
        self.decoding = t = self._tables.of(rows)
        if rows not in self._bound:
            self._bound[rows] = [self._kernel(layer, t.table, t.n_blocks)
                                 for layer in range(self.pool.geometry.layers)]
        self.kernels = self._bound[rows]
        self.pool.sealed.coming.settle()  # a step may be a graph, which waits for nothing
        open_rows = [[*map(self.pool.open_row, (*e.recent, e.writing))] for e in extents]
        self._tables.refresh(extents, self.tables, open_rows, self.pool.apart.rows.get)

    def in_place(self) -> list:
        return [self.decoding]

    def decode(self, ask: Token) -> list[Read]:
        mass = None if ask.watch is None else ask.watch.mass(ask.tables, ask.q.shape[1])
        kernel = self.kernels[ask.layer]
        return [Read(*kernel(ask.q, scale=ask.scale, mass=mass, new=ask.new), mass)]

    def decode_over(self, ask: Token, table: Tensor, n_blocks: Tensor) -> Read:
        """Over the blocks of another table, see `paged_decode`, and over the open tail."""
        kernel = self._kernel(ask.layer, table, n_blocks)
        return Read(*kernel(ask.q, scale=ask.scale, new=ask.new))

    def _kernel(self, layer: int, table: Tensor, n_blocks: Tensor) -> Callable:
        """`paged_decode` over all that stays in place: queries and scale are left to be given."""
        pool, t = self.pool, self.decoding
        return partial(
            pool.fused.paged_decode, sealed=pool.sealed.layer(layer), format=pool.format,
            table=table, n_blocks=n_blocks, open=pool.open.layer(layer), open_slot=t.open_slot,
            open_len=t.open_now, scratch=pool.workspace.scratch,
            apart=pool.apart.first(layer, t.first_row, t.first),
        )

    # ---- accounts

    @property
    def nbytes(self) -> int:
        return self.pool.sealed.nbytes + self.pool.apart.nbytes

    @property
    def workspace_nbytes(self) -> int:
        return 0 if self._tables is None else self._tables.nbytes

    def reads(self, table: BlockTable) -> int:
        """Tokens that a head reads here and in the open tail for the next token."""
        sealed, fill = divmod(table.length, self.block_size)
        held = sealed - table.ids[:sealed].count(None)
        return held * self.block_size + fill
