"""What a trace is like, whatever the policy: working sets, reuse, the hit curve; and their job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from kvlab.core import Measurement
from kvlab.sim.bounds import bound, smallest_ideal_capacity
from kvlab.sim.curves import hit_curve, stack_distances, weighted_curve
from kvlab.sim.jobs import about, listed, refuse_variants
from kvlab.sim.trace import Trace


class Reuse(NamedTuple):
    """Of each access to a block seen before: how many blocks of room a hit needs (LRU), and how
    long ago the last access was, in ms. Arrays of the same length."""

    distance_blocks: np.ndarray
    age_ms: np.ndarray


def reuse(trace: Trace) -> Reuse:
    distance = stack_distances(trace)
    again = np.flatnonzero(trace.previous >= 0)
    time = trace.arrival_ms[trace.request_of]
    return Reuse(distance[again], time[again] - time[trace.previous[again]])


def working_set(trace: Trace, window_seconds: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    """(start of each window in seconds, different blocks that it asks for), windows without
    requests included."""
    if not trace.accesses:
        return np.empty(0), np.empty(0, dtype=np.int64)
    ids, count = trace.dense
    start = trace.arrival_ms[0]
    window = ((trace.arrival_ms - start) // (1e3 * window_seconds)).astype(np.int64)
    pairs = np.unique(window[trace.request_of] * count + ids)
    blocks = np.bincount(pairs // count, minlength=window.max() + 1)
    return start / 1e3 + window_seconds * np.arange(len(blocks)), blocks


class HitCurve:
    """The whole LRU curve of each trace in one pass, the bound beside it, and what reuse is like.

    multiples: block sizes to ask about, in blocks of the trace (coarser ones follow exactly).
    points: capacities, evenly spaced on a log scale, at which rows are written; the whole curve is
    in the run's arrays. window_seconds: of the working set.
    """

    def __init__(
        self,
        traces: Trace | Sequence[Trace],
        multiples: Sequence[int] = (1, 2, 4),
        points: int = 24,
        partial_blocks: str = "hit",
        window_seconds: float = 60.0,
    ):
        self.traces, self.multiples, self.points = listed(traces), list(multiples), points
        self.partial_blocks, self.window_seconds = partial_blocks, window_seconds

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        for trace in self.traces:
            for multiple in self.multiples:
                self._curve(folder, trace.coarser(multiple))
            self._facts(folder, trace)

    def _curve(self, folder, trace: Trace) -> None:
        began = perf_counter()
        capacities, hits = hit_curve(trace, self.partial_blocks)
        seconds = perf_counter() - began
        _, tokens = weighted_curve(trace, trace.block_tokens, self.partial_blocks)
        name = f"curve_{trace.name}_{trace.block_size}"
        folder.arrays(_file_name(name), capacities=capacities, block_hits=hits)
        fixed = {**about(trace), "partial_blocks": self.partial_blocks}
        folder.add("lru", fixed, [Measurement("curve_seconds", seconds, "s", "lower")])
        at = np.geomspace(capacities[0], capacities[-1], self.points).astype(int)
        for capacity in sorted(set(at.tolist())):
            params = fixed | {"capacity_blocks": capacity}
            params["capacity_tokens"] = capacity * trace.block_size
            at_capacity = capacity - capacities[0]
            shares = (hits[at_capacity] / trace.accesses, tokens[at_capacity] / trace.tokens)
            folder.add("lru", params, _percents(shares))
            if not folder.done("belady", params):
                best = bound(trace, capacity, True, self.partial_blocks, window_seconds=None)
                shares = (best.block_hits / trace.accesses, best.token_hits / trace.tokens)
                folder.add("belady", params, _percents(shares))

    def _facts(self, folder, trace: Trace) -> None:
        again, (_, blocks) = reuse(trace), working_set(trace, self.window_seconds)
        name = _file_name(f"reuse_{trace.name}")
        folder.arrays(name, **again._asdict(), working_set_blocks=blocks)
        facts = {
            "working_set_blocks": (blocks.mean(), "blocks"),
            "working_set_peak_blocks": (blocks.max(), "blocks"),
            "smallest_ideal_capacity_blocks": (smallest_ideal_capacity(trace), "blocks"),
            "unbounded_block_hit_percent": (100 * len(again.age_ms) / trace.accesses, "%"),
        }
        if len(again.age_ms):
            distance, age = (float(np.median(values)) for values in again)
            facts["reuse_distance_median_blocks"] = (distance, "blocks")
            facts["reuse_age_median_seconds"] = (age / 1e3, "s")
        rows = [Measurement(name, float(value), unit) for name, (value, unit) in facts.items()]
        folder.add("trace", about(trace) | {"window_seconds": self.window_seconds}, rows)


def _percents(shares: tuple[float, float]) -> list[Measurement]:
    names = ("block_hit_percent", "token_hit_percent")
    return [Measurement(n, 100 * float(share), "%", "higher") for n, share in zip(names, shares)]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)
