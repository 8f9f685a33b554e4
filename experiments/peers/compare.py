"""kvlab, libcachesim and kvcache-simulator on one trace, in one run, each by its own definition.

python experiments/peers/compare.py conversation synthetic --capacities 1000 10000 30000

Needs `pip install libcachesim kvcache-simulator`. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import libcachesim
from kvcache_sim.plan import build_execution_plan
from kvcache_sim.policies import simulate_policy
from kvcache_sim.trace import parse_trace_file

from kvlab.sim import Definitions, load_trace, simulate, write_trace
from kvlab.sim.bounds import bound

FLAT = {"fifo": "FIFO", "lru": "LRU", "lfu": "LFU", "sieve": "Sieve", "s3fifo": "S3FIFO"}
PREFIX = {"fifo": "fifo", "lru": "lru", "belady": "optimal"}


def flat_rows(trace, capacity: int):
    """Each block on its own, block hits of all requests: libcachesim's question."""
    ids = trace.ids.tolist()
    for ours, theirs in FLAT.items():
        began = perf_counter()
        mine = simulate(trace, ours, capacity, prefix=False, window_seconds=None, compiled=True)
        middle = perf_counter()
        cache = getattr(libcachesim, theirs)(cache_size=capacity, hashpower=18)
        requests = (libcachesim.Request(obj_id=i, obj_size=1) for i in ids)
        hits = sum(cache.get(request) for request in requests)
        seconds = middle - began, perf_counter() - middle
        yield "libcachesim", ours, mine.block_hit_percent, 100 * hits / len(ids), seconds


def prefix_rows(trace, plan, capacity: int):
    """Leading runs, token hits of the second half: kvcache-simulator's question."""
    half = Definitions(measured=[0.5, 1]).apply(trace)
    for ours, theirs in PREFIX.items():
        began = perf_counter()
        if ours == "belady":
            mine = bound(half, capacity, window_seconds=None)
        else:
            mine = simulate(half, ours, capacity, window_seconds=None, compiled=True)
        middle = perf_counter()
        other = simulate_policy(plan, theirs, capacity)
        seconds = middle - began, perf_counter() - middle
        percent = 100 * other.hitRate if other.measurementMode == "fixed_window" else float("nan")
        yield "kvcache-simulator", ours, mine.token_hit_percent, percent, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--capacities", nargs="+", type=int, default=[1000, 10_000, 30_000])
    options = parser.parse_args()
    print("| trace | blocks | policy | peer | kvlab, % | peer, % | kvlab, s | peer, s |")
    print("|---|---:|---|---|---:|---:|---:|---:|")
    for name in options.traces:
        trace = load_trace(name)
        with tempfile.TemporaryDirectory() as folder:
            path = write_trace(trace, Path(folder) / "trace.jsonl", plain=True)
            plan = build_execution_plan(
                parse_trace_file(str(path), block_size=trace.block_size), warmup_fraction=0.5
            )
        for capacity in options.capacities:
            for rows in (flat_rows(trace, capacity), prefix_rows(trace, plan, capacity)):
                for peer, policy, mine, other, (fast, slow) in rows:
                    cells = f"{mine:.3f} | {other:.3f} | {fast:.2f} | {slow:.2f}"
                    print(f"| {trace.name} | {capacity:,} | {policy} | {peer} | {cells} |")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
