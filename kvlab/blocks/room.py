"""Blocks leave, so that others find a place."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.blocks.ground import Ground
from kvlab.core import BlockId, OutOfBlocks, OutOfHost, SeqId
from kvlab.policy import Moment


class Exit:
    """How chosen blocks leave where nobody knows them: running sequences get holes, and read on the
    host what its memory takes."""

    def __init__(self, ground: Ground):
        self.ground = ground

    def host_room(self, count: int) -> bool:
        """Whether `count` blocks that leave can be kept; raises where they must be."""
        self.ground.storage.require(count)
        return True

    def depart(self, victims: list[BlockId], spills: bool) -> list[int]:
        """Chosen blocks go, to the host if it `spills`; the contents of those that were known."""
        ground = self.ground
        if spills:
            holes = ground.holes(victims)
            ground.storage.let_go(ground.storage.spill(victims, holes))
            ground.punch(holes)
        ground.free(victims)
        ground.storage.prune()
        return []


class Room:
    """Makes room: choose, spill, free.

    exit: how what was chosen leaves. evictions: blocks that left so far, by the policy or out of
    the window.
    """

    def __init__(self, ground: Ground, exit: Exit):
        self.ground, self.ledger, self.exit = ground, ground.ledger, exit
        self.evictions = 0

    def allocate(
        self, seq: SeqId | None, count: int, coming: Sequence[int] = ()
    ) -> list[BlockId]:
        """Open blocks for `seq`, with room made for them; see `make`."""
        self.make(count, coming)
        return self.ledger.allocate(count, seq)

    def make(self, count: int, coming: Sequence[int] = ()) -> list[int]:
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
        spills = self.exit.host_room(count)
        gone = self.exit.depart(self.ledger.reclaim(count, coming), spills)
        self.evictions += count
        return gone

    def hear(self, moment: Moment) -> list[int]:
        """A request comes, and policies that go by requests hear of it: the contents that the
        device's gives up for their age. They do not spill."""
        dead = self.ledger.begin(moment)
        self.evictions += len(dead)
        return self.exit.depart(dead, spills=False) if dead else []

    def recall(self, wanted: list[tuple[SeqId, int]]) -> list[BlockId]:
        """Blocks that running sequences read on the host come back, others leave for them: as many
        of `wanted` (sequence, index) as there is room for. The blocks they are in now."""
        wanted = wanted[: self.ledger.evictable_count]
        try:
            self.make(len(wanted))
        except OutOfHost:  # for a moment both would be there; what stays away is read there
            return []
        blocks = self.ledger.allocate(len(wanted))
        self.ground.storage.recall(wanted, blocks)
        for (seq, index), block in zip(wanted, blocks):
            self.ground.tables[seq].fill(index, block)
        self.ledger.seal(blocks, depth=[index for _, index in wanted])
        return blocks
