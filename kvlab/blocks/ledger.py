"""Who may use which block; every change of ownership passes here.

    FREE --allocate--> OPEN --seal--> SEALED --reclaim--> LEAVING --free--> FREE
                         \\______________\\_________free___________________/

    OPEN     being written, in compute dtype; never evicted
    SEALED   read-only; in the policy's hands while nobody pins it
    LEAVING  chosen by the policy, still readable: spill it, then free it

A block has one owner and any number of pins. Freeing a pinned block takes its owner away; it
becomes free at the last unpin. Verbs take many ids at a time, and cost O(1) or O(log n) a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import chain, islice, repeat

from kvlab.blocks.states import FREE, LEAVING, OPEN, SEALED, BlockStateError, check_books
from kvlab.core import BadInput, BlockId, OutOfBlocks
from kvlab.policy import BlockMeta, EvictionPolicy, Moment, NoEviction


class BlockLedger:
    """Blocks 0..capacity-1, or without end if the capacity is None.

    policy: chooses victims among sealed, unpinned blocks; built for this ledger alone.
    events: called with one tuple per verb, ("touch", ids) and so on; see `blocks.replay`.

    Steps are the policy's time: each block sealed or touched takes one, and so does `tick`.
    """

    def __init__(
        self,
        capacity: int | None,
        policy: EvictionPolicy | None = None,
        events: Callable[[tuple], None] | None = None,
    ):
        if capacity is not None and capacity < 1:
            raise BadInput("cache.budget_blocks", capacity, "must be at least 1 block")
        self.capacity = capacity
        self.policy = NoEviction() if policy is None else policy
        self.events = events
        self.now = 0
        self._metas: list[BlockMeta] = []  # index is the id; made at first use, then kept
        self._described = False  # whether any block has facts other than `admit` gives
        self._freed: list[BlockId] = []  # heap of free ids below len(_metas)
        self.policy.resize(capacity)
        deaf = type(self.policy).expect is EvictionPolicy.expect
        self._expect = None if deaf else self.policy.expect

    def __getstate__(self) -> dict:
        """A copy is not recorded: its verbs are none of the original's."""
        return vars(self) | {"events": None}

    # -- numbers ---------------------------------------------------------------------------

    @property
    def free_count(self) -> int | None:
        """Blocks that `allocate` can give now; None if unbounded."""
        return None if self.capacity is None else self.capacity - self.held_count

    @property
    def held_count(self) -> int:
        """Blocks that are not free: open, sealed or leaving."""
        return len(self._metas) - len(self._freed)

    @property
    def evictable_count(self) -> int:
        """Blocks that `reclaim` can give now."""
        return len(self.policy)

    def state(self, id: BlockId) -> int:
        """FREE, OPEN, SEALED or LEAVING."""
        return self._metas[id].state if 0 <= id < len(self._metas) else FREE

    def meta(self, id: BlockId) -> BlockMeta:
        """The live record of a block that is not free; read only."""
        if self.state(id) == FREE:
            raise BlockStateError("look up", self._find(id), id)
        return self._metas[id]

    def _find(self, id):
        return self._metas[id] if 0 <= id < len(self._metas) else None

    # -- the life of a block -----------------------------------------------------------------

    def allocate(self, count: int, owner=None) -> list[BlockId]:
        """Open `count` blocks, lowest free ids first. Raises OutOfBlocks; never evicts."""
        if self.capacity is not None and count > self.capacity - self.held_count:
            raise OutOfBlocks(count, self.free_count, self.capacity)
        metas, freed = self._metas, self._freed
        ids = [heappop(freed) for _ in range(min(count, len(freed)))]
        for id in range(len(metas), len(metas) + count - len(ids)):
            metas.append(BlockMeta(id))
            ids.append(id)
        for id in ids:
            meta = metas[id]
            meta.state, meta.owner = OPEN, owner
        if self.events:
            self.events(("allocate", ids, owner))
        return ids

    def seal(
        self,
        ids: Sequence[BlockId],
        content: Iterable[int | None] = repeat(None),
        depth: Iterable[int] = repeat(0),
        level: Iterable[int] = repeat(0),
        cost: Iterable[float] = repeat(1.0),
        size: Iterable[int] = repeat(1),
        parent: Iterable[int | None] = repeat(None),
    ) -> None:
        """Make open blocks read-only and known to the policy, with one value per block of each."""
        metas, add, now = self._metas, self.policy.add, self.now
        known = len(metas)
        for id in ids:
            if not 0 <= id < known or metas[id].state != OPEN:
                raise BlockStateError("seal", self._find(id), id)
        self._described = True
        rows = zip(ids, content, depth, level, cost, size, parent)
        rows = list(rows) if self.events else rows
        for id, named, deep, rank, worth, large, before in rows:
            meta = metas[id]
            now += 1
            meta.content, meta.depth, meta.parent, meta.cost = named, deep, before, worth
            meta.level, meta.size, meta.state = rank, large, SEALED
            meta.born = meta.last = now
            meta.hits, meta.score = 0, 0.0
            add(meta)
            if meta.pins:
                self.policy.hold(meta)
        self.now = now
        if self.events:
            self.events(("seal", rows))

    def reclaim(self, count: int, coming: Iterable[int | None] = ()) -> list[BlockId]:
        """Let the policy choose `count` victims, first to leave first; they are LEAVING.

        They can be read until `free`. `coming`: contents that take their place, where known
        (ARC chooses better so). Raises OutOfBlocks, choosing none, if fewer are evictable.
        """
        if count > len(self.policy):
            raise OutOfBlocks(count, len(self.policy), self.capacity)
        coming, metas, pop, expect = list(coming), self._metas, self.policy.pop, self._expect
        if expect is None:
            victims = [pop() for _ in range(count)]
        else:
            victims = []
            for content in islice(chain(coming, repeat(None)), count):
                if content is not None:
                    expect(content)
                victims.append(pop())
        for id in victims:
            metas[id].state = LEAVING
        if self.events:
            self.events(("reclaim", count, coming, victims))
        return victims

    def free(self, ids: Iterable[BlockId]) -> list[BlockId]:
        """Give blocks back from any state; a pinned one loses its owner and waits for `unpin`.

        Returns those that are free now.
        """
        ids, metas, freed, gone = list(ids), self._metas, self._freed, []
        known, remove = len(metas), self.policy.remove
        for id in ids:
            meta = metas[id] if 0 <= id < known else None
            if meta is None or meta.state == FREE or meta.doomed:
                raise BlockStateError("free", meta, id)
            meta.owner = None
            if meta.pins:
                meta.doomed = True
                continue
            if meta.state == SEALED:
                remove(meta)
            meta.state = FREE
            heappush(freed, id)
            gone.append(id)
        if self.events:
            self.events(("free", ids))
        return gone

    def admit(self, contents: Sequence[int]) -> tuple[list[BlockId], list[int]]:
        """Seal one block for each content, evicting one at a time where no block is free.

        The inner loop of flat accounting in one call: for each content in turn `reclaim(1)` and
        `free` if there is no free block, `allocate(1)`, `seal`. A content may so evict one that
        came with the same call. Returns the blocks and the contents that left, in order.
        """
        contents = list(contents)
        room = len(contents) if self.capacity is None else self.free_count
        if room < len(contents) and not room and not len(self.policy):
            raise OutOfBlocks(len(contents), 0, self.capacity)
        events, described, gone = self.events, self._described, []
        self.events = None
        ids = self.allocate(min(room, len(contents)))
        self.seal(ids, contents)
        self.events, self._described = events, described
        self._replace(contents[room:], ids, gone)
        if self.events:
            self.events(("admit", contents, ids))
        return ids, gone

    def _replace(self, contents, ids, gone):
        """The loop of `admit` in a full cache, where a million accesses a second are decided."""
        metas, now = self._metas, self.now
        expect, pop, add = self._expect, self.policy.pop, self.policy.add
        for content in contents:
            if expect:
                expect(content)
            meta = metas[pop()]
            gone.append(meta.content)
            now += 1
            meta.content, meta.owner = content, None
            meta.born = meta.last = now
            meta.hits, meta.score = 0, 0.0
            if self._described:
                meta.depth, meta.level, meta.cost, meta.size, meta.parent = 0, 0, 1.0, 1, None
            add(meta)
            ids.append(meta.id)
        self.now = now

    # -- use ---------------------------------------------------------------------------------

    def begin(self, moment: Moment) -> list[BlockId]:
        """Tell a policy that asks which request comes; what it gives up for its age is LEAVING."""
        dead = list(self.policy.begin(moment)) if self.policy.asks else []
        for id in dead:
            self._metas[id].state = LEAVING
        if self.events and self.policy.asks:
            self.events(("begin", moment, dead))
        return dead

    def pin(self, ids: Iterable[BlockId]) -> None:
        """Keep blocks, in any state but FREE, until as many `unpin`."""
        ids, metas, hold = list(ids), self._metas, self.policy.hold
        known = len(metas)
        for id in ids:
            meta = metas[id] if 0 <= id < known else None
            if meta is None or meta.state == FREE:
                raise BlockStateError("pin", meta, id)
            meta.pins += 1
            if meta.pins == 1 and meta.state == SEALED:
                hold(meta)
        if self.events:
            self.events(("pin", ids))

    def unpin(self, ids: Iterable[BlockId]) -> list[BlockId]:
        """Take one pin off each; at the last, a block is evictable again, or free if freed.

        Returns those that are free now.
        """
        ids, metas, release, gone = list(ids), self._metas, self.policy.release, []
        known = len(metas)
        for id in ids:
            meta = metas[id] if 0 <= id < known else None
            if meta is None or not meta.pins:
                raise BlockStateError("unpin", meta, id)
            meta.pins -= 1
            if meta.pins:
                continue
            if meta.doomed:
                if meta.state == SEALED:
                    self.policy.remove(meta)
                meta.state, meta.doomed = FREE, False
                heappush(self._freed, id)
                gone.append(id)
            elif meta.state == SEALED:
                release(meta)
        if self.events:
            self.events(("unpin", ids))
        return gone

    def touch(self, ids: Sequence[BlockId]) -> None:
        """Tell the policy that sealed blocks were used, in this order (a prefix: tail first)."""
        ids = list(ids)
        metas, touch, now = self._metas, self.policy.touch, self.now
        known = len(metas)
        for id in ids:
            if not 0 <= id < known or metas[id].state != SEALED:
                raise BlockStateError("touch", self._find(id), id)
            meta = metas[id]
            now += 1
            meta.last = now
            meta.hits += 1
            touch(meta)
        self.now = now
        if self.events:
            self.events(("touch", ids))

    def score(self, id: BlockId, value: float) -> None:
        """Set the score of a sealed block (attention mass, or what the policy in use reads)."""
        meta = self._find(id)
        if meta is None or meta.state != SEALED:
            raise BlockStateError("score", meta, id)
        meta.score = value
        self.policy.rescore(meta)
        if self.events:
            self.events(("score", id, value))

    def tick(self) -> None:
        """End a step: a decode step of the model, or a request of a trace."""
        self.now += 1
        self.policy.tick(self.now)
        if self.events:
            self.events(("tick",))

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one place. O(blocks)."""
        check_books(self._metas, self._freed, self.capacity, self.policy)
