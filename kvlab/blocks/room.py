"""Blocks leave, so that others find a place."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.storage import Holes, NoStorage
from kvlab.core import BlockId, OutOfBlocks, OutOfHost, SeqId


class Room:
    """The part of `Holding` that evicts: choose, spill, free.

    evictions: blocks that left so far, by the policy or out of the window.
    """

    def __init__(self, ledger: BlockLedger, storage: NoStorage):
        self.ledger, self.storage, self.tables = ledger, storage, storage.tables
        self.evictions = 0

    def allocate(
        self, seq: SeqId | None, count: int, coming: Sequence[int] = ()
    ) -> list[BlockId]:
        """Open blocks for `seq`, with room made for them; see `make_room`."""
        self.make_room(count, coming)
        return self.ledger.allocate(count, seq)

    def make_room(self, count: int, coming: Sequence[int] = ()) -> list[int]:
        """Evict until `count` blocks are free; see `evict`. Raises `OutOfBlocks`, too.

        coming: contents that will be there, as far as known; some policies choose better so.
        """
        short = self.short_of(count)
        return self.evict(short, coming[-short:]) if short > 0 else []

    def short_of(self, count: int) -> int:
        """Blocks to evict before `count` are free. Raises `OutOfBlocks` if too few can be."""
        capacity, held = self.ledger.capacity, self.ledger.held_count
        short = 0 if capacity is None else max(0, count - (capacity - held))
        if short > self.ledger.evictable_count:
            raise OutOfBlocks(count, capacity - held, capacity)
        return short

    def evict(self, count: int, coming: Sequence[int] = ()) -> list[int]:
        """Choose, spill, free: `count` blocks leave; the contents of those that were known.

        Raises what the storage raises where it must keep them and cannot; nothing changes then.
        """
        spills = self.host_room(count)
        gone = self._depart(self.ledger.reclaim(count, coming), spills)
        self.evictions += count
        return gone

    def host_room(self, count: int) -> bool:
        """Whether `count` blocks that leave can be kept; raises where they must be."""
        self.storage.require(count)
        return True

    def _depart(self, victims: list[BlockId], spills: bool) -> list[int]:
        """Chosen blocks go, to the host if it `spills`."""
        if spills:
            holes = self._holes(victims)
            self.storage.let_go(self.storage.spill(victims, holes))
            self._punch(holes)
        self.free(victims)
        self.storage.prune()
        return []

    def _holes(self, victims: list[BlockId]) -> Holes:
        """Where running sequences lose these blocks."""
        leaving = set(victims)
        found = ((seq, [i for i, block in enumerate(table.ids) if block in leaving])
                 for seq, table in self.tables.items())
        return [(seq, indices) for seq, indices in found if indices]

    def _punch(self, holes: Holes) -> None:
        for seq, indices in holes:
            for index in indices:
                self.tables[seq].punch(index)

    def recall(self, wanted: list[tuple[SeqId, int]]) -> list[BlockId]:
        """Blocks that running sequences read on the host come back, others leave for them: as many
        of `wanted` (sequence, index) as there is room for. The blocks they are in now."""
        wanted = wanted[: self.ledger.evictable_count]
        try:
            self.make_room(len(wanted))
        except OutOfHost:  # for a moment both would be there; what stays away is read there
            return []
        blocks = self.ledger.allocate(len(wanted))
        self.storage.recall(wanted, blocks)
        for (seq, index), block in zip(wanted, blocks):
            self.tables[seq].fill(index, block)
        self.ledger.seal(blocks, depth=[index for _, index in wanted])
        return blocks

    def free(self, blocks: list[BlockId]) -> None:
        if blocks:
            self.ledger.free(blocks)
            self.storage.drop(blocks)
