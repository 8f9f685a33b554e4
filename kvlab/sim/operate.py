"""What an operator asks of a trace: which policy, what a tier buys, hot prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from kvlab.core import BadInput, Measurement
from kvlab.policy import asked
from kvlab.progress import paced
from kvlab.sim import bounds, fast
from kvlab.sim.curves import hit_curve
from kvlab.sim.definitions import Definitions
from kvlab.sim.jobs import about, known, listed, refuse_variants
from kvlab.sim.outcome import HIT, Outcome
from kvlab.sim.sessions import Sessions
from kvlab.sim.simulator import simulate
from kvlab.sim.trace import Trace
from kvlab.stats import Interval, ratio_interval


class Operate:
    """Miss ratios by policy with the bound, intervals over sessions, tiers, time and hot prefixes.

    traces, sessions: as in `HitRate`. policies: names; lru is always among them, belady is the
    bound. capacity_blocks: of the device, in the trace's blocks. host_multiples: what an exclusive
    host tier of so many devices would add under LRU. windows: parts of the trace's time at whose
    hit rates the middle capacity is looked at. hottest: prefixes told. resamples: of the bootstrap
    over sessions, or over requests where the trace has none.
    """

    def __init__(
        self,
        traces: Trace | Sequence[Trace],
        policies: Sequence[str] = ("lru", "arc", "s3fifo", "mq", "pgdsf", "belady"),
        capacity_blocks: Sequence[int] = (1000, 2000, 5000, 10_000, 20_000, 50_000),
        host_multiples: Sequence[float] = (1, 2, 4, 8),
        windows: int = 24,
        hottest: int = 10,
        resamples: int = 1000,
        partial_blocks: str = "hit",
        sessions: Sessions | None = None,
    ):
        if windows < 1 or hottest < 1 or resamples < 100:
            remedy = "windows and hottest must be at least 1, resamples at least 100"
            raise BadInput("windows", [windows, hottest, resamples], remedy)
        if not capacity_blocks:
            raise BadInput("capacity_blocks", [], "must name at least one capacity")
        self.definitions = Definitions(partial_blocks=partial_blocks)
        sessions = sessions or Sessions()
        self.traces = [self.definitions.apply(sessions.apply(t)) for t in listed(traces)]
        self.policies = known(["lru", *(p for p in policies if p != "lru")])
        self.capacity_blocks = sorted(capacity_blocks)
        self.host_multiples, self.windows = list(host_multiples), windows
        self.hottest, self.resamples = hottest, resamples
        self._fixed = {**self.definitions.params(), **sessions.params()}

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        steps, plan = [], []
        for trace in self.traces:
            place = about(trace) | self._fixed
            by = "sessions" if "session" in trace.columns else "requests"
            for capacity in self.capacity_blocks:
                steps.append(partial(self._policies, folder, trace, capacity,
                                     place | {"resampled": by}))  # fmt: skip
                plan.append((trace.name, f"policies, {capacity:,} blocks", trace.accesses))
            for who, what, rows in (("lru", "tiers", self._tiers), ("trace", "hottest",
                                                                    self._hottest)):  # fmt: skip
                steps.append(partial(self._once, folder, who, place, what, partial(rows, trace)))
                plan.append((trace.name, what, trace.accesses))
        for step in paced("operate", steps, plan):
            step()

    def _policies(self, folder, trace: Trace, capacity: int, place: dict) -> None:
        """Each policy at a capacity, those after LRU paired with it."""
        lru = None
        middle = self.capacity_blocks[len(self.capacity_blocks) // 2]
        for policy in self.policies:
            params = place | {"policy": policy, "capacity_blocks": capacity}
            if folder.done(policy, params):
                continue
            with folder.surviving(policy, params):
                if asked(policy).bounds:
                    rows = bounds.bound(
                        trace, capacity, True, self.definitions.replayed, window_seconds=None
                    ).measurements()[:2]
                    folder.add(policy, params, rows)
                    continue
                mine = self._hits(trace, policy, capacity)
                if lru is None:  # resumed behind it
                    lru = mine if policy == "lru" else self._hits(trace, "lru", capacity)
                folder.add(policy, params, list(self._rates(trace, policy, mine, lru)))
                if capacity == middle:
                    self._over_time(folder, trace, policy, mine, place)

    def _hits(self, trace: Trace, policy: str, capacity: int) -> np.ndarray:
        """Block hits of each request, int64 [R]."""
        hits = np.zeros(len(trace), dtype=np.int64)

        def count(piece: Trace, outcome: Outcome) -> None:
            hit = piece.request_of[outcome.code >= HIT]
            hits[:] = np.bincount(hit, minlength=len(trace))

        quick = fast.loops is not None and policy in fast.PREFIX
        rules = {"partial_blocks": self.definitions.replayed, "window_seconds": None}
        simulate(trace, policy, capacity, **rules, outcomes=count, compiled=quick)
        return hits

    def _rates(self, trace: Trace, policy: str, mine, lru) -> Iterator[Measurement]:
        asked, count = np.diff(trace.first), trace.accesses
        rate = self._interval(trace, mine, asked)
        yield Measurement("block_hit_percent", rate.value, "%", "higher", *rate[1:], count)
        if policy != "lru":
            gain = self._interval(trace, mine - lru, asked)
            yield Measurement("gain_over_lru_points", gain.value, "points", "higher", *gain[1:])

    def _interval(self, trace: Trace, part: np.ndarray, whole: np.ndarray) -> Interval:
        """100 * sum(part) / sum(whole), with its interval over sessions."""
        session = trace.columns.get("session", np.arange(len(trace)))
        session = np.where(session < 0, session.max(initial=0) + 1 + np.arange(len(trace)), session)
        _, of = np.unique(session, return_inverse=True)
        sums = [np.bincount(of, weights=values) for values in (100 * part, whole)]
        return ratio_interval(*sums, resamples=self.resamples)

    def _over_time(self, folder, trace: Trace, policy: str, hits, place: dict) -> None:
        """Hits of each window of the trace's time that has requests."""
        ms = trace.arrival_ms - trace.arrival_ms[0]
        width = max(float(ms[-1]), 1.0) / self.windows
        window = np.minimum((ms // width).astype(np.int64), self.windows - 1)
        part = np.bincount(window, weights=hits, minlength=self.windows)
        whole = np.bincount(window, weights=np.diff(trace.first), minlength=self.windows)
        for at in np.flatnonzero(whole).tolist():
            seconds = round((at + 0.5) * width / 1e3, 3)
            row = Measurement("window_hit_percent", 100 * part[at] / whole[at], "%", "higher")
            folder.add(policy, place | {"policy": policy, "window_seconds": seconds}, [row])

    def _once(self, folder, variant: str, place: dict, what: str, rows) -> None:
        done = place | {"part": what}
        if folder.done(variant, done):
            return
        with folder.surviving(variant, done):
            count = 0
            for params, row in rows():
                folder.add(variant, place | params, [row])
                count += 1
            folder.add(variant, done, [Measurement(f"{what}_told", count, "rows")])

    def _tiers(self, trace: Trace) -> Iterator[tuple[dict, Measurement]]:
        """Exclusive LRU tiers are one LRU list, so one pass over the trace prices all of them."""
        capacities, hits = hit_curve(trace, self.definitions.replayed)
        rate = 100 * hits / max(trace.accesses, 1)
        for capacity in self.capacity_blocks:
            if capacity < capacities[0]:
                continue  # the longest request is refused there, which no curve can tell
            for multiple in (0, *self.host_multiples):
                whole = min(round(capacity * (1 + multiple)), int(capacities[-1]))
                params = {"capacity_blocks": capacity, "host_blocks": round(capacity * multiple)}
                value = float(rate[max(whole - capacities[0], 0)])
                yield params, Measurement("tier_hit_percent", value, "%", "higher")

    def _hottest(self, trace: Trace) -> Iterator[tuple[dict, Measurement]]:
        """Stretches of prefixes by the hits that an unbounded cache would have of them."""
        total = int(np.count_nonzero(trace.previous >= 0))
        for rank, hot in enumerate(hot_prefixes(trace, self.hottest), 1):
            params = {"rank": rank, **hot._asdict()}
            share = 100 * hot.blocks * (hot.requests - 1) / max(total, 1)
            yield params, Measurement("prefix_hits_percent", share, "%")


class Hot(NamedTuple):
    """A stretch of blocks that the same requests share: where it begins, how long, how many."""

    first_block: int
    blocks: int
    requests: int
    last_id: int


def hot_prefixes(trace: Trace, count: int) -> list[Hot]:
    """The stretches of the prefix tree that save most blocks, the most first."""
    trace.check_prefix_chained()
    ids, distinct = trace.dense
    uses = np.bincount(ids, minlength=distinct)
    new = np.flatnonzero(trace.previous < 0)  # each block once, parents before children
    head, stretch = {}, {}
    for at in new.tolist():
        block, depth = int(ids[at]), int(trace.depth[at])
        above = int(ids[at - 1]) if depth else -1
        if depth and uses[above] == uses[block]:
            head[block] = top = head[above]
            stretch[top][1] += 1
            stretch[top][2] = int(trace.ids[at])
        else:
            head[block] = block
            stretch[block] = [depth, 1, int(trace.ids[at]), int(uses[block])]
    best = sorted(stretch.values(), key=lambda s: s[1] * (1 - s[3]))[:count]
    return [Hot(depth, blocks, n, last) for depth, blocks, last, n in best if n > 1]
