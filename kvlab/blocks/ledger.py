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
from itertools import repeat

from kvlab.blocks.register import Register
from kvlab.blocks.states import FREE, LEAVING, OPEN, SEALED, BlockStateError, check_books
from kvlab.core import BadInput, BlockId, OutOfBlocks
from kvlab.policy import BlockMeta, EvictionPolicy, Moment, NoEviction

UNKNOWN, FIRST, PLAIN, ONE, SINGLE = repeat(None), repeat(0), repeat(0), repeat(1.0), repeat(1)


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
        self.register = Register()
        self.weighed = False  # whether any block has a level or a size of its own
        self.policy.resize(capacity)

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
        return self.register.held

    @property
    def evictable_count(self) -> int:
        """Blocks that `reclaim` can give now."""
        return len(self.policy)

    def state(self, id: BlockId) -> int:
        """FREE, OPEN, SEALED or LEAVING."""
        meta = self.register.find(id)
        return FREE if meta is None else meta.state

    def meta(self, id: BlockId) -> BlockMeta:
        """The live record of a block that is not free; read only."""
        meta = self.register.find(id)
        if meta is None or not meta.state:
            raise BlockStateError("look up", meta, id)
        return meta

    # -- the life of a block -----------------------------------------------------------------

    def allocate(self, count: int, owner=None) -> list[BlockId]:
        """Open `count` blocks, lowest free ids first. Raises OutOfBlocks; never evicts."""
        if self.capacity is not None and count > self.capacity - self.held_count:
            raise OutOfBlocks(count, self.free_count, self.capacity)
        ids = self.register.take(count, owner)
        if self.events:
            self.events(("allocate", ids, owner))
        return ids

    def seal(
        self,
        ids: Sequence[BlockId],
        content: Iterable[int | None] = UNKNOWN,
        depth: Iterable[int] = FIRST,
        level: Iterable[int] = PLAIN,
        cost: Iterable[float] = ONE,
        size: Iterable[int] = SINGLE,
        parent: Iterable[int | None] = UNKNOWN,
    ) -> None:
        """Make open blocks read-only and known to the policy, with one value per block of each."""
        metas, now = self.register.only(OPEN, ids, "seal"), self.now
        weighs = self.weighed or level is not PLAIN or size is not SINGLE
        if self.events or weighs:
            self.weighed = weighs
            rows = list(zip(ids, content, depth, level, cost, size, parent))
            _, content, depth, level, cost, size, parent = zip(*rows) if rows else [()] * 7
            for meta, rank, large in zip(metas, level, size):
                meta.level, meta.size = rank, large
        facts = zip(metas, content, depth, parent, cost)
        for meta, meta.content, meta.depth, meta.parent, meta.cost in facts:
            now += 1
            meta.born = meta.last = now
            meta.hits, meta.score, meta.state = 0, 0.0, SEALED
        self.now = now
        if any(meta.pins for meta in metas):
            for meta in metas:
                self.policy.add(meta)
                if meta.pins:
                    self.policy.hold(meta)
        else:
            self.policy.add_all(metas)
        if self.events:
            self.events(("seal", rows))

    def reclaim(self, count: int, coming: Iterable[int | None] = ()) -> list[BlockId]:
        """Let the policy choose `count` victims, first to leave first; they are LEAVING.

        They can be read until `free`. `coming`: contents that take their place, where known
        (ARC chooses better so). Raises OutOfBlocks, choosing none, if fewer are evictable.
        """
        if count > len(self.policy):
            raise OutOfBlocks(count, len(self.policy), self.capacity)
        coming, metas = list(coming), self.register.metas
        victims = self.policy.pop_all(count, coming)
        for id in victims:
            metas[id].state = LEAVING
        if self.events:
            self.events(("reclaim", count, coming, victims))
        return victims

    def free(self, ids: Iterable[BlockId]) -> list[BlockId]:
        """Give blocks back from any state; a pinned one loses its owner and waits for `unpin`.

        Returns those that are free now.
        """
        ids, gone, remove = list(ids), [], self.policy.remove
        metas = self.register.all(ids, "free")
        for meta in metas:
            if meta.doomed:
                raise BlockStateError("free", meta, meta.id)
        if len(set(ids)) < len(ids):
            raise BlockStateError("free twice", metas[0], ids)
        for meta in metas:
            meta.owner = None
            if meta.pins:
                meta.doomed = True
                continue
            if meta.state == SEALED:
                remove(meta)
            gone.append(meta.id)
        self.register.give(gone)
        if self.events:
            self.events(("free", ids))
        return gone

    def admit(self, contents: Sequence[int]) -> tuple[list[BlockId], list[int]]:
        """Flat accounting in one call: for each content in turn `reclaim(1)` and `free` if there is
        no free block, `allocate(1)`, `seal`. A content may so evict one that came with the same
        call. Returns the blocks and the contents that left, in order.
        """
        contents = list(contents)
        room = len(contents) if self.capacity is None else self.free_count
        if room < len(contents) and not room and not len(self.policy):
            raise OutOfBlocks(len(contents), 0, self.capacity)
        events, self.events = self.events, None
        ids = self.allocate(min(room, len(contents)))
        self.seal(ids, contents)
        gone = self._replace(contents[room:], ids)
        self.events = events
        if events:
            events(("admit", contents, ids))
        return ids, gone

    def _replace(self, contents: list[int], ids: list[BlockId]) -> list[int]:
        """The loop of `admit` in a full cache, where a million accesses a second are decided."""
        metas, now, gone = self.register.metas, self.now, []
        policy, weighed = self.policy, self.weighed
        expect, pop, add = policy.expect if policy.listens else None, policy.pop, policy.add
        for content in contents:
            if expect:
                expect(content)
            meta = metas[pop()]
            gone.append(meta.content)
            now += 1
            meta.content, meta.owner, meta.parent = content, None, None
            meta.depth, meta.cost, meta.hits, meta.score = 0, 1.0, 0, 0.0
            meta.born = meta.last = now
            if weighed:
                meta.level, meta.size = 0, 1
            add(meta)
            ids.append(meta.id)
        self.now = now
        return gone

    # -- use ---------------------------------------------------------------------------------

    def begin(self, moment: Moment) -> list[BlockId]:
        """Tell a policy that asks which request comes; what it gives up for its age is LEAVING."""
        dead = list(self.policy.begin(moment)) if self.policy.asks else []
        for id in dead:
            self.register.metas[id].state = LEAVING
        if self.events and self.policy.asks:
            self.events(("begin", moment, dead))
        return dead

    def pin(self, ids: Iterable[BlockId]) -> None:
        """Keep blocks, in any state but FREE, until as many `unpin`."""
        ids, held = list(ids), []
        for meta in self.register.all(ids, "pin"):
            meta.pins += 1
            if meta.pins == 1 and meta.state == SEALED:
                held.append(meta)
        self.policy.hold_all(held)
        if self.events:
            self.events(("pin", ids))

    def unpin(self, ids: Iterable[BlockId]) -> list[BlockId]:
        """Take one pin off each; at the last, a block is evictable again, or free if freed.

        Returns those that are free now.
        """
        ids, back, gone = list(ids), [], []
        for meta in self.register.all(ids, "unpin"):
            if not meta.pins:
                raise BlockStateError("unpin", meta, meta.id)
            meta.pins -= 1
            if meta.pins:
                continue
            if meta.doomed:
                meta.doomed = False
                gone.append(meta)
            elif meta.state == SEALED:
                back.append(meta)
        for meta in gone:
            if meta.state == SEALED:
                self.policy.remove(meta)
        self.policy.release_all(back)
        gone = [meta.id for meta in gone]
        self.register.give(gone)
        if self.events:
            self.events(("unpin", ids))
        return gone

    def touch(self, ids: Sequence[BlockId]) -> None:
        """Tell the policy that sealed blocks were used, in this order (a prefix: tail first)."""
        ids, now = list(ids), self.now
        metas = self.register.only(SEALED, ids, "touch")
        if len(set(ids)) < len(ids):  # each use of a block is told before the next one
            for meta in metas:
                now += 1
                meta.last = now
                meta.hits += 1
                self.policy.touch(meta)
        else:
            for meta in metas:
                now += 1
                meta.last = now
                meta.hits += 1
            self.policy.touch_all(metas)
        self.now = now
        if self.events:
            self.events(("touch", ids))

    def score(self, id: BlockId, value: float) -> None:
        """Set the score of a sealed block (attention mass, or what the policy in use reads)."""
        meta = self.register.find(id)
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
        check_books(self.register.metas, self.register.freed, self.capacity, self.policy)
