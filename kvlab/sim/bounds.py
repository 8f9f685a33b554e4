"""The most blocks that any policy can hit: flat, and what an engine can reach.

Flat Belady (1966, https://doi.org/10.1147/sj.52.0078) evicts the block wanted again last. An engine
cannot follow it: the running request is pinned and must come in whole, and a block without its
parent hits nothing. `bound(..., prefix=True)` is the optimum under those rules: the unpinned block
wanted last leaves, of equals the deeper one; a child is never wanted before its parent, so
only leaves go. A bound on block hits; not on hits weighted by tokens or FLOPs.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from kvlab.policy import Belady
from kvlab.sim.curves import not_hittable, partial_access
from kvlab.sim.outcome import HIT, MISS, PARTIAL, REFUSED, Outcome, Tally
from kvlab.sim.result import SimResult
from kvlab.sim.sizes import ModelShape, shape_by_name
from kvlab.sim.trace import Trace

NAME = Belady.name  # of its rows


def bound(
    trace: Trace,
    capacity_blocks: int,
    prefix: bool = True,
    partial_blocks: str = "hit",
    *,
    shape: str | dict | ModelShape = "llama-3.1-8b",
    window_seconds: float | None = 60.0,
) -> SimResult:
    """The best that a policy could do on this trace, as a simulation result named `NAME`."""
    trace.check_shares()
    misses, tally = not_hittable(partial_blocks), Tally(shape_by_name(shape), window_seconds)
    if prefix:
        trace.check_prefix_chained()
        outcome = _without_refused(trace, capacity_blocks, misses)
    else:
        outcome = _Flat(trace).outcome(capacity_blocks)
    tally.add(trace, outcome)
    return SimResult.of(tally, NAME, capacity_blocks, trace.block_size)


def _without_refused(trace: Trace, capacity: int, partial_misses: bool) -> Outcome:
    """The bound over the requests that fit: uses by a refused request are worth nothing."""
    fits = np.diff(trace.first) <= capacity
    kept = np.flatnonzero(fits[trace.request_of])
    code = np.full(trace.accesses, REFUSED, dtype=np.uint8)
    inner = _Reachable(trace.select(fits), partial_misses).outcome(capacity)
    code[kept] = inner.code
    return Outcome(code, inner.evicted, kept[inner.evicted_at])


def smallest_ideal_capacity(trace: Trace) -> int:
    """Blocks from which on the bound hits as often as an unbounded cache: at each request, its own
    blocks and those that an earlier request used and a later one wants."""
    trace.check_prefix_chained()
    last = np.full(trace.dense[1], -1)
    last[trace.dense[0]] = trace.request_of
    begins = trace.request_of[trace.previous < 0]
    ends = last[trace.dense[0][trace.previous < 0]]
    live = np.zeros(len(trace) + 1, dtype=np.int64)
    np.add.at(live, begins, 1)
    np.add.at(live, ends + 1, -1)
    return int(np.cumsum(live).max(initial=0))


def next_use(trace: Trace) -> np.ndarray:
    """Access index at which the block of each access is wanted again, A if never; int64 [A]."""
    following = np.full(trace.accesses, trace.accesses)
    again = np.flatnonzero(trace.previous >= 0)
    following[trace.previous[again]] = again
    return following


class _Flat:
    """Each block on its own: the heap holds (minus next use, block), stale entries included."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.next = next_use(trace).tolist()

    def outcome(self, capacity: int) -> Outcome:
        wanted: dict[int, int] = {}  # resident block -> its next use
        heap, missed, evicted = [], [], []
        for at, (content, following) in enumerate(zip(self.trace.ids.tolist(), self.next)):
            if content not in wanted:
                missed.append(at)
                if len(wanted) == capacity:
                    evicted.append((_farthest(heap, wanted), at))
            wanted[content] = following
            heappush(heap, (-following, content))
        code = np.full(self.trace.accesses, HIT, dtype=np.uint8)
        code[missed] = MISS
        return _outcome(code, evicted)


class _Reachable:
    """Requests as units. Blocks of one request share its next uses, so heap entries are
    (minus next request, minus depth, block); those of the running request enter after it."""

    def __init__(self, trace: Trace, partial_misses: bool):
        self.trace = trace
        self.never_hits = partial_misses & partial_access(trace)
        following = np.append(next_use(trace), trace.accesses)
        never = np.append(self.never_hits, False)
        for at in np.flatnonzero(never[following])[::-1]:  # uses that cannot hit do not count
            following[at] = following[following[at]]
        self.next = np.append(trace.request_of, len(trace))[following[:-1]].tolist()

    def outcome(self, capacity: int) -> Outcome:
        trace, first = self.trace, self.trace.first.tolist()
        wanted: dict[int, int] = {}
        heap, evicted = [], []
        code = np.full(trace.accesses, HIT, dtype=np.uint8)
        for begin, end, contents in zip(first, first[1:], trace.requests()):
            run = next((i for i, c in enumerate(contents) if c not in wanted), end - begin)
            code[begin + run : end] = MISS
            wanted.update(dict.fromkeys(contents, -1))  # pinned: their entries in the heap go stale
            while len(wanted) > capacity:
                evicted.append((_farthest(heap, wanted), begin))
            for at, content in enumerate(contents, begin):
                wanted[content] = self.next[at]
                heappush(heap, (-self.next[at], begin - at, content))
        code[self.never_hits & (code == HIT)] = PARTIAL
        return _outcome(code, evicted)


def _farthest(heap: list[tuple], wanted: dict[int, int]) -> int:
    """Evict the block with the last next use, dropping entries that are no longer true."""
    while True:
        entry = heappop(heap)
        if wanted.get(entry[-1]) == -entry[0]:
            del wanted[entry[-1]]
            return entry[-1]


def _outcome(code: np.ndarray, evicted: list[tuple[int, int]]) -> Outcome:
    pairs = np.array(evicted, dtype=np.int64).reshape(-1, 2)
    return Outcome(code, pairs[:, 0], pairs[:, 1])
