"""What an engine does with block ids for one request: look up, pin, make room, publish, let go.

The same ledger and policy objects that serve the pool on the device, with nothing behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, groupby
from typing import NamedTuple

from kvlab.blocks import BlockLedger
from kvlab.core import BlockId
from kvlab.policy import Moment
from kvlab.sim.outcome import BROKEN_CHAIN, HIT, HOST_HIT, MISS, PARTIAL


class Fact(NamedTuple):
    """What is known of a block's content when it moves: its place in the prefix and its cost."""

    content: int
    parent: int | None
    depth: int
    cost: float


class Tier:
    """Resident blocks of one memory: a ledger, and which block holds which content."""

    def __init__(self, ledger: BlockLedger):
        self.ledger = ledger
        self.where: dict[int, BlockId] = {}

    def evict(self, count: int, coming: list[int]) -> list[Fact]:
        """Let `count` victims of the policy go, in order, for the last of the contents coming."""
        ledger = self.ledger
        victims = ledger.reclaim(count, coming[-count:])
        gone = [Fact(m.content, m.parent, m.depth, m.cost) for m in map(ledger.meta, victims)]
        ledger.free(victims)
        for fact in gone:
            del self.where[fact.content]
        return gone

    def expire(self, moment: Moment) -> list[int]:
        """Tell the policy of a request; contents that it gives up for their age."""
        dead = self.ledger.begin(moment)
        gone = [self.ledger.meta(id).content for id in dead]
        self.ledger.free(dead)
        for content in gone:
            del self.where[content]
        return gone

    def seal(self, ids: Sequence[BlockId], facts: Sequence[Fact]) -> None:
        """Blocks that `allocate` gave now hold these contents, and can be found."""
        content, parent, depth, cost = zip(*facts)
        self.ledger.seal(ids, content, depth, cost=cost, parent=parent)
        self.where.update(zip(content, ids))

    def put(self, facts: list[Fact]) -> int:
        """Take blocks in, the newest if not all fit; how many left for them."""
        facts = facts[-self.ledger.capacity :]
        short = len(facts) - self.ledger.free_count
        dropped = self.evict(short, [f.content for f in facts]) if short > 0 else ()
        self.seal(self.ledger.allocate(len(facts)), facts)
        return len(dropped)

    def take(self, contents: list[int]) -> None:
        """Give up the blocks of these contents: they move to another tier."""
        self.ledger.free([self.where.pop(content) for content in contents])


class Flight(NamedTuple):
    """A request in flight: contents of its prompt, block of each, codes, what is new or pinned."""

    contents: list[int]
    blocks: list[BlockId]
    code: list[int]
    new: set[BlockId]
    pinned: list[BlockId]
    scratch: list[BlockId]  # output blocks and duplicates: nobody will find them
    evicted: list[int]


