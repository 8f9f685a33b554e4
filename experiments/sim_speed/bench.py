"""Block accesses per second of the simulator, libcachesim beside it: `job=sim_speed`.

Flat accounting, blocks of size 1, CPU time, best of `repeats` runs, since other work on the machine
only ever slows a run down. `objects` is the ordinary path through ledger and policy objects,
`compiled` the numba loops; both are `simulate(...)` as a user calls it, without the thrash window,
loading of the trace left out. libcachesim (PyPI) runs its own C loop over the same accesses in its
binary format (`process_trace`, hashpower=18, which suits a trace of this length better than its
default of 24), or is asked block by block from Python (`get`).
"""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import process_time

import numpy as np

from kvlab.core import BadInput, Measurement
from kvlab.sim import Trace, TraceStream, fast, hit_curve, load_trace, simulate
from kvlab.sim.jobs import about, known, refuse_variants

PEERS = {"lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "sieve": "Sieve", "s3fifo": "S3FIFO",
         "arc": "ARC", "mq": "MQ"}  # fmt: skip
WAYS = ("objects", "compiled", "libcachesim", "libcachesim_get")
# libcachesim's oracleGeneral record: time, id, size, next use
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])


class SimSpeed:
    """Traces x capacities x policies, each in all `ways`; and the time of the whole LRU curve.

    stream: accesses of a long trace instead, which is written, then read and simulated piece by
    piece by LRU; the peak is of the process, so one way at a time.
    """

    def __init__(
        self, traces: Sequence[str], policies: Sequence[str], capacity_blocks: Sequence[int],
        ways: Sequence[str] = WAYS, repeats: int = 5, stream: int = 0,
    ):
        for way in ways:
            if way not in WAYS:
                raise BadInput("job.ways", way, f"known: {', '.join(WAYS)}")
        if "compiled" in ways and fast.loops is None:
            raise BadInput("job.ways", "compiled", 'needs numba: pip install "kvlab[fast]"')
        if stream and (len(ways) > 1 or ways[0] not in WAYS[:2]):
            raise BadInput("job.ways", list(ways), "give objects or compiled with job.stream")
        self.traces, self.policies = list(traces), known(policies)
        self.capacity_blocks, self.ways = list(capacity_blocks), list(ways)
        self.repeats, self.stream = repeats, stream

    def run(self, folder, variants: Sequence = ()) -> None:
        """Measure whatever `folder` does not hold yet."""
        refuse_variants(variants)
        for name, params, measure in self._points():
            if not folder.done(name, params):
                with folder.surviving(name, params):
                    folder.add(name, params, list(measure()))

    def _points(self) -> Iterator[tuple[str, dict, Callable]]:
        if self.stream:
            [way] = self.ways
            yield way, {"accesses": self.stream}, lambda: streamed(self.stream, way == "compiled")
            return
        for trace in map(load_trace, self.traces):
            yield "curve", about(trace), lambda t=trace: self._curve(t)
            cells = product(self.capacity_blocks, self.policies, self.ways)
            for capacity, policy, way in cells:
                if way in WAYS[:2] or policy in PEERS:
                    params = {**about(trace), "policy": policy, "capacity_blocks": capacity}
                    yield way, params, lambda t=trace, p=policy, c=capacity, w=way: self._rates(
                        t, p, c, w)  # fmt: skip

    def _curve(self, trace: Trace) -> Iterator[Measurement]:
        """The whole prefix-correct LRU curve, nothing kept from one run to the next."""
        seconds = min(timed(lambda: hit_curve(replace(trace)))[1] for _ in range(self.repeats))
        yield Measurement("curve_ms", 1e3 * seconds, "ms", "lower", count=self.repeats)

    def _rates(self, trace: Trace, policy: str, capacity: int, way: str) -> Iterator[Measurement]:
        how = {"prefix": False, "window_seconds": None, "compiled": way == "compiled"}
        runs = {
            "libcachesim": lambda: peer_loop(trace, policy, capacity),
            "libcachesim_get": lambda: peer_calls(trace, policy, capacity),
        }
        run = runs.get(way, lambda: timed(
            lambda: simulate(trace, policy, capacity, **how).block_hits))  # fmt: skip
        found = [run() for _ in range(self.repeats + (way == "compiled"))]  # the first compiles
        seconds = min(seconds for _, seconds in found[-self.repeats :])
        yield Measurement("million_accesses_per_second", trace.accesses / seconds / 1e6, "M/s",
                          "higher", count=self.repeats)
        yield Measurement("block_hits", found[-1][0], "blocks", count=trace.accesses)


def timed(run: Callable) -> tuple[object, float]:
    """What `run` gives, and its CPU seconds."""
    began = process_time()
    result = run()
    return result, process_time() - began


def peer_loop(trace: Trace, policy: str, capacity: int) -> tuple[int, float]:
    """libcachesim's own loop over a file."""
    import libcachesim as lcs

    rows = np.zeros(trace.accesses, dtype=RECORD)
    rows["id"], rows["size"], rows["next"] = trace.ids, 1, -1
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        rows.tofile(file.name)
        cache = getattr(lcs, PEERS[policy])(cache_size=capacity, hashpower=18)
        given = lcs.ReaderInitParam(ignore_obj_size=True)
        reader = lcs.TraceReader(file.name, lcs.TraceType.ORACLE_GENERAL_TRACE, given)
        (miss_ratio, _), seconds = timed(lambda: cache.process_trace(reader))
    return round((1 - miss_ratio) * trace.accesses), seconds


def peer_calls(trace: Trace, policy: str, capacity: int) -> tuple[int, float]:
    """libcachesim's `get`, called for each block from Python."""
    import libcachesim as lcs

    cache = getattr(lcs, PEERS[policy])(cache_size=capacity, hashpower=18)
    wanted = [lcs.Request(obj_id=id, obj_size=1) for id in trace.ids.tolist()]
    return timed(lambda: sum(map(cache.get, wanted)))


def streamed(accesses: int, compiled: bool) -> Iterator[Measurement]:
    """A long trace, written, then read and simulated piece by piece; peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.jsonl"
        _long_trace(file, accesses)
        yield Measurement("trace_bytes", file.stat().st_size, "B")
        how = {"prefix": False, "compiled": compiled}
        result, seconds = timed(lambda: simulate(TraceStream(file), "lru", 100_000, **how))
    yield Measurement("accesses", result.block_accesses, "blocks")
    yield Measurement("block_hit_percent", result.block_hit_percent, "%", "higher")
    yield Measurement("seconds_with_reading", seconds, "s", "lower")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield Measurement("peak_gb", peak / 1e6, "GB", "lower")


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
