"""Block tables on the device, for decode steps: written in place, so captured graphs stay valid."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np
import torch

from kvlab.blocks import BlockTable
from kvlab.core import BlockId
from kvlab.source.step import Extent


class DecodeTables:
    """What the decode kernel reads of a batch of `rows` sequences of one layer group.

    table      int32 [B, max_blocks], sealed blocks without holes; the first n_blocks[b] count
    n_blocks   int32 [B]
    open_slot  int32 [B], row of the open store that takes this step's token; [B, n] where several
               rows are read, of which the tokens lie one behind the other
    open_len   int32 [B], tokens there before the step; open_now: with this step's token
    first      int32 [B], the id that has first tokens apart, -1: none; first_row: their row
    blocks     the same ids on the host, a list for each row

    `refresh` overwrites them between steps. A row grown too long makes new tensors (`max_blocks`
    tells): whoever captured the old ones captures again. A step may have fewer sequences than rows:
    the rows behind them hold nothing, 0 blocks and 0 tokens, and the kernels write nothing there.
    """

    def __init__(self, rows: int, max_blocks: int, device, open_blocks: int = 1):
        self.device = torch.device(device)
        with torch.inference_mode(False):  # else nobody may write to them outside of that mode
            self.table = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
            self._numbers = torch.zeros((5 + open_blocks) * rows, dtype=torch.int32, device=device)
        each, self._opened = self._numbers[: 5 * rows].view(5, rows), open_blocks
        self.n_blocks, self.first, self.first_row, self.open_len, self.open_now = each
        slots = self._numbers[5 * rows :]
        self.open_slot = slots if open_blocks == 1 else slots.view(rows, open_blocks)
        self.blocks: list[list[BlockId]] = [[] for _ in range(rows)]
        self._seen: list[tuple | None] = [None] * rows
        self._firsts: dict[int, DecodeTables] = {}

    def of(self, rows: int) -> DecodeTables:
        """The first `rows` rows, the same object each time: what a step of so many rows reads."""
        if rows == len(self.table):
            return self
        if rows not in self._firsts:
            self._firsts[rows] = view = copy(self)
            view.table = self.table[:rows]
            for name in ("n_blocks", "open_slot", "open_len", "open_now", "first", "first_row"):
                setattr(view, name, getattr(self, name)[:rows])
        return self._firsts[rows]

    @property
    def max_blocks(self) -> int:
        return self.table.shape[1]

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self._numbers.nbytes

    def fits(self, rows: int, max_blocks: int) -> bool:
        return rows <= self.table.shape[0] and max_blocks <= self.table.shape[1]

    def refresh(
        self, extents: list[Extent], tables: dict[int, BlockTable], open_rows: list[list[int]],
        first_row: Callable[[int], int | None],
    ) -> None:
        """Take over the state before a step of one token per row; uploads what has changed.

        open_rows: of each sequence, those with tokens, in order, the last takes this step's.
        first_row: of an id, where its first tokens are kept apart, if they are.
        """
        for row, e in enumerate(extents):
            table = tables[e.seq]
            state = (e.seq, table.changes)
            if self._seen[row] != state:
                self._rewrite(row, table, e.stored_blocks(table.block_size))
                self._seen[row] = state
        count = len(extents)
        for row in range(count, len(self._seen)):
            self.blocks[row], self._seen[row] = [], None
        numbers = np.zeros(self._numbers.shape, dtype=np.int32)
        each, slots = np.split(numbers, [5 * len(self._seen)])
        each, slots = each.reshape(5, -1), slots.reshape(-1, self._opened)
        each[1] = -1
        opened = [e.fill + len(e.recent) * tables[e.seq].block_size for e in extents]
        each[:, :count] = (
            [len(b) for b in self.blocks[:count]], *self._first(extents, tables, first_row),
            opened, [n + 1 for n in opened],
        )
        for row, places in enumerate(open_rows):
            slots[row, : len(places)] = places
        upload(numbers, self._numbers)

    @staticmethod
    def _first(extents, tables, row_of) -> tuple[list[int], list[int]]:
        """Ids and rows of first tokens: of the block that begins a sequence, if it is sealed."""
        ids = [next(iter(tables[e.seq].ids), None) for e in extents]
        rows = [None if id is None else row_of(id) for id in ids]
        return ([-1 if row is None else id for id, row in zip(ids, rows)],
                [row or 0 for row in rows])

    def _rewrite(self, row: int, table: BlockTable, whole: int) -> None:
        held = [b for b in table.ids[:whole] if b is not None]
        known = self.blocks[row]
        same = len(known) if held[: len(known)] == known else 0  # mostly, one block is added
        if len(held) > same:
            new = np.array(held[same:], dtype=np.int32)
            upload(new, self.table[row, same : len(held)])
        self.blocks[row] = held


def wide_enough(
    tables: DecodeTables | None, rows: int, blocks: int, device, open_blocks: int = 1
) -> DecodeTables:
    """`tables`, or larger ones where they have not so many rows and columns."""
    if tables is not None and tables.fits(rows, blocks):
        return tables
    held = (0, 0) if tables is None else tables.table.shape
    return DecodeTables(max(rows, held[0]), max(room_for(blocks), held[1]), device,
                        open_blocks)


def upload(host: np.ndarray, device: torch.Tensor) -> None:
    """Without waiting: pageable memory is staged before the call returns, so it may be reused."""
    device.copy_(torch.from_numpy(host), non_blocking=True)


def sent(host: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting whatever the size: large pageable memory would be waited for.
    """
    x = torch.from_numpy(host)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def room_for(blocks: int) -> int:
    """Columns for a table of so many blocks, with room to grow before it must be made anew."""
    return max(64, 1 << (blocks + blocks // 8).bit_length())
