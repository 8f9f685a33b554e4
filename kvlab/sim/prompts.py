"""Prompts of a trace through the request protocol, and the outcome of each of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvlab.blocks import (
    BlockLedger,
    Ground,
    Holding,
    NameIndex,
    Names,
    NoTier,
    Opened,
    Sequences,
    Serving,
    leading,
)
from kvlab.core import OutOfBlocks, SeqId
from kvlab.policy import Moment
from kvlab.sim.outcome import BROKEN_CHAIN, DEEP_HIT, HIT, HOST_HIT, MISS, PARTIAL
from kvlab.sim.tiers import Stack, traffic

UNTOLD = 0  # contents that left are counted, not remembered


class Flight(NamedTuple):
    """A request in flight: its sequence, whole blocks, codes of its accesses, what left for it."""

    seq: SeqId
    blocks: int
    code: list[int]
    evicted: list[int]


class Prompts:
    """`Serving`, as in a live cache, with nothing behind the ids: a token is a block, and the ids
    of the trace are its contents.

    A block hits only if all earlier blocks of its request do, on the device or in `tier`.
    partial_misses: whether a last block that is not full counts as a miss. cost: depth -> what
    recomputing a block there takes.
    """

    def __init__(
        self, ledger: BlockLedger, tier: NoTier, partial_misses: bool, cost: Callable[[int], float]
    ):
        self.ledger, self.tier, self.partial_misses = ledger, tier, partial_misses
        self.index = NameIndex()
        self.holding = Holding(
            Serving(Ground(ledger, 1), index=self.index, tier=tier, cost=cost, remembered=UNTOLD)
        )
        self.sequences = Sequences([self.holding])

    def hear(self, moment: Moment) -> list[int]:
        """A request comes; the contents that a policy gives up for their age. They do not spill."""
        return self.holding.hear(moment)

    def admit(self, contents: list[int], last_partial: bool, extra: int = 0) -> Flight | None:
        """Look up, pin and make room for a prompt and `extra` output blocks.

        None when the blocks of running requests leave too little room; nothing has changed then.
        """
        names, twice = self._named(contents)
        try:
            seq, opened = self.sequences.open(names, reserve=len(names) + extra)
        except OutOfBlocks:
            return None
        code = self._code(opened, contents, names, twice, last_partial)
        return Flight(seq, len(names), code, opened.evicted)

    def serve(self, contents: list[int], last_partial: bool) -> Flight | None:
        """`admit`, `compute` and `finish` of a request that is over before the next one comes."""
        names, twice = self._named(contents)
        try:
            opened = self.holding.sharing.pass_through(names)
        except OutOfBlocks:
            return None
        if opened is not None:
            code = self._code(opened, contents, names, twice, last_partial)
            return Flight(-1, len(names), code, opened.evicted)
        flight = self.admit(contents, last_partial)
        if flight is not None:
            self.compute(flight, publish=False)
            self.finish(flight)
        return flight

    def _named(self, contents: list[int]) -> tuple[Names, bool]:
        """A prompt as it is looked up, and whether it names a block twice."""
        unique = list(dict.fromkeys(contents))
        twice = len(unique) < len(contents)
        return Names(unique, 1, contents if twice else None), twice

    def _code(self, opened: Opened, contents, names: Names, twice: bool, last_partial: bool):
        """Outcome of each access."""
        code = _repeated(opened, names.names(), contents) if twice else _codes(opened)
        if isinstance(self.tier, Stack):
            code = [DEEP_HIT if c == HOST_HIT and content in self.tier.deep else c
                    for c, content in zip(code, contents)]  # fmt: skip
        if last_partial and self.partial_misses and code[-1] >= HIT:
            code[-1] = PARTIAL
        return code

    def compute(self, flight: Flight, publish: bool = True) -> None:
        """The prompt is computed; `publish`: its blocks are known from now on, not at its end."""
        rest = flight.blocks - self.sequences.length(flight.seq)
        self.sequences.begin([flight.seq], [rest])
        self.sequences.commit(publish)

    def finish(self, flight: Flight) -> None:
        """The request is done: its blocks are known, pins go, and so do output blocks."""
        self.sequences.close([flight.seq])

    def orphans(self) -> int | None:
        """Blocks on the device that cannot hit because an ancestor is gone; None with a host tier,
        whose blocks may fill the gap."""
        if self.tier.keeps:
            return None
        parent = {m.content: m.parent for m in map(self.ledger.meta, self.index.blocks)}
        reachable = {None: True}
        for content in parent:
            line = []
            while content not in reachable and content in parent:
                line.append(content)
                reachable[content] = False  # until its head is found; ends a cycle, too
                content = parent[content]
            reachable.update(dict.fromkeys(line, reachable.get(content, False)))
        return sum(not reachable[content] for content in parent)

    def more(self) -> dict:
        books = {"host_evictions": self.tier.evictions, "tiers": traffic(self.tier)}
        return {"orphans": self.orphans()} | books


def _codes(opened: Opened) -> list[int]:
    """Outcome of each block: the leading run over both tiers hits."""
    found, away = opened.found, set(opened.away)
    run = leading(found)
    code = [HIT] * run
    while run < len(found) and (found[run] is not None or run in away):
        code.append(HOST_HIT if found[run] is None else HIT)
        run += 1
    return code + [MISS if block is None else BROKEN_CHAIN for block in found[run:]]


def _repeated(opened: Opened, unique: list[int], contents: list[int]) -> list[int]:
    """The same where a block is named twice: it is one block, and found again wherever it was
    found first."""
    place = {content: index for index, content in enumerate(unique)}
    away = set(opened.away)
    every = [place[content] for content in contents]
    return _codes(
        Opened(
            0,
            0,
            [opened.found[i] for i in every],
            [n for n, i in enumerate(every) if i in away],
            [],
        )
    )
