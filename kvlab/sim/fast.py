"""Compiled replay: the results of the policy objects, about a hundred times as fast.

Needs numba (`pip install "kvlab[fast]"`). Covers flat FIFO, LRU, LFU, SIEVE and S3-FIFO with their
default parameters, and prefix-correct LRU.
"""

from __future__ import annotations

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.outcome import MISS, Outcome
from kvlab.sim.trace import Trace

try:
    from kvlab.sim import loops
except ModuleNotFoundError:  # numba is an optional extra
    loops = None

FLAT = ("fifo", "lru", "lfu", "sieve", "s3fifo")
PREFIX = ("lru",)
LARGEST_ID = 1 << 31


class Compiled:
    """Runs pieces of a trace; tables grow with the largest id, 16 to 24 bytes a distinct block."""

    def __init__(self, policy: str, capacity: int, prefix: bool, partial_misses: bool = False):
        _check(policy, prefix)
        self.loop = getattr(loops, ("prefix_" if prefix else "") + policy)
        self.partial_misses = partial_misses
        self.prefix = prefix
        self.book = np.zeros(8, dtype=np.int64)
        self.book[loops.CAPACITY] = capacity
        self.tables = [np.zeros(0, dtype=np.int32) for _ in range(4)]
        self.by_uses = policy == "lfu"

    def run(self, piece: Trace) -> Outcome:
        if self.prefix:
            piece.check_prefix_chained()
        self._grow(piece)
        code = np.full(piece.accesses, MISS, dtype=np.uint8)
        evicted = np.empty((2, piece.accesses), dtype=np.int64)
        partial = self.partial_misses & piece.partial
        tables = tuple(self.tables)
        count = self.loop(piece.ids, piece.first, partial, tables, self.book, code, *evicted)
        return Outcome(code, evicted[0, :count], evicted[1, :count])

    def more(self) -> dict:
        return {}

    def _grow(self, piece: Trace) -> None:
        """Tables up to the largest id, all lists empty: each end is its own neighbour."""
        low, high = int(piece.ids.min(initial=0)), int(piece.ids.max(initial=0))
        if low < 0 or high >= LARGEST_ID:
            raise BadInput(
                "compiled", True, f"a stream's block ids must lie in 0..{LARGEST_ID - 1}"
            )
        have, want = len(self.tables[0]), high + 1 + loops.NODES
        if self.by_uses:  # LFU's lists interleave with blocks: up to the most hits there can be
            want = max(want, int(self.tables[3].max(initial=0)) + piece.accesses + 2)
        if want > have:
            want = max(want, have + have // 2)
            links = 2 * want if self.by_uses else want
            sizes = (want, links, links, want)
            self.tables = [_longer(table, size) for table, size in zip(self.tables, sizes)]
            begin, end = (2 * have, links) if self.by_uses else (0, 0 if have else loops.NODES)
            self.tables[1][begin:end] = self.tables[2][begin:end] = np.arange(begin, end)


def _longer(table: np.ndarray, size: int) -> np.ndarray:
    longer = np.zeros(size, dtype=table.dtype)
    longer[: len(table)] = table
    return longer


def _check(policy: str, prefix: bool) -> None:
    if loops is None:
        raise BadInput("compiled", True, 'needs numba: pip install "kvlab[fast]"')
    known = PREFIX if prefix else FLAT
    if policy not in known:
        kind = "prefix-correct" if prefix else "flat"
        raise BadInput("policy", policy, f"compiled {kind} replay knows: {', '.join(known)}")
