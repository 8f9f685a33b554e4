"""Which blocks of each sequence lie in host memory, and how a step reads them there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.cache.step import Extent
from kvlab.cache.summaries import Summaries
from kvlab.cache.tables import DecodeTables, room_for
from kvlab.core import BlockId, SeqId
from kvlab.offload import NoShelf
from kvlab.pool import BlockPool


class Away:
    """A second table for each sequence: host keys where its first table has holes.

    Without offload no table ever gets a key, and every loop here is over nothing. What a summary
    leaves of evicted blocks comes and goes with them.
    """

    def __init__(self, shelf: NoShelf, pool: BlockPool, summaries: Summaries):
        self.shelf, self.pool, self.size = shelf, pool, pool.geometry.block_size
        self.summaries = summaries
        self.tables: dict[SeqId, BlockTable] = {}
        self.decoding: DecodeTables | None = None

    def open(self, seq: SeqId) -> None:
        self.tables[seq] = BlockTable(self.size)
        self.summaries.open(seq)

    def close(self, seq: SeqId) -> None:
        self.shelf.drop(held(self.tables.pop(seq)))
        self.summaries.close(seq)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child` holds what its parent holds; nothing is copied."""
        self.shelf.share(held(self.tables[parent]))
        self.tables[child].append(self.tables[parent].ids)
        self.summaries.fork(parent, child)

    def crop(self, seq: SeqId, blocks: int) -> None:
        """Forget all blocks of `seq` but the first `blocks`."""
        table = self.tables[seq]
        gone = [key for key in table.ids[blocks:] if key is not None]
        del table.ids[blocks:]
        table.changes += 1
        self.shelf.drop(gone)
        self.summaries.crop(seq, blocks * self.size)

    def forget(self, seq: SeqId, index: int) -> None:
        """Block `index` of `seq` is on the device again."""
        self.shelf.drop([self.tables[seq].punch(index)])

    def let_go(self, seq: SeqId, blocks: int) -> None:
        """Forget the first `blocks` blocks of `seq`: nobody reads them again."""
        for index in range(min(blocks, len(self.tables[seq].ids))):
            if self.tables[seq].ids[index] is not None:
                self.forget(seq, index)

    def fetch(self, wanted: list[tuple[SeqId, int]], blocks: list[BlockId]) -> None:
        """Copy blocks (sequence, index) to the device; they are no longer away."""
        if wanted:
            self.shelf.fetch([self.tables[seq].ids[index] for seq, index in wanted], blocks)
            for place in wanted:
                self.forget(*place)

    def key(self, seq: SeqId, index: int) -> int | None:
        ids = self.tables[seq].ids
        return ids[index] if index < len(ids) else None

    def places(self, seq: SeqId, table: BlockTable, count: int) -> list[int]:
        """Where the first `count` blocks lie: device block, -2 - host key, or -1 if nowhere."""
        found = [-1 if block is None else block for block in table.ids[:count]]
        for index, key in enumerate(self.tables[seq].ids[:count]):
            if key is not None:
                found[index] = -2 - key
        return found

    def source(self, seq: SeqId, index: int):
        """The function that reads block `index` of `seq`, and the id it takes."""
        return self.shelf.read, self.tables[seq].ids[index]

    def leave(
        self, victims: list[BlockId], tables: dict[SeqId, BlockTable],
        keep: Callable[[dict[BlockId, int]], None],
    ) -> None:
        """LEAVING blocks become holes in `tables`, and keys here if host memory takes them.

        keep: is told the keys before those go that no table holds.
        """
        leaving = set(victims)
        keys = dict(zip(victims, self.shelf.spill(victims)))
        for seq, table in tables.items():
            gone = [index for index, block in enumerate(table.ids) if block in leaving]
            self.summaries.spill(seq, gone, [table.ids[index] for index in gone])
            for index in gone:
                block = table.punch(index)
                if keys:
                    self._note(seq, index, keys[block])
        keep(keys)
        self.shelf.drop(list(keys.values()))

    def _note(self, seq: SeqId, index: int, key: int) -> None:
        table = self.tables[seq]
        table.ids.extend([None] * (index + 1 - len(table.ids)))
        table.ids[index] = key
        table.changes += 1
        self.shelf.share([key])

    # ---- steps of one token, through the kernels

    def prepare(self, extents: list[Extent]) -> None:
        """Bring the device tables of host keys up to date."""
        self.summaries.rows = [e.seq for e in extents]
        if not self.shelf.keeps:
            return
        rows = len(extents)
        longest = max((len(self.tables[e.seq]) for e in extents), default=0)
        if self.decoding is None or not self.decoding.fits(rows, longest):
            self.decoding = DecodeTables(rows, room_for(longest), self.pool.device)
            self._no_tail = torch.zeros(rows, dtype=torch.int32, device=self.pool.device)
        self.decoding.refresh(extents, self.tables, [0] * rows)

    def decode(
        self, layer: int, q: Tensor, out: Tensor, lse: Tensor, mass: Tensor | None, scale: float,
        chosen: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Merge attention over host blocks, read in place over the bus, into `out` [B, Hq, D].

        Or over what stands for blocks that are gone.

        lse fp32 [B, Hq] of `out`; mass, shares among the device blocks, becomes shares of all.
        chosen: the keys that each head reads and how many, see `paged_decode`; None: all.
        """
        if not self.shelf.keeps:
            return self.summaries.decode(layer, q, (out, lse), scale)
        t, pool = self.decoding, self.pool
        table, n_blocks = chosen or (t.table, t.n_blocks)
        far, far_lse = pool.fused.paged_decode(
            q, self.shelf.planes(layer), pool.format, table, n_blocks, pool.open.layer(layer),
            t.open_slot, self._no_tail, scale=scale,
        )
        near = torch.sigmoid(lse - far_lse)[..., None]  # the share of what is on the device
        if mass is not None:
            mass.mul_(near)
        return torch.lerp(far.float(), out.float(), near).to(out.dtype)

    # ---- accounts

    @property
    def blocks(self) -> int:
        return self.shelf.live

    def check(self, waiting: list[int]) -> None:
        """Raise AssertionError unless tables and `waiting` hold exactly the keys that live."""
        self.shelf.check(waiting + [k for table in self.tables.values() for k in held(table)])


def held(table: BlockTable) -> list[int]:
    """What is not a hole."""
    return [id for id in table.ids if id is not None]
