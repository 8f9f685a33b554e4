"""What a trace is like, whatever the policy: working sets, reuse, the hit curve; and their job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from time import perf_counter
from typing import NamedTuple

import numpy as np

from kvlab.core import Measurement
from kvlab.progress import paced
from kvlab.sim import bounds
from kvlab.sim.curves import hit_curve, partial_access, stack_distances, weighted_curve
from kvlab.sim.definitions import Definitions
from kvlab.sim.jobs import about, listed, refuse_variants
from kvlab.sim.sessions import Sessions
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
    in the run's arrays. window_seconds: of the working set. partial_blocks, measured, outputs,
    first_requests, common_head: as in `Definitions`; the bound is left out where not all count.
    sessions: as in `Sessions`; null: as recorded.
    """

    def __init__(
        self,
        traces: Trace | Sequence[Trace],
        multiples: Sequence[int] = (1, 2, 4),
        points: int = 24,
        partial_blocks: str = "hit",
        window_seconds: float = 60.0,
        measured: Sequence[float] = (0.0, 1.0),
        outputs: str = "dropped",
        first_requests: str = "counted",
        sessions: Sessions | None = None,
        common_head: str = "counted",
    ):
        sessions = sessions or Sessions()
        self.traces = [sessions.apply(trace) for trace in listed(traces)]
        self.multiples, self.points = list(multiples), points
        self.definitions = Definitions(
            partial_blocks, measured, outputs, first_requests, common_head
        )
        self.window_seconds = window_seconds
        self._fixed = {**self.definitions.params(), **sessions.params()}

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        steps = list(product(self.traces, [*self.multiples, None]))
        plan = [(trace.name, f"curve, blocks x {multiple}" if multiple else "facts",
                 trace.accesses / (multiple or 1)) for trace, multiple in steps]  # fmt: skip
        for trace, multiple in paced("hit_curve", steps, plan):
            if multiple is None:
                self._facts(folder, self.definitions.apply(trace))
            else:
                self._curve(folder, self.definitions.apply(trace.coarser(multiple)))

    def _curve(self, folder, trace: Trace) -> None:
        began, partial = perf_counter(), self.definitions.replayed
        capacities, hits = hit_curve(trace, partial)
        seconds = perf_counter() - began
        _, tokens = weighted_curve(trace, trace.block_tokens, partial)
        accesses, asked = counted_totals(trace)
        name = f"curve_{trace.name}_{trace.block_size}"
        folder.arrays(file_name(name), capacities=capacities, block_hits=hits)
        fixed = {**about(trace), **self._fixed}
        folder.add("lru", fixed, [Measurement("curve_seconds", seconds, "s", "lower")])
        at = np.geomspace(capacities[0], capacities[-1], self.points).astype(int)
        for capacity in sorted(set(at.tolist())):
            params = fixed | {"capacity_blocks": capacity}
            params["capacity_tokens"] = capacity * trace.block_size
            at_capacity = capacity - capacities[0]
            shares = (hits[at_capacity] / accesses, tokens[at_capacity] / asked)
            folder.add("lru", params, _percents(shares))
            if self.definitions.counts_all and not folder.done(bounds.NAME, params):
                best = bounds.bound(trace, capacity, True, partial, window_seconds=None)
                shares = (best.block_hits / accesses, best.token_hits / asked)
                folder.add(bounds.NAME, params, _percents(shares))

    def _facts(self, folder, trace: Trace) -> None:
        again, (_, blocks) = reuse(trace), working_set(trace, self.window_seconds)
        name = file_name(f"reuse_{trace.name}")
        folder.arrays(name, **again._asdict(), working_set_blocks=blocks)
        facts = {
            "working_set_blocks": (blocks.mean(), "blocks"),
            "working_set_peak_blocks": (blocks.max(), "blocks"),
            "smallest_ideal_capacity_blocks": (bounds.smallest_ideal_capacity(trace), "blocks"),
            "unbounded_block_hit_percent": (self._unbounded(trace), "%"),
        }
        if len(again.age_ms):
            distance, age = (float(np.median(values)) for values in again)
            facts["reuse_distance_median_blocks"] = (distance, "blocks")
            facts["reuse_age_median_seconds"] = (age / 1e3, "s")
        rows = [Measurement(name, float(value), unit) for name, (value, unit) in facts.items()]
        params = about(trace) | {"window_seconds": self.window_seconds}
        folder.add("trace", params | self._fixed, rows)

    def _unbounded(self, trace: Trace) -> float:
        hits = trace.previous >= 0
        if self.definitions.replayed == "miss":
            hits &= ~partial_access(trace)
        mask = slice(None) if trace.counted is None else trace.counted
        return 100.0 * np.count_nonzero(hits[mask]) / counted_totals(trace)[0]


def counted_totals(trace: Trace) -> tuple[int, int]:
    """(block accesses, prompt tokens) that rates are of."""
    accesses = trace.accesses if trace.counted is None else np.count_nonzero(trace.counted)
    return int(accesses), int(sum(part.sum() for part in trace.counted_tokens))


def _percents(shares: tuple[float, float]) -> list[Measurement]:
    names = ("block_hit_percent", "token_hit_percent")
    return [Measurement(n, 100 * float(share), "%", "higher") for n, share in zip(names, shares)]


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)
