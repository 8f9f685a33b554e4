"""How fast a replay is: beside a bare LRU of the same process, over a long stream, in a sweep."""

from __future__ import annotations

import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import process_time

import numpy as np

from kvlab.core import BadInput, Measurement
from kvlab.policy import asked
from kvlab.progress import paced
from kvlab.sim.fast import PREFIX, Compiled
from kvlab.sim.jobs import about, known, listed, refuse_variants
from kvlab.sim.service import recompute_cost
from kvlab.sim.simulator import hittable, simulate
from kvlab.sim.sizes import shape_by_name
from kvlab.sim.sweeps import sweep
from kvlab.sim.trace import Trace


class ReplaySpeed:
    """Accesses a second of each policy, compiled and with prefixes; seconds of a stream; a sweep.

    traces: as in `HitRate`; on each, `policies` (none named: all compiled) at `capacity_blocks`,
    the best of `rounds`: `loop` is the compiled loop alone, `simulate` the whole call, `bare` an
    `OrderedDict` LRU over the same accesses in the same round. Policies that a trace does not tell
    what they ask for are left out.
    stream: references of a made stream (0: none), which `stream_policies` replay one after another
    at `stream_blocks`. sweep: references of a stream (0: none) over which `sweep_policies` run at
    `sweep_blocks`, `jobs` at a time. Times are of the process's CPU where not called wall.
    """

    def __init__(
        self, traces: Trace | Sequence[Trace], policies: Sequence[str] = (),
        capacity_blocks: int = 10_000, rounds: int = 5, stream: int = 0,
        stream_policies: Sequence[str] = ("lru",), stream_blocks: int = 100_000, sweep: int = 0,
        sweep_policies: Sequence[str] = (), sweep_blocks: Sequence[int] = (), jobs: int = -1,
    ):  # fmt: skip
        if capacity_blocks < 1 or rounds < 1 or stream < 0 or sweep < 0:
            remedy = "capacity and rounds must be at least 1, stream and sweep at least 0"
            raise BadInput("rounds", [capacity_blocks, rounds, stream, sweep], remedy)
        self.traces, self.policies = listed(traces), known(policies) or list(PREFIX)
        self.capacity, self.rounds, self.jobs = capacity_blocks, rounds, jobs
        self.stream, self.stream_blocks = stream, stream_blocks
        self.stream_policies = known(stream_policies)
        self.sweep, self.sweep_blocks = sweep, list(sweep_blocks)
        self.sweep_policies = known(sweep_policies)

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        steps, plan = [], []

        def add(name: str, params: dict, references: int, rows: Callable) -> None:
            steps.append(partial(self._once, folder, name, params, rows))
            plan.append((params["trace"], name, references))

        for trace in self.traces:
            for policy in self.policies:
                if policy == "none" or not set(asked(policy).asks) <= _said(trace):
                    continue
                params = about(trace) | {"policy": policy, "capacity_blocks": self.capacity}
                add(policy, params, trace.accesses, partial(self._speeds, trace, policy))
        for policy in self.stream_policies if self.stream else ():
            place = {"capacity_blocks": self.stream_blocks, "references": self.stream}
            params = {"trace": Stream.name, "policy": policy} | place
            add(policy, params, self.stream, partial(self._streamed, policy))
        if self.sweep:
            params = {"trace": Stream.name, "references": self.sweep, "part": "sweep"}
            add("sweep", params, self.sweep, self._swept)
        for step in paced("replay_speed", steps, plan):
            step()

    @staticmethod
    def _once(folder, variant: str, params: dict, rows) -> None:
        if not folder.done(variant, params):
            with folder.surviving(variant, params):
                folder.add(variant, params, list(rows()))

    def _speeds(self, trace: Trace, policy: str) -> Iterator[Measurement]:
        ids = trace.ids.tolist()
        runs = (lambda: loop(trace, policy, self.capacity),
                lambda: whole(trace, policy, self.capacity), lambda: bare(ids, self.capacity))
        runs[0]()  # compiles, or loads what was compiled
        rounds = [[run() for run in runs] for _ in range(self.rounds)]
        best = [trace.accesses / min(seconds) for seconds in zip(*rounds)]
        for name, rate in zip(("loop", "simulate", "bare"), best):
            yield Measurement(f"{name}_accesses_per_second", rate, "1/s", "higher")
        yield Measurement("loop_over_bare", best[0] / best[2], "ratio", "higher")

    def _streamed(self, policy: str) -> Iterator[Measurement]:
        simulate(Stream(1 << 16), policy, self.stream_blocks, compiled=True)
        began, wall = process_time(), time.perf_counter()
        result = simulate(Stream(self.stream), policy, self.stream_blocks, compiled=True)
        yield Measurement("cpu_seconds", process_time() - began, "s", "lower")
        yield Measurement("wall_seconds", time.perf_counter() - wall, "s", "lower")
        yield Measurement("peak_gigabytes", peak_gb(), "GB", "lower")
        yield Measurement("block_hit_percent", result.block_hit_percent, "%", "higher")

    def _swept(self) -> Iterator[Measurement]:
        began, wall = process_time(), time.perf_counter()
        names, blocks = self.sweep_policies, self.sweep_blocks
        cells = 0
        for result in sweep(Stream(self.sweep), names, blocks, jobs=self.jobs, compiled=True):
            cells += 1
            print(f"{result.policy} at {result.capacity_blocks}: {result.block_hit_percent:.2f} % "
                  f"({time.perf_counter() - wall:.0f} s wall, {process_time() - began:.0f} s CPU)",
                  flush=True)  # fmt: skip
        yield Measurement("cpu_seconds", process_time() - began, "s", "lower", count=cells)
        yield Measurement("wall_seconds", time.perf_counter() - wall, "s", "lower", count=cells)
        yield Measurement("peak_gigabytes", peak_gb(), "GB", "lower")


def _said(trace: Trace) -> set[str]:
    """What a trace tells policies that ask."""
    return {"number", "ms", "tokens"} | {"session", "tool"} & set(trace.columns)


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
    """Seconds of the compiled loop; the future is told before."""
    cost = recompute_cost(shape_by_name("llama-3.1-8b"), trace.block_size)
    runner = Compiled(policy, capacity, True, cost=cost, whole=True)
    if asked(policy).foresees:
        runner.foresee(trace, hittable(trace, capacity, "hit"))
    began = process_time()
    runner.run(trace)
    return process_time() - began


def whole(trace: Trace, policy: str, capacity: int) -> float:
    began = process_time()
    simulate(trace, policy, capacity, compiled=True)
    return process_time() - began


def peak_gb() -> float:
    """The most memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


class Stream:
    """Sessions that grow turn by turn, as those of coding agents do, made piece by piece: 64 at a
    time, prompts of up to 3,800 blocks of 64 tokens, most of them known from the turn before."""

    name, block_size = "made", 64

    def __init__(self, accesses: int, piece: int = 1 << 20):
        self.accesses, self.piece = accesses, piece

    def pieces(self) -> Iterator[Trace]:
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
