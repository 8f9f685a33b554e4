"""What an engine does with block ids for one request: look up, pin, make room, publish, let go.

The same ledger and policy objects that serve the pool on the device, with nothing behind them.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from kvlab.blocks import BlockLedger
from kvlab.core import BlockId
from kvlab.sim.outcome import BROKEN_CHAIN, HIT, HOST_HIT, MISS, PARTIAL


class Tier:
    """Resident blocks of one memory: a ledger, and which block holds which content."""

    def __init__(self, ledger: BlockLedger):
        self.ledger = ledger
        self.where: dict[int, BlockId] = {}
        self.parent: dict[int, int | None] = {}  # of resident contents, where known

    def evict(self, count: int, coming: list[int]) -> list[tuple[int, int, float]]:
        """Let `count` victims of the policy go, for the last of the contents that come; (content,
        depth, cost) of each, in order."""
        ledger = self.ledger
        victims = ledger.reclaim(count, coming[-count:])
        gone = [(m.content, m.depth, m.cost) for m in map(ledger.meta, victims)]
        ledger.free(victims)
        for content, _, _ in gone:
            del self.where[content]
            self.parent.pop(content, None)
        return gone

    def put(self, blocks: list[tuple[int, int, float]]) -> int:
        """Take (content, depth, cost) blocks in, newest first if not all fit; evictions made."""
        blocks = blocks[-self.ledger.capacity :]
        short = len(blocks) - self.ledger.free_count
        dropped = self.evict(short, [c for c, _, _ in blocks]) if short > 0 else ()
        ids = self.ledger.allocate(len(blocks))
        content, depth, cost = zip(*blocks) if blocks else ((), (), ())
        self.ledger.seal(ids, content, depth, cost=cost)
        self.where.update(zip(content, ids))
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

    def __init__(self, device: Tier, host: Tier | None, partial_misses: bool, cost):
        self.device, self.host, self.partial_misses = device, host, partial_misses
        self.cost = cost
        self.host_evictions = 0

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
        return [content for content, _, _ in gone]

    def publish(self, flight: Flight, hold: bool) -> None:
        """The prompt is computed: its blocks can be found. Metadata changes once, tail first, so
        that among equals the deeper block is older. `hold` pins what is new until `finish`."""
        ledger, where, cost = self.device.ledger, self.device.where, self.cost
        rows = {b: (b, c, d) for d, (b, c) in enumerate(zip(flight.blocks, flight.contents))}
        duplicates = {b for b, c, _ in rows.values() if b in flight.new and c in where}
        flight.scratch.extend(duplicates)
        tail_first = [row for row in reversed(rows.values()) if row[0] not in duplicates]
        for is_new, group in groupby(tail_first, key=lambda row: row[0] in flight.new):
            blocks, contents, depths = zip(*group)
            if not is_new:
                ledger.touch(blocks)
                continue
            ledger.seal(blocks, contents, depths, cost=map(cost, depths))
            where.update(zip(contents, blocks))
            self.device.parent.update(
                (c, flight.contents[d - 1] if d else None) for c, d in zip(contents, depths)
            )
            if hold:
                ledger.pin(blocks)
                flight.pinned.extend(blocks)

    def finish(self, flight: Flight) -> None:
        """The request is done: pins go, and so do the blocks that nobody can find."""
        self.device.ledger.unpin(flight.pinned)
        self.device.ledger.free(flight.scratch)
        self.device.ledger.tick()

    def orphans(self) -> int | None:
        """Blocks on the device that cannot hit because an ancestor is gone; None with a host tier,
        whose blocks may fill the gap."""
        if self.host:
            return None
        parent, reachable = self.device.parent, {None: True}
        for content in parent:
            chain = []
            while content not in reachable and content in parent:
                chain.append(content)
                content = parent[content]
            reachable.update(dict.fromkeys(chain, reachable.get(content, False)))
        return sum(not reachable[content] for content in parent)
