"""The host tier: known contents that left the device, in a second ledger with its own policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.storage import NoStorage
from kvlab.core import BadInput, BlockId, OutOfHost
from kvlab.policy import Moment


class Fact(NamedTuple):
    """A known block as it moves: its content, its token bytes, its place and its cost."""

    block: BlockId
    content: int
    tokens: bytes
    parent: int | None
    depth: int
    cost: float


class NoTier:
    """Nothing is kept: what leaves the device is gone."""

    name = "none"
    keeps = False
    evictions = spilled = fetched = 0  # blocks that left the tier, came to it, were copied back

    def has(self, content: int, tokens: bytes) -> bool:
        """Whether this content waits here."""
        return False

    def make_room(self, count: int) -> bool:
        """Have host memory for `count` more blocks, at the cost of what waits here."""
        return True

    def born(self, facts: Iterable[Fact]) -> None:
        """These blocks are known from now on."""

    def left(self, facts: Sequence[Fact]) -> list[Fact]:
        """These blocks leave the device: those of them that have to be copied here first."""
        return []

    def put(self, facts: Sequence[Fact], keys: list[int]) -> None:
        """Keep copies that the caller held, in this order; `keys` may be empty (no storage)."""

    def claim(self, wanted: Sequence[tuple[int, bytes]]) -> list[int]:
        """Contents that `has`, on their way to the device: a ticket for each."""
        return []

    def fetch(self, tickets: list[int], blocks: list[BlockId]) -> None:
        """Copy claimed contents into open blocks; the tickets stay."""

    def arrived(self, tickets: list[int]) -> None:
        """What was claimed is on the device, or is computed anew."""

    def cancel(self, wanted: Sequence[tuple[int, bytes]], tickets: list[int]) -> None:
        """What was claimed is not needed: the sequence never ran."""

    def hear(self, moment: Moment) -> None:
        """A request comes; what the tier's policy gives up for its age goes."""

    def clear(self) -> None:
        """Forget everything that waits."""

    @property
    def keys(self) -> list[int]:
        """Storage keys that the tier holds, tickets of `claim` included."""
        return []

    def check(self) -> None:
        """Raise AssertionError where the books contradict each other."""


