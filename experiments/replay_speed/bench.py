"""Compiled prefix-correct replay: accesses a second, a long stream, a sweep.

    python experiments/replay_speed/bench.py [--policies lru ...] [--capacity 10000]
    python experiments/replay_speed/bench.py --stream 94000000 [--policies lru]
    python experiments/replay_speed/bench.py --sweep 94000000 [--jobs 2]

CPU time, best of `--rounds`. `loop` is the compiled loop alone, `simulate` the call as a user makes
it, with the sums of the result, `bare` an `OrderedDict` LRU over the same accesses in the same
round, `libcachesim` (PyPI, if there) its own C loop, each block on its own.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from time import process_time

import numpy as np

from kvlab.sim import Trace, load_trace, simulate, sweep
from kvlab.sim.fast import PREFIX, Compiled
from kvlab.sim.service import recompute_cost
from kvlab.sim.simulator import hittable
from kvlab.sim.sizes import shape_by_name

PEERS = {"lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "sieve": "Sieve", "s3fifo": "S3FIFO",
         "arc": "ARC", "gdsf": "GDSF"}  # fmt: skip
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
TEN = ["fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "mq", "gdsf", "pgdsf", "hybrid"]


def bare(ids: list[int], capacity: int) -> float:
    """Seconds of the least that an LRU in Python can do."""
    held, began = OrderedDict(), process_time()
    for content in ids:
        if content in held:
            held.move_to_end(content)
        else:
            if len(held) >= capacity:
                held.popitem(False)
            held[content] = None
    return process_time() - began


def loop(trace: Trace, policy: str, capacity: int) -> float:
    cost = recompute_cost(shape_by_name("llama-3.1-8b"), trace.block_size)
    runner = Compiled(policy, capacity, True, cost=cost, whole=True)
    if policy == "belady":
        runner.foresee(trace, hittable(trace, capacity, "hit"))
    began = process_time()
    runner.run(trace)
    return process_time() - began


def whole(trace: Trace, policy: str, capacity: int) -> float:
    began = process_time()
    simulate(trace, policy, capacity, compiled=True)
    return process_time() - began


def theirs(file: Path, policy: str, capacity: int) -> float:
    import libcachesim as lcs

    cache = getattr(lcs, PEERS[policy])(cache_size=capacity, hashpower=18)
    parameters = lcs.ReaderInitParam(ignore_obj_size=True)
    reader = lcs.TraceReader(str(file), lcs.TraceType.ORACLE_GENERAL_TRACE, parameters)
    began = process_time()
    cache.process_trace(reader)
    return process_time() - began


def table(trace: Trace, policies: list[str], capacity: int, rounds: int, file: Path) -> None:
    ids, million = trace.ids.tolist(), trace.accesses / 1e6
    print("| policy | loop M/s | simulate M/s | bare M/s | loop / bare | libcachesim M/s |")
    print("|---|---:|---:|---:|---:|---:|")
    for policy in policies:
        loop(trace, policy, capacity)  # compiles, or loads what was compiled
        least = [1e9] * 4
        for _ in range(rounds):
            now = [loop(trace, policy, capacity), whole(trace, policy, capacity),
                   bare(ids, capacity)]  # fmt: skip
            if policy in PEERS and file.exists():
                now.append(theirs(file, policy, capacity))
            least = [min(pair) for pair in zip(least, [*now, 1e9])]
        ours, call, python, peer = (million / seconds for seconds in least[:4])
        print(f"| {policy} | {ours:.1f} | {call:.1f} | {python:.1f} | {ours / python:.1f} | "
              + (f"{peer:.1f} |" if policy in PEERS and file.exists() else "|"), flush=True)


class Stream:
    """Sessions that grow turn by turn, as those of coding agents do, made piece by piece: 64 at a
    time, prompts of up to 3,800 blocks of 64 tokens, most of them known from the turn before."""

    name, block_size = "made", 64

    def __init__(self, accesses: int, piece: int = 1 << 20):
        self.accesses, self.piece = accesses, piece

    def pieces(self):
        draw, fresh, made, now = np.random.default_rng(0), 0, 0, 0.0
        live: list[list[np.ndarray]] = [[] for _ in range(64)]
        while made < self.accesses:
            rows, size = [], 0
            while size < self.piece and made + size < self.accesses:
                session = live[draw.integers(64)]
                new = int(draw.integers(40, 120))
                session.append(np.arange(fresh, fresh + new))
                fresh += new
                rows.append(np.concatenate(session))
                size += len(rows[-1])
                if len(rows[-1]) > 3700:
                    session.clear()
            yield self._piece(rows, now)
            now, made = now + 100.0 * len(rows), made + size

    def _piece(self, rows: list[np.ndarray], now: float) -> Trace:
        length = np.array([len(row) for row in rows])
        first = np.concatenate([[0], np.cumsum(length)])
        ms = now + 100.0 * np.arange(len(rows))
        outputs = np.zeros(len(rows), dtype=np.int64)
        return Trace("made", 64, ms, 64 * length, outputs, first, np.concatenate(rows))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def stream(accesses: int, policies: list[str], capacity: int) -> None:
    began = process_time()
    count = sum(piece.accesses for piece in Stream(accesses).pieces())
    making = process_time() - began
    for policy in policies:
        simulate(Stream(1 << 16), policy, capacity, compiled=True)
        began, wall = process_time(), time.perf_counter()
        result = simulate(Stream(accesses), policy, capacity, compiled=True)
        seconds, wall = process_time() - began, time.perf_counter() - wall
        print(f"{policy}: {count:,} references, {seconds:.1f} s CPU ({wall:.1f} s wall), of these "
              f"{making:.1f} s to make them; hits {result.block_hit_percent:.2f} %, "
              f"peak {peak_gb():.2f} GB", flush=True)  # fmt: skip


def swept(accesses: int, jobs: int, capacities: list[int]) -> None:
    wall, cpu = time.perf_counter(), process_time()
    for result in sweep(Stream(accesses), TEN, capacities, jobs=jobs, compiled=True):
        print(f"{result.policy:8} {result.capacity_blocks:>8} {result.block_hit_percent:6.2f} % at "
              f"{time.perf_counter() - wall:5.0f} s wall, {process_time() - cpu:5.0f} s CPU, "
              f"{peak_gb():.2f} GB", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="conversation")
    parser.add_argument("--policies", nargs="+", default=list(PREFIX))
    parser.add_argument("--capacity", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, default=0, help="references of a long stream")
    parser.add_argument("--sweep", type=int, default=0, help="references of a stream to sweep over")
    parser.add_argument("--capacities", type=int, nargs="+",
                        default=np.geomspace(4_000, 800_000, 12).astype(int).tolist())  # fmt: skip
    parser.add_argument("--jobs", type=int, default=-1)
    options = parser.parse_args()
    if options.stream:
        stream(options.stream, options.policies, options.capacity)
    elif options.sweep:
        swept(options.sweep, options.jobs, options.capacities)
    else:
        trace = load_trace(options.trace)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.bin"
            try:
                import libcachesim  # noqa: F401

                rows = np.zeros(trace.accesses, dtype=RECORD)
                rows["id"], rows["size"], rows["next"] = trace.ids, 1, -1
                rows.tofile(file)
            except ModuleNotFoundError:
                print("without libcachesim, which is not installed")
            table(replace(trace), options.policies, options.capacity, options.rounds, file)


if __name__ == "__main__":
    main()
