"""Replay a trace against a policy: the ordinary ledger and policy objects, nothing behind them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvlab.blocks import BlockLedger
from kvlab.core import BadInput
from kvlab.policy import EvictionPolicy, asked, by_name
from kvlab.sim.costs import CostModel
from kvlab.sim.curves import not_hittable
from kvlab.sim.fast import Compiled
from kvlab.sim.files import TraceStream
from kvlab.sim.flat import Flat
from kvlab.sim.moments import check_asks
from kvlab.sim.outcome import Outcome, Tally
from kvlab.sim.prompts import Prompts
from kvlab.sim.queueing import Link
from kvlab.sim.result import SimResult
from kvlab.sim.service import InFlight, OneByOne, recompute_cost
from kvlab.sim.sessions import Sessions
from kvlab.sim.sizes import ModelShape, shape_by_name, token_bytes
from kvlab.sim.tiers import Host, tiers_of
from kvlab.sim.trace import Trace


def simulate(
    trace: Trace | TraceStream,
    policy: str | EvictionPolicy = "lru",
    capacity_blocks: int = 1000,
    prefix: bool = True,
    partial_blocks: str = "hit",
    *,
    host: Host | None = None,
    sessions: Sessions | None = None,
    service: CostModel | None = None,
    shape: str | dict | ModelShape = "llama-3.1-8b",
    window_seconds: float | None = 60.0,
    events: Callable[[tuple], None] | None = None,
    outcomes: Callable[[Trace, Outcome], None] | None = None,
    compiled: bool = False,
) -> SimResult:
    """Hits, misses by class and evictions of `policy` on `trace` in `capacity_blocks` blocks.

    prefix=True: a block hits only if all earlier blocks of its request do. One request at a time:
    (1) its leading run of resident blocks is looked up, (2) its blocks are pinned, (3) victims
    leave until the missing ones fit, and a request larger than the capacity is refused, (4)
    metadata is updated once, deeper blocks being older. A resident block behind a gap is a miss
    that keeps its place. prefix=False: each block on its own, in file order.
    partial_blocks "miss": a partial last block takes its place but never hits.
    host: tiers behind the device. service: requests come at their arrival times and hold their
    blocks while they are served. sessions: what made the trace (`Sessions.apply`); in a closed loop
    with service a request waits for the answer that it follows.
    shape: of the model whose prefill FLOPs hits save. window_seconds: for thrash; None skips it.
    events: called with each event of the device's ledger, to record the run.
    outcomes: called with each piece of the trace and what became of each of its accesses.
    compiled: the same results from numba, much faster, for the policies that `sim/fast.py` names;
    without service and events.
    """
    _check(prefix, partial_blocks, host, service)
    if isinstance(trace, Trace):
        trace.check_shares()
    shape = shape_by_name(shape)
    if compiled:
        _check_compiled(service, events, host)
        runner = _compiled(policy, capacity_blocks, trace, prefix, partial_blocks, host, shape)
    else:
        if isinstance(policy, str) and asked(policy).foresees:
            policy = _clairvoyant(policy, trace, capacity_blocks, prefix, partial_blocks, service)
        ledger = _ledger(policy, capacity_blocks, events)
        _check_asks(ledger.policy, prefix, trace)
        runner = _runner(ledger, trace, prefix, partial_blocks, host, service, shape, sessions)
    made = runner.tally if compiled else Tally
    tally = made(shape, window_seconds)
    for piece in trace.pieces():
        outcome = runner.run(piece)
        piece = piece if outcome.ran is None else outcome.ran
        tally.add(piece, outcome)
        if outcomes:
            outcomes(piece, outcome)
    named = _name(policy), capacity_blocks, trace.block_size
    return SimResult.of(tally, *named, **runner.more())


def _name(policy: str | EvictionPolicy) -> str:
    return policy if isinstance(policy, str) else policy.name or type(policy).__name__


def _ledger(policy: str | EvictionPolicy, capacity: int, events=None) -> BlockLedger:
    policy = by_name(policy) if isinstance(policy, str) else policy
    return BlockLedger(_capacity(capacity), policy, events)


def _check_asks(policy: EvictionPolicy, prefix: bool, trace: Trace | TraceStream) -> None:
    """Refuse a policy that would not hear what it goes by."""
    if policy.asks and not prefix:
        raise BadInput("prefix", prefix, f"{policy.name} goes by requests; it needs prefix=True")
    if isinstance(trace, Trace):
        check_asks(policy.name, policy.asks, trace)


def _clairvoyant(
    name: str, trace, capacity: int, prefix: bool, partial_blocks: str, service
) -> EvictionPolicy:
    """A policy that gets this trace's future; what can never hit is no use in it."""
    _check_known_ahead(name, trace, service)
    if not prefix:
        return by_name(name, future=trace.ids.tolist(), by_request=False)
    keep = hittable(trace, capacity, partial_blocks).tolist()
    future = (ids[:count] for ids, count in zip(trace.requests(), keep))
    return by_name(name, future=future, by_request=True)


def hittable(trace: Trace, capacity: int, partial_blocks: str) -> np.ndarray:
    """How many accesses of each request could hit, int64 [R]."""
    trace.check_prefix_chained()
    hides = not_hittable(partial_blocks) & trace.partial
    return np.where(np.diff(trace.first) <= capacity, np.diff(trace.first) - hides, 0)


def _capacity(blocks: int) -> int:
    if not isinstance(blocks, (int, np.integer)) or blocks < 1:
        raise BadInput("capacity_blocks", blocks, "must be a whole number of at least 1")
    return int(blocks)


def _check_known_ahead(name: str, trace, service=None) -> None:
    if not isinstance(trace, Trace) or service:
        remedy = "needs a whole trace, known ahead, without service times"
        raise BadInput("policy", name, remedy)


def _compiled(policy, capacity, trace, prefix, partial_blocks, host, shape) -> Compiled:
    cost = recompute_cost(shape, trace.block_size) if prefix else (lambda depth: 1.0)
    runner = Compiled(
        policy, _capacity(capacity), prefix, not_hittable(partial_blocks), cost=cost,
        host=host and (host.policy, _capacity(host.capacity_blocks), host.mode),
        whole=isinstance(trace, Trace),
    )  # fmt: skip
    if isinstance(policy, str) and asked(policy).foresees:
        _check_known_ahead(policy, trace)
        runner.foresee(trace, hittable(trace, capacity, partial_blocks) if prefix else None)
    return runner


def _check_compiled(service, events, host) -> None:
    if service or events:
        raise BadInput("compiled", True, "has no service times and no events")
    if host and host.behind:
        raise BadInput("compiled", True, "has two tiers at most; leave host.behind out")


def _check(prefix, partial_blocks, host, service) -> None:
    if not prefix and (host or service or not_hittable(partial_blocks)):
        raise BadInput("prefix", prefix, "host, service and partial_blocks=miss need prefix=True")
    if host and host.timed and not service:
        raise BadInput("host", host, "has times, which only a replay with service spends")


def _runner(ledger, trace, prefix, partial_blocks, host, service, shape, sessions):
    if not prefix:
        return Flat(ledger)
    tier = tiers_of(host, _ledger)
    cost = recompute_cost(shape, trace.block_size)
    prompts = Prompts(ledger, tier, not_hittable(partial_blocks), cost)
    if not service:
        return OneByOne(prompts)
    each = service.measures.token_bytes if service.measures else token_bytes("bf16", shape)
    return InFlight(prompts, service, Link(host, service, each * trace.block_size), sessions)