class HostTier(NoTier):
    """Exclusive: a content is in one tier only. What leaves the device comes here, in the order in
    which it left; what is wanted again goes back, and leaves no copy.

    ledger: of the tier; its capacity may be None where `storage` says when memory is full.
    """

    name = "exclusive"
    keeps = True

    def __init__(self, ledger: BlockLedger, storage: NoStorage | None = None):
        self.ledger, self.storage = ledger, storage or NoStorage()
        self.evictions = self.spilled = self.fetched = 0
        self._where: dict[int, BlockId] = {}
        self._kept: dict[BlockId, tuple[bytes, int | None]] = {}  # token bytes and storage key
        self._moving: dict[int, tuple] = {}  # by ticket: token bytes and storage key
        self._tickets = 0
        self.evicted: Callable[[list[Fact]], None] | None = None  # hears what the tier gives up

    def __len__(self) -> int:
        return len(self._where)

    def has(self, content, tokens):
        id = self._where.get(content)
        return id is not None and self._kept[id][0] == tokens

    def make_room(self, count):
        while True:
            try:
                self.storage.require(count)
                return True
            except OutOfHost:
                if not self.ledger.evictable_count:
                    return False
                self._evict(1, ())

    def _evict(self, count: int, coming: Sequence[int]) -> None:
        victims = list(map(self.ledger.meta, self.ledger.reclaim(count, coming)))
        if self.evicted:
            self.evicted([Fact(m.id, m.content, self._kept[m.id][0], m.parent, m.depth, m.cost)
                          for m in victims])  # fmt: skip
        self._release([meta.content for meta in victims])
        self.evictions += count

    def _release(self, contents: Iterable[int]) -> None:
        """Forget contents that are here, with their copies."""
        ids = [self._where.pop(content) for content in contents]
        self.ledger.free(ids)
        self._let_go(self._kept.pop(id)[1] for id in ids)

    def _let_go(self, keys: Iterable[int | None]) -> None:
        keys = [key for key in keys if key is not None]
        if keys:
            self.storage.let_go(keys)

    # ---- the device lets go

    def left(self, facts):
        return list(facts)

    def put(self, facts, keys):
        """The newest stay where not all fit."""
        ledger, keys = self.ledger, keys or [None] * len(facts)
        self.spilled += len(facts)
        self._release({f.content: None for f in facts if f.content in self._where})
        room = len(facts) if ledger.capacity is None else min(len(facts), self._room())
        self._let_go(keys[: len(keys) - room])
        facts, keys = facts[len(facts) - room :], keys[len(keys) - room :]
        if not facts:
            return
        _, contents, tokens, parents, depths, costs = zip(*facts)
        short = 0 if ledger.capacity is None else len(facts) - ledger.free_count
        if short > 0:
            self._evict(short, contents[-short:])
        ids = ledger.allocate(len(facts))
        ledger.seal(ids, contents, depths, cost=costs, parent=parents)
        self._where.update(zip(contents, ids))
        self._kept.update(zip(ids, zip(tokens, keys)))

    def _room(self) -> int:
        """Blocks that the tier can take, at the cost of those it may evict."""
        return self.ledger.free_count + self.ledger.evictable_count

    # ---- the device asks for it back

    def claim(self, wanted):
        """They leave at once, so that making room on the device cannot push them out."""
        tickets = []
        for content, _ in wanted:
            id = self._where.pop(content)
            self.ledger.free([id])
            tickets.append(self._ticket(self._kept.pop(id)))
        return tickets

    def _ticket(self, held: tuple) -> int:
        self._tickets += 1
        self._moving[self._tickets] = held
        return self._tickets

    def fetch(self, tickets, blocks):
        self.fetched += len(tickets)
        self.storage.fetch([self._key(ticket) for ticket in tickets], blocks)

    def _key(self, ticket: int) -> int | None:
        return self._moving[ticket][1]

    def arrived(self, tickets):
        self._let_go(self._moving.pop(ticket)[1] for ticket in tickets)

    def cancel(self, wanted, tickets):
        """They wait again, as if they had just come: a place that was given up is lost."""
        held = [self._moving.pop(ticket) for ticket in tickets]
        facts = [Fact(-1, content, tokens, None, 0, 1.0) for content, tokens in wanted]
        self.put(facts, [key for _, key in held])
        self.spilled -= len(facts)

    # ---- accounts

    def hear(self, moment):
        dead = self.ledger.begin(moment)
        self._release([self.ledger.meta(id).content for id in dead])
        self.evictions += len(dead)

    def clear(self):
        self._release([c for c, id in self._where.items() if not self.ledger.meta(id).pins])

    @property
    def keys(self):
        held = [*self._kept.values(), *self._moving.values()]
        return [key for _, key in held if key is not None]

    def check(self):
        self.ledger.check()
        assert self.ledger.held_count == len(self._where) == len(self._kept), "one block a content"
        for content, id in self._where.items():
            assert self.ledger.meta(id).content == content, "a content is where it is said to be"


class WriteBack(HostTier):
    """Inclusive: a copy is made when a content first leaves the device, and stays when it goes
    back; leaving once more it only counts as used, and costs no copy."""

    name = "write_back"

    def left(self, facts):
        self._touch(f.content for f in facts if f.content in self._where)
        return [f for f in facts if f.content not in self._where]

    def _touch(self, contents: Iterable[int]) -> None:
        self.ledger.touch([self._where[content] for content in contents])

    def claim(self, wanted):
        """They stay, pinned until they have arrived."""
        ids = [self._where[content] for content, _ in wanted]
        self.ledger.pin(ids)
        return ids

    def _key(self, ticket):
        return self._kept[ticket][1]

    def arrived(self, tickets):
        self.ledger.unpin(tickets)
        self.ledger.touch(tickets)

    def cancel(self, wanted, tickets):
        self.ledger.unpin(tickets)


class WriteThrough(WriteBack):
    """Inclusive: a copy is made as soon as a content is known, so that leaving costs nothing. A
    content that the host has given up meanwhile is gone when it leaves."""

    name = "write_through"

    def born(self, facts):
        new = [f for f in facts if f.content not in self._where]
        if new and self.make_room(len(new)):
            self.put(new, self.storage.spill([f.block for f in new], []))

    def left(self, facts):
        super().left(facts)
        return []


MODES = {kind.name: kind for kind in (HostTier, WriteBack, WriteThrough)}


def mode_by_name(name: str) -> type[HostTier]:
    """The kind of host tier of this name; BadInput lists the known ones."""
    if name not in MODES:
        raise BadInput("offload.mode", name, f"known: {', '.join(sorted(MODES))}")
    return MODES[name]
