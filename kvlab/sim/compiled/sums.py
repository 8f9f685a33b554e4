"""The sums of a result, in one pass over what a compiled replay left behind."""

from __future__ import annotations

import numpy as np

from kvlab.sim.compiled.bind import cached
from kvlab.sim.compiled.state import FIRST_CONTENT
from kvlab.sim.outcome import DEEP_HIT, HIT, MISS, REFUSED, Tally, Told
from kvlab.sim.trace import Trace

KNOWN, COMPULSORY, REFUSED_REQUESTS, THRASHED, CODES = range(5)  # of the counters


class CompiledTally(Tally):
    """`Tally` of prefix-correct replay, where the hits of a request are one run. `told` gives it
    the contents by number, which the runner has anyway; 8 bytes a content, for thrash."""

    def __init__(self, shape, window_seconds, runner):
        super().__init__(shape, window_seconds)
        self._runner, self._known = runner, FIRST_CONTENT
        self._gone_ms = np.zeros(0)

    def _count(self, piece: Trace, outcome) -> Told:
        numbers, gone = self._runner.last
        counters = np.zeros(CODES + DEEP_HIT + 1, dtype=np.int64)
        counters[KNOWN] = self._known
        window = -1.0 if self.window_ms is None else self.window_ms
        if self.window_ms is not None and len(self._gone_ms) < self._runner.contents:
            more = max(self._runner.contents, len(self._gone_ms) * 3 // 2) - len(self._gone_ms)
            self._gone_ms = np.concatenate([self._gone_ms, np.full(more, -np.inf)])
        begin, hits, blocks = np.zeros((3, len(piece)), dtype=np.int64)
        _sum(
            outcome.code, numbers, piece.first, piece.arrival_ms, *_counted(piece), gone,
            outcome.evicted_at, self._gone_ms, window, counters, begin, hits, blocks,
        )  # fmt: skip
        self._known = int(counters[KNOWN])
        some = np.flatnonzero(hits)
        size = piece.block_size
        ends = np.minimum((begin + hits)[some] * size, piece.input_tokens[some])
        return Told(
            counters[CODES:], int(counters[COMPULSORY]), int(counters[REFUSED_REQUESTS]),
            int(counters[THRASHED]), hits, blocks, begin[some] * size, ends,
        )  # fmt: skip


def _counted(piece: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which requests count, and of which depth to which: arrays [R]."""
    length, column = np.diff(piece.first), piece.columns.get
    counted = column("counted", np.ones(len(piece), dtype=bool))
    lowest = column("skipped_blocks", np.zeros(len(piece), dtype=np.int64))
    return counted, lowest, np.minimum(length, column("prompt_blocks", length))


@cached
def _sum(
    code, numbers, first, ms, counted, lowest, highest, gone, gone_at, gone_ms, window, counters,
    begin, hits, blocks,
):  # fmt: skip
    """begin, hits, blocks [R]: depth of the first hit that counts, how many do, and how many
    accesses do."""
    known, left = counters[KNOWN], 0
    for request in range(len(first) - 1):
        start, end = first[request], first[request + 1]
        low, high = start + lowest[request], start + highest[request]
        if not counted[request]:
            high = low = end
        while window >= 0 and left < len(gone) and gone_at[left] < end:
            gone_ms[gone[left]] = ms[request]
            left += 1
        refused = False
        for access in range(start, end):
            what, number = code[access], numbers[access]
            new = number == known
            known += new
            if what == MISS and window >= 0:
                counters[THRASHED] += ms[request] - gone_ms[number] <= window
                gone_ms[number] = -np.inf
            if low <= access < high:
                blocks[request] += 1
                counters[CODES + what] += 1
                counters[COMPULSORY] += new and what == MISS
                refused |= what == REFUSED
                if what >= HIT:
                    if not hits[request]:
                        begin[request] = access - start
                    hits[request] += 1
        counters[REFUSED_REQUESTS] += refused
    counters[KNOWN] = known