class Engine:
    """One device tier, at most one host tier behind it, and the accounting of the prefix.

    A block hits only if all earlier blocks of its request do. Blocks evicted from the device spill
    to the host; a host hit moves back. `cost(depth)` is what recomputing a block there takes.
    """

    def __init__(
        self,
        device: Tier,
        host: Tier | None,
        partial_misses: bool,
        cost: Callable[[int], float],
    ):
        self.device, self.host, self.partial_misses = device, host, partial_misses
        self.cost = cost
        self.host_evictions = 0

    def begin(self, moment: Moment) -> list[int]:
        """A request comes; the contents that a policy gives up for their age. They do not spill."""
        gone = self.device.expire(moment)
        if self.host:
            self.host_evictions += len(self.host.expire(moment))
        return gone

    def admit(self, contents: list[int], last_partial: bool, extra: int = 0) -> Flight | None:
        """Look up, pin and make room for a prompt and `extra` output blocks.

        None when the blocks of running requests leave too little room; nothing has changed then.
        """
        ledger, where = self.device.ledger, self.device.where
        blocks = [where.get(content) for content in contents]
        missing = {c for c, b in zip(contents, blocks) if b is None}
        pinned = list({b: None for b in blocks if b is not None})
        ledger.pin(pinned)
        short = len(missing) + extra - ledger.free_count
        if short > ledger.evictable_count:
            ledger.unpin(pinned)
            return None
        code = self._codes(contents, blocks, last_partial and self.partial_misses)
        gone = self._make_room(short, [c for c in reversed(contents) if c in missing])
        fresh = ledger.allocate(len(missing) + extra)
        scratch = fresh[len(missing) :]
        place = dict(zip((c for c in dict.fromkeys(contents) if c in missing), fresh))
        blocks = [place[c] if b is None else b for c, b in zip(contents, blocks)]
        return Flight(contents, blocks, code, set(place.values()), pinned, scratch, gone)

    def _codes(self, contents, blocks, partial_misses: bool) -> list[int]:
        """Outcome of each block: the leading run over both tiers hits."""
        host = self.host.where if self.host else ()
        code = []
        for content, block in zip(contents, blocks):
            if block is None and content not in host:
                break
            code.append(HOST_HIT if block is None else HIT)
        for block in blocks[len(code) :]:
            code.append(MISS if block is None else BROKEN_CHAIN)
        if partial_misses and code[-1] >= HIT:
            code[-1] = PARTIAL
        return code

    def _make_room(self, short: int, coming: list[int]) -> list[int]:
        """Contents that left the device. They spill to the host, from which those that come from
        there have gone before."""
        if self.host:
            self.host.take([c for c in dict.fromkeys(coming) if c in self.host.where])
        gone = self.device.evict(short, coming) if short > 0 else []
        if self.host and gone:
            self.host_evictions += self.host.put(gone)
        return [fact.content for fact in gone]

    def publish(self, flight: Flight, hold: bool) -> None:
        """The prompt is computed: its blocks can be found. Metadata changes once, tail first, so
        that among equals the deeper block is older. `hold` pins what is new until `finish`."""
        where = self.device.where
        rows = {b: (b, f) for b, f in zip(flight.blocks, self._facts(flight.contents))}
        duplicates = {b for b, fact in rows.values() if b in flight.new and fact.content in where}
        flight.scratch.extend(duplicates)
        flight.new.difference_update(duplicates)
        tail_first = [row for row in reversed(rows.values()) if row[0] not in duplicates]
        for is_new, group in groupby(tail_first, key=lambda row: row[0] in flight.new):
            blocks, facts = zip(*group)
            if not is_new:
                self.device.ledger.touch(blocks)
                continue
            self.device.seal(blocks, facts)
            if hold:
                self.device.ledger.pin(blocks)
                flight.pinned.extend(blocks)

    def _facts(self, contents: list[int]) -> Iterator[Fact]:
        parents = chain([None], contents)
        return map(Fact, contents, parents, count(), map(self.cost, count()))

    def finish(self, flight: Flight) -> None:
        """The request is done: pins go, tail first, and so do the blocks that nobody can find."""
        pinned = set(flight.pinned)
        tail_first = reversed(dict.fromkeys(flight.blocks))
        self.device.ledger.unpin([block for block in tail_first if block in pinned])
        self.device.ledger.free(flight.scratch)
        self.device.ledger.tick()

    def orphans(self) -> int | None:
        """Blocks on the device that cannot hit because an ancestor is gone; None with a host tier,
        whose blocks may fill the gap."""
        if self.host:
            return None
        ledger, where, reachable = self.device.ledger, self.device.where, {None: True}
        for content in where:
            line = []
            while content not in reachable and content in where:
                line.append(content)
                reachable[content] = False  # until its head is found; ends a cycle, too
                content = ledger.meta(where[content]).parent
            reachable.update(dict.fromkeys(line, reachable.get(content, False)))
        return sum(not reachable[content] for content in where)
