"""Block accesses per second of the simulator, libcachesim beside it.

    python experiments/sim_speed/bench.py [--trace conversation] [--capacity 1000 10000 30000]
    python experiments/sim_speed/bench.py --stream ACCESSES     # a long trace in bounded memory

Flat accounting, blocks of size 1, CPU time, best of `--repeats` runs. `objects` is the ordinary
path through ledger and policy objects, `compiled` the numba loops; both are `simulate(...)` as a
user calls it, without the thrash window, loading of the trace left out. libcachesim (PyPI) runs its
own C loop over the same accesses in its binary format (`process_trace`, hashpower=18, which suits a
trace of this length better than its default of 24).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from time import process_time

import numpy as np

from kvlab.sim import Trace, TraceStream, fast, hit_curve, load_trace, simulate

PEERS = {"lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "sieve": "Sieve", "s3fifo": "S3FIFO"}
# libcachesim's oracleGeneral record: time, id, size, next use
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])


def best(run, repeats: int) -> tuple[object, float]:
    """Result and the shortest time of several runs, in seconds."""
    times, result = [], None
    for _ in range(repeats):
        began = process_time()
        result = run()
        times.append(process_time() - began)
    return result, min(times)


def ours(trace: Trace, policy: str, capacity: int, compiled: bool, repeats: int):
    def run():
        how = {"prefix": False, "window_seconds": None, "compiled": compiled}
        return simulate(trace, policy, capacity, **how).block_hits

    run() if compiled else None  # numba compiles, or loads what it compiled
    return best(run, repeats)


def theirs(trace: Trace, policy: str, capacity: int, repeats: int, file: Path):
    import libcachesim as lcs

    def run():
        cache = getattr(lcs, PEERS[policy])(cache_size=capacity, hashpower=18)
        reader = lcs.TraceReader(str(file), lcs.TraceType.ORACLE_GENERAL_TRACE, parameters)
        began = process_time()
        miss_ratio, _ = cache.process_trace(reader)
        times.append(process_time() - began)
        return round((1 - miss_ratio) * trace.accesses)

    parameters = lcs.ReaderInitParam(ignore_obj_size=True)
    times: list[float] = []
    result, _ = best(run, repeats)
    return result, min(times)


def record(trace: Trace, file: Path) -> None:
    rows = np.zeros(trace.accesses, dtype=RECORD)
    rows["id"], rows["size"], rows["next"] = trace.ids, 1, -1
    rows.tofile(file)


def table(trace: Trace, policies: list[str], capacities: list[int], repeats: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.bin"
        record(trace, file)
        for policy in policies:
            for capacity in capacities:
                found = {"objects": ours(trace, policy, capacity, False, repeats)}
                if fast.loops:
                    found["compiled"] = ours(trace, policy, capacity, True, repeats)
                found["libcachesim"] = theirs(trace, policy, capacity, repeats, file)
                rows.append(line(trace, policy, capacity, found))
    return rows


def line(trace: Trace, policy: str, capacity: int, found: dict) -> dict:
    rates = {how: trace.accesses / seconds / 1e6 for how, (_, seconds) in found.items()}
    hits = {how: count for how, (count, _) in found.items()}
    text = "   ".join(f"{how} {hits[how]:>6} {rate:7.2f}" for how, rate in rates.items())
    print(f"{trace.name:13}{policy:7}{capacity:7}   {text}", flush=True)
    return {"trace": trace.name, "policy": policy, "capacity": capacity, "hits": hits,
            "million_accesses_per_second": rates}  # fmt: skip


def curve(trace: Trace, repeats: int) -> dict:
    """The whole prefix-correct LRU curve, nothing kept from one run to the next."""
    _, seconds = best(lambda: hit_curve(replace(trace)), repeats)
    print(f"{trace.name}: the whole curve, {trace.accesses:,} accesses, {1e3 * seconds:.1f} ms")
    return {"trace": trace.name, "curve_ms": 1e3 * seconds}


def stream(accesses: int, compiled: bool) -> dict:
    """Write a long trace, then read and simulate it piece by piece; peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.jsonl"
        _long_trace(file, accesses)
        megabytes = file.stat().st_size / 1e6
        began = process_time()
        how = {"prefix": False, "compiled": compiled}
        result = simulate(TraceStream(file), "lru", 100_000, **how)
        seconds = process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    path = "compiled" if compiled else "objects"
    print(f"{path}: {result.block_accesses:,} accesses, {megabytes:,.0f} MB JSON, {seconds:.0f} s"
          f" with reading, hits {result.block_hit_percent:.2f} %, peak {peak:.2f} GB")  # fmt: skip
    return {"path": path, "accesses": result.block_accesses, "seconds": seconds, "peak_gb": peak}


def _long_trace(file: Path, accesses: int, blocks: int = 100) -> None:
    """Requests of `blocks` blocks that go on where one of the last 1,000 prompts stopped half-way,
    and so are half new: ids grow with the trace."""
    draw, fresh, prompts = np.random.default_rng(0), 0, []
    with file.open("w") as out:
        for i in range(-(-accesses // blocks)):
            kept = prompts[draw.integers(len(prompts))][: blocks // 2] if prompts else []
            ids = kept + list(range(fresh, fresh + blocks - len(kept)))
            fresh = ids[-1] + 1
            prompts = [*prompts[-999:], ids]
            row = {"timestamp": i, "input_length": 512 * blocks, "output_length": 1}
            out.write(json.dumps({**row, "hash_ids": ids}) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", nargs="+", default=["conversation", "synthetic"])
    parser.add_argument("--policies", nargs="+", default=list(PEERS))
    parser.add_argument("--capacity", nargs="+", type=int, default=[1000, 10_000, 30_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stream", type=int, default=0, help="accesses of a long trace")
    parser.add_argument("--objects", action="store_true", help="stream through the objects")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}; hits and million accesses a second")
    if options.stream:
        found = [stream(options.stream, not options.objects)]
    else:
        traces = [load_trace(name) for name in options.trace]
        found = [curve(trace, options.repeats) for trace in traces]
        for trace in traces:
            found += table(trace, options.policies, options.capacity, options.repeats)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
