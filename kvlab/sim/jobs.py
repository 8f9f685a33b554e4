"""Experiments on traces: hit rates over policies, capacities and budgets; curves; the chooser.

Each job has `run(folder, variants)` and needs no torch. Its points come from its own lists, so
that a variant of the command line has nothing to change and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from kvlab.core import BadInput, Measurement
from kvlab.policy import asked, by_name
from kvlab.progress import firsts, paced
from kvlab.sim import bounds, fast
from kvlab.sim.costs import CostModel, NoService
from kvlab.sim.definitions import Definitions
from kvlab.sim.fast import PREFIX
from kvlab.sim.result import SimResult
from kvlab.sim.sessions import Sessions
from kvlab.sim.simulator import simulate
from kvlab.sim.sizes import blocks_for, shape_by_name, token_bytes
from kvlab.sim.sweeps import attempts
from kvlab.sim.tiers import Host, NoHost
from kvlab.sim.trace import Trace

GIB = 1 << 30


class Point(NamedTuple):
    """One simulation: a readable name, the settings that vary, and how many blocks there are."""

    variant: str
    params: dict
    trace: Trace
    policy: str
    capacity_blocks: int


class Replay:
    """Simulates points under one set of rules, each once; Belady is computed as the bound it is."""

    def __init__(
        self, prefix: bool, partial_blocks: str, tiers: dict, compiled: bool = False, **settings
    ):
        self.rules, self.compiled = (prefix, partial_blocks), compiled
        self.tiers = {name: value for name, value in tiers.items() if value is not None}
        self.settings = settings
        self._done: dict[tuple, SimResult] = {}

    def __call__(self, trace: Trace, policy: str, capacity: int) -> SimResult:
        key = (trace.name, trace.block_size, policy, capacity)
        if key not in self._done:
            self._done[key] = self._run(trace, policy, capacity)
        return self._done[key]

    def _run(self, trace: Trace, policy: str, capacity: int) -> SimResult:
        if asked(policy).bounds:
            return bounds.bound(trace, capacity, *self.rules, **self.settings)
        how = self.tiers | self.settings
        compiled = self.compiled and policy in PREFIX
        return simulate(trace, policy, capacity, *self.rules, compiled=compiled, **how)


class HitRate:
    """Hit rates of policies at capacities, and of formats with policies at budgets of bytes.

    traces: as `load_traces` gives them, or one. policies: names. capacity_blocks: of the trace's
    own blocks. budgets_gib x formats x budget_policies: a budget holds as many blocks as the format
    lets it, for the model `shape` quantized in blocks of `block_size` tokens.
    prefix, window_seconds, host, service: as in `simulate`. partial_blocks, measured, outputs,
    first_requests, common_head: as in `Definitions`. sessions: as in `Sessions`; null: as recorded.
    compiled: replay those policies with numba that are compiled; rows are the same but for orphans,
    which it does not count. jobs: simulations at a time, -1 for all cores (joblib).
    """

    def __init__(
        self,
        traces: Trace | Sequence[Trace],
        policies: Sequence[str] = ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "mq", "belady"),
        capacity_blocks: Sequence[int] = (1000, 5000, 10_000, 30_000),
        budgets_gib: Sequence[float] = (),
        formats: Sequence[str] = ("bf16", "int8", "int4"),
        budget_policies: Sequence[str] = ("lru", "adaptive", "belady"),
        shape: str | dict = "llama-3.1-8b",
        block_size: int = 64,
        prefix: bool = True,
        partial_blocks: str = "hit",
        window_seconds: float | None = 60.0,
        host: Host | NoHost | None = None,
        service: CostModel | NoService | None = None,
        measured: Sequence[float] = (0.0, 1.0),
        outputs: str = "dropped",
        first_requests: str = "counted",
        sessions: Sessions | None = None,
        common_head: str = "counted",
        compiled: bool = False,
        jobs: int = 1,
    ):
        definitions = Definitions(partial_blocks, measured, outputs, first_requests, common_head)
        sessions = sessions or Sessions()
        self.traces = [definitions.apply(sessions.apply(trace)) for trace in listed(traces)]
        self.policies, self.capacity_blocks = known(policies), list(capacity_blocks)
        self.budgets_gib, self.formats = list(budgets_gib), list(formats)
        self.budget_policies = known(budget_policies)
        self.shape, self.block_size = shape, block_size
        host = None if isinstance(host, NoHost) else host
        service = None if isinstance(service, NoService) else service
        closed = sessions if service and sessions.loop == "closed" else None
        tiers = {"host": host, "service": service, "sessions": closed}
        known_shape = shape_by_name(shape)
        rules = prefix, definitions.replayed
        if compiled:
            refuse_without_numba()
        if compiled and closed and service:
            remedy = "looks requests up in the order of the trace, which a closed loop changes"
            raise BadInput("compiled", compiled, remedy)
        self.compiled, self.jobs = compiled, jobs
        settings = {"shape": known_shape, "window_seconds": window_seconds}
        self.replay = Replay(*rules, tiers, compiled, **settings)
        self._fixed = {"prefix": prefix, **definitions.params(), **sessions.params()}
        told = {"host": host, "service": service}
        self._fixed |= {name: str(value) for name, value in told.items() if value is not None}
        if compiled and service:
            self._fixed["service_hits"] = "of requests one by one"
        self._check(definitions, service)
        for format in self.formats:
            token_bytes(format, known_shape, block_size)  # refuses an unknown name now

    def _check(self, definitions: Definitions, service: CostModel | None) -> None:
        for name in (*self.policies, *(self.budget_policies if self.budgets_gib else ())):
            policy = asked(name)
            if policy.bounds and self.replay.tiers:
                raise BadInput("policies", name, "bounds one tier and one request at a time; leave "
                               "it or host and service out")
            if policy.bounds and not definitions.counts_all:
                raise BadInput("policies", name, "bounds the hits of all requests together; leave "
                               "it out or count all requests")
            if policy.foresees and service:
                raise BadInput("policies", name, "knows requests in the order of the trace, which "
                               "service may change; leave it or service out")
        if definitions.outputs == "kept" and service:
            remedy = "service holds the blocks of answers itself while they are made; leave one out"
            raise BadInput("outputs", "kept", remedy)

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        points = [*self._by_capacity(), *self._by_budget()]
        points = [point for point in points if not folder.done(point.variant, point.params)]
        calls = [(point.trace, point.policy, point.capacity_blocks) for point in points]
        ready = attempts(self.replay, calls, self.jobs, self.compiled)
        plan = [(p.trace.name, p.variant, p.trace.accesses) for p in points]
        kinds = firsts(p.policy for p in points) if self.compiled else None
        for point, result in paced("hit_rate", zip(points, ready), plan, kinds):
            with folder.surviving(point.variant, point.params):
                folder.add(point.variant, point.params, result().measurements())

    def _by_capacity(self) -> Iterator[Point]:
        for trace in self.traces:
            for capacity in self.capacity_blocks:
                for policy in self.policies:
                    params = {**about(trace), "policy": policy, "capacity_blocks": capacity}
                    yield Point(policy, params | self._fixed, trace, policy, capacity)

    def _by_budget(self) -> Iterator[Point]:
        shape = shape_by_name(self.shape)
        for trace in self.traces:
            for budget in self.budgets_gib:
                for format in self.formats:
                    per_token = token_bytes(format, shape, self.block_size)
                    capacity = blocks_for(budget * GIB, trace.block_size, per_token)
                    setting = {"format": format, "budget_gib": budget, "shape": self.shape}
                    setting |= {"cache_block_size": self.block_size, "capacity_blocks": capacity}
                    for policy in self.budget_policies if capacity else ():
                        params = {**about(trace), "policy": policy, **setting, **self._fixed}
                        yield Point(f"{format} {policy}", params, trace, policy, capacity)


class AdaptiveRegret:
    """How far the adaptive chooser stays behind the best fixed policy, and ahead of LRU.

    traces, capacity_blocks, compiled as in `HitRate`; `adaptive` is the policy judged, `fixed` are
    those it is judged by. Emits each hit rate, and for the judged one points of block hit rate:
    `regret_points` (best fixed minus judged), `gain_over_lru_points`, `regret_to_bound_points`.
    """

    def __init__(
        self,
        traces: Trace | Sequence[Trace],
        capacity_blocks: Sequence[int] = (1000, 5000, 10_000, 30_000),
        adaptive: str = "adaptive",
        fixed: Sequence[str] = ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "mq"),
        prefix: bool = True,
        compiled: bool = False,
    ):
        if compiled:
            refuse_without_numba()
        self.traces, self.capacity_blocks = listed(traces), list(capacity_blocks)
        self.adaptive, self.fixed = known([adaptive])[0], known(fixed)
        if "lru" not in self.fixed:
            raise BadInput("fixed", self.fixed, "must hold lru, the policy to gain over")
        self.prefix = prefix
        self.replay = Replay(prefix, "hit", {}, compiled, window_seconds=None)

    def run(self, folder, variants: Sequence = ()) -> None:
        refuse_variants(variants)
        todo = []
        for trace, capacity in product(self.traces, self.capacity_blocks):
            params = {**about(trace), "capacity_blocks": capacity, "prefix": self.prefix}
            params |= Definitions().params()
            if not folder.done(self.adaptive, params):
                todo.append((trace, capacity, params))
        plan = [(trace.name, f"{capacity:,} blocks", trace.accesses) for trace, capacity, _ in todo]
        for trace, capacity, params in paced("adaptive", todo, plan):
            with folder.surviving(self.adaptive, params):
                self._measure(folder, trace, capacity, params)

    def _measure(self, folder, trace: Trace, capacity: int, params: dict) -> None:
        names = [*self.fixed, bounds.NAME, self.adaptive]
        percent = {n: self.replay(trace, n, capacity).block_hit_percent for n in names}
        for name in names[:-1]:
            row = Measurement("block_hit_percent", percent[name], "%", "higher")
            folder.add(name, params, [row])
        judged, best = percent[self.adaptive], max(percent[name] for name in self.fixed)
        gaps = (
            ("regret_points", best - judged, "lower"),
            ("gain_over_lru_points", judged - percent["lru"], "higher"),
            ("regret_to_bound_points", percent[bounds.NAME] - judged, "lower"),
        )
        rows = [Measurement("block_hit_percent", judged, "%", "higher")]
        rows += [Measurement(name, value, "points", better) for name, value, better in gaps]
        folder.add(self.adaptive, params, rows)


def listed(traces: Trace | Sequence[Trace]) -> list[Trace]:
    """One trace, several, or lists of several, as one list."""
    if isinstance(traces, Trace):
        return [traces]
    return [trace for item in traces for trace in listed(item)]


def refuse_without_numba() -> None:
    if fast.loops is None:
        raise BadInput("compiled", True, 'needs numba: pip install "kvlab[fast]"')


def about(trace: Trace) -> dict:
    return {"trace": trace.name, "trace_block_size": trace.block_size}


def known(policies: Sequence[str]) -> list[str]:
    """The names, after a check that each one makes a policy."""
    for name in policies:
        if not asked(name).foresees:  # else made with the future of each trace
            by_name(name)
    return list(policies)


def refuse_variants(variants: Sequence) -> None:
    if variants:
        names = [variant.name for variant in variants]
        remedy = "this job takes its points from lists of its own, such as job.policies=[lru,arc]"
        raise BadInput("variants", names, remedy)
