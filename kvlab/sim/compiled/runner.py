"""Runs pieces of a trace through the compiled loops; state stays between them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numba import njit

from kvlab.core import BadInput
from kvlab.sim.compiled import catalog
from kvlab.sim.compiled.numbering import Numbering
from kvlab.sim.compiled.state import (
    DROPPED,
    MINE,
    WRITTEN,
    new_state,
    with_contents,
)  # fmt: skip
from kvlab.sim.outcome import Outcome
from kvlab.sim.trace import Trace

_numbered: WeakKeyDictionary[Trace, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()


def numbered(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """The contents of a whole trace by number, int32 [A], and the ids by number; made once."""
    if trace not in _numbered:
        numbering = Numbering()
        numbers = numbering.number(trace.ids)
        _numbered[trace] = numbers, numbering.ids[: numbering.count]
    return _numbered[trace]


class Runner:
    """One policy at one capacity, a tier behind it (policy, capacity, mode) or none.

    last: contents by number of the latest piece, and those that left; contents: how many there are.
    cost: of computing a block, by depth. whole: the only piece is a loaded trace, whose numbers are
    kept for the next run.
    """

    def __init__(self, device, capacity, tier, prefix, partial_misses, cost, whole):
        host, room, mode = tier or (None, 1, "none")
        self.prefix, self.partial_misses, self.whole = prefix, partial_misses, whole
        behind = host.state(room) if host else new_state(room, 1)
        self.tiers = [device.state(capacity), behind]
        self.cost, self.has_host = cost, host is not None
        self.draws = [device.draws(), host and host.draws()]
        self.numbering = Numbering()
        if prefix:
            self.loop = catalog.requests(device.verbs, host and host.verbs, mode)
        else:
            self.loop = catalog.accesses(device.verbs)

    def run(self, piece: Trace) -> Outcome:
        if self.whole:
            numbers, ids = numbered(piece)
        else:
            numbers = self.numbering.number(piece.ids)
            ids = self.numbering.ids
        code, gone, gone_at = self.replay(piece, numbers, len(ids))
        self.last, self.contents = (numbers, gone), len(ids)
        return Outcome(code, ids[gone], gone_at)

    def replay(self, piece: Trace, numbers: np.ndarray, count: int):
        """Codes uint8 [A]; contents that left int32 [E], and when, int64 [E]."""
        longest = int(np.diff(piece.first).max(initial=0)) if self.prefix else 1
        self._prepare(count, piece.accesses, longest)
        code = np.empty(piece.accesses, dtype=np.uint8)
        gone = np.empty(piece.accesses, dtype=np.int32)
        gone_at = np.empty(piece.accesses, dtype=np.int64)
        if self.prefix:
            room = [np.empty(longest, dtype=kind) for kind in (np.int32, np.int64, np.int32)]
            partial = self.partial_misses & piece.partial
            left = self.loop(
                *self.tiers, numbers, piece.first, partial, code, gone, gone_at, *room
            )
        else:
            left = self.loop(self.tiers[0], numbers, code, gone, gone_at)
        return code, gone[:left], gone_at[:left]

    def _prepare(self, contents: int, accesses: int, longest: int) -> None:
        """Room for contents, costs by depth, draws for as many victims as there can be."""
        for tier, draws in enumerate(self.draws):
            state = with_contents(self.tiers[tier], contents)
            if longest > len(state.costs):
                costs = np.array([self.cost(depth) for depth in range(longest)], dtype=float)
                state = state._replace(costs=costs)
            if draws is not None:
                rest = state.draws[state.book[MINE] :]
                more = draws.random(max(0, accesses - len(rest)))
                state = state._replace(draws=np.concatenate([rest, more]))
                state.book[MINE] = 0
            self.tiers[tier] = state

    def more(self) -> dict:
        """Host evictions, and the traffic of the tier where there is one."""
        written, dropped = (int(self.tiers[1].book[at]) for at in (WRITTEN, DROPPED))
        tiers = {"host_written_blocks": written, "host_dropped_blocks": dropped}
        return {"host_evictions": dropped} | ({"tiers": tiers} if self.has_host else {})

    def foresee(self, keys: np.ndarray) -> None:
        """Belady's keys, by access."""
        self.tiers[0] = self.tiers[0]._replace(draws=keys)


def belady_keys(trace: Trace, keep: np.ndarray | None) -> np.ndarray:
    """Keys of `compiled.belady` for each access of a trace, float64 [A]: the later the next use and
    the deeper the block, the smaller. keep [R]: accesses of each request that count as uses; None:
    each access on its own counts."""
    numbers, ids = numbered(trace)
    depth = trace.depth if keep is not None else np.zeros(trace.accesses, dtype=np.int64)
    time = trace.request_of if keep is not None else np.arange(trace.accesses)
    counts = depth < (1 if keep is None else keep[trace.request_of])
    deepest = int(depth.max(initial=0)) + 1
    if (time[-1] + 2 if len(time) else 1) * deepest >= 1 << 53:
        raise BadInput("trace", trace.name, "compiled Belady takes 2^53 requests x depth at most")
    return _next_uses(numbers, time, depth, counts, np.zeros(len(ids), dtype=np.int64), deepest)


@njit(cache=True, nogil=True)
def _next_uses(numbers, time, depth, counts, following, deepest):
    key = np.empty(len(numbers))
    end = time[-1] + 1 if len(time) else 0
    following[:] = end
    for at in range(len(numbers) - 1, -1, -1):
        content = numbers[at]
        key[at] = -float(following[content] * deepest + depth[at])
        if counts[at]:
            following[content] = time[at]
    return key
