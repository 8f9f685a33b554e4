"""Tiers behind the device as a replay has them: host memory, and a third one behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvlab.blocks import BlockLedger, HostTier, NoTier, mode_by_name
from kvlab.core import BadInput, check_number
from kvlab.kinds import members
from kvlab.policy import EvictionPolicy


class NoHost:
    """What the device evicts is gone."""


@members("host")
@dataclass(frozen=True)
class Host:
    """A tier behind the device: what the device evicts comes here, and a hit here goes back.

    mode: "exclusive" holds what the device does not, a hit moves (vLLM's first host tier);
    "write_back" keeps a copy of a hit, and copies a block when it first leaves (HiCache's and
    LMCache's name for it); "write_through" copies each block as soon as it is computed.
    gigabytes_per_second, latency_ms: of a copy back to the device; a request waits for its own
    before it computes the rest. Null: what `service.calibration` measured, else no time. They say
    nothing without `service`, and are refused there.
    behind: a further tier (disk, remote), which gets what this one evicts.
    """

    capacity_blocks: int
    policy: str | EvictionPolicy = "lru"
    mode: str = "exclusive"
    gigabytes_per_second: float | None = None
    latency_ms: float | None = None
    behind: Host | None = None

    def __post_init__(self):
        check_number("host.capacity_blocks", self.capacity_blocks)
        mode_by_name(self.mode)
        if self.gigabytes_per_second is not None and not self.gigabytes_per_second > 0:
            raise BadInput("host.gigabytes_per_second", self.gigabytes_per_second, "must be > 0")
        if self.latency_ms is not None and not self.latency_ms >= 0:
            raise BadInput("host.latency_ms", self.latency_ms, "must be at least 0")
        if self.behind is not None and self.behind.behind is not None:
            raise BadInput("host.behind", self.behind, "is the last tier; there are three at most")

    @property
    def timed(self) -> bool:
        given = (self.gigabytes_per_second, self.latency_ms)
        return given != (None, None) or (self.behind is not None and self.behind.timed)


def tiers_of(host: Host | None, ledger: Callable[[object, int], BlockLedger]) -> NoTier:
    """The tiers that `host` describes, empty. ledger: makes one of (policy, capacity)."""
    if host is None:
        return NoTier()
    upper = mode_by_name(host.mode)(ledger(host.policy, host.capacity_blocks))
    if host.behind is None:
        return upper
    below = host.behind
    return Stack(upper, mode_by_name(below.mode)(ledger(below.policy, below.capacity_blocks)))


class Stack(NoTier):
    """Two tiers as one: what the upper evicts goes to the lower, both are looked into.

    A content of the lower goes to the device at once, and comes to the upper when it leaves again.
    """

    name = "stack"
    keeps = True

    def __init__(self, upper: HostTier, lower: HostTier):
        self.upper, self.lower = upper, lower
        upper.evicted = self._sink
        self.deep: set[int] = set()  # contents that the last claim found in the lower one only

    def _sink(self, facts) -> None:
        self.lower.put(self.lower.left(facts), [])

    @property
    def evictions(self):
        """Blocks that left the last tier."""
        return self.lower.evictions

    @property
    def spilled(self):
        return self.upper.spilled

    @property
    def fetched(self):
        return self.upper.fetched + self.lower.fetched

    def has(self, content, tokens):
        return self.upper.has(content, tokens) or self.lower.has(content, tokens)

    def make_room(self, count):
        return self.upper.make_room(count)

    def born(self, facts):
        facts = list(facts)
        self.upper.born(facts)
        self.lower.born(facts)

    def left(self, facts):
        return self.upper.left(facts)

    def put(self, facts, keys):
        self.upper.put(facts, keys)

    def claim(self, wanted):
        near = [self.upper.has(*one) for one in wanted]
        self.deep = {one[0] for one, here in zip(wanted, near) if not here}
        first = iter(self.upper.claim([one for one, here in zip(wanted, near) if here]))
        second = iter(self.lower.claim([one for one, here in zip(wanted, near) if not here]))
        return [(True, next(first)) if here else (False, next(second)) for here in near]

    def _split(self, tickets, others):
        for tier, mine in ((self.upper, True), (self.lower, False)):
            pairs = [(t[1], other) for t, other in zip(tickets, others) if t[0] is mine]
            if pairs:
                yield tier, [ticket for ticket, _ in pairs], [other for _, other in pairs]

    def fetch(self, tickets, blocks):
        for tier, mine, theirs in self._split(tickets, blocks):
            tier.fetch(mine, theirs)

    def arrived(self, tickets):
        for tier, mine, _ in self._split(tickets, tickets):
            tier.arrived(mine)

    def cancel(self, wanted, tickets):
        for tier, mine, theirs in self._split(tickets, wanted):
            tier.cancel(theirs, mine)

    def hear(self, moment):
        self.upper.hear(moment)
        self.lower.hear(moment)

    def clear(self):
        self.upper.clear()
        self.lower.clear()

    def check(self):
        self.upper.check()
        self.lower.check()


def traffic(tier: NoTier) -> dict[str, int]:
    """Blocks copied to each tier, and those that each gave up; what came back are its hits."""
    levels = {"host": tier}
    if isinstance(tier, Stack):
        levels = {"host": tier.upper, "third": tier.lower}
    return {
        f"{name}_{what}_blocks": getattr(level, field)
        for name, level in levels.items() if level.keeps
        for what, field in (("written", "spilled"), ("dropped", "evictions"))
    }  # fmt: skip
