"""Replay a trace against a policy: the ordinary ledger and policy objects, nothing behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvlab.blocks import BlockLedger
from kvlab.core import BadInput
from kvlab.kinds import fits, held
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
from kvlab.sim.service import InFlight, OneByOne, OnlyTimes, recompute_cost
from kvlab.sim.sessions import Sessions
from kvlab.sim.sizes import ModelShape, shape_by_name, token_bytes
from kvlab.sim.tiers import Host, tiers_of
from kvlab.sim.trace import Trace

MOST_COMPILED = 2**30  # blocks


@held(but=("policy",))
def simulate(
    trace: Trace | TraceStream,
    policy: str | EvictionPolicy | Callable[[], EvictionPolicy] = "lru",
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
    """Hits, misses by class and evictions of `policy` (a name, a dotted path, a class, a function
    that makes one, an instance that is new) on `trace` in `capacity_blocks` blocks.

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
    without events. With service, hits are those of requests one by one (blocks in flight are not
    held, prompts computed side by side are known at once), and times follow from them.
    """
    policy = _given(policy)
    _check(prefix, partial_blocks, host, service)
    if isinstance(trace, Trace):
        trace.check_shares()
    shape = shape_by_name(shape)
    _check_hosts(host, prefix, trace)
    if compiled:
        _check_compiled(service, events, sessions)
        runner = _compiled(policy, capacity_blocks, trace, prefix, partial_blocks, host, shape)
    else:
        if isinstance(policy, str) and asked(policy).foresees:
            policy = _clairvoyant(policy, trace, capacity_blocks, prefix, partial_blocks, service)
        ledger = _ledger(policy, capacity_blocks, events)
        _check_asks(ledger.policy, prefix, trace)
        runner = _runner(ledger, trace, prefix, partial_blocks, host, service, shape, sessions)
    link = service and _link(host, service, shape, trace.block_size)
    timed = OnlyTimes(service, link) if service and compiled else None
    made = runner.tally if compiled else Tally
    tally = made(shape, window_seconds)
    _run(runner, trace, [tally.add, timed and timed.run, outcomes])
    named, more = (_name(policy), capacity_blocks, trace.block_size), runner.more()
    if timed:
        more |= {"service": timed.summary()}
    return SimResult.of(tally, *named, **more)


def _run(runner, trace: Trace | TraceStream, hearers: Sequence[Callable | None]) -> None:
    """Replay piece by piece; those who hear of each hear of it in the order in which it ran."""
    hearers = [hear for hear in hearers if hear]
    for piece in trace.pieces():
        outcome = runner.run(piece)
        for hear in hearers:
            hear(piece if outcome.ran is None else outcome.ran, outcome)


def _given(policy: object) -> str | EvictionPolicy:
    """A name, or a policy. Raises `BadInput` where nothing makes one."""
    if isinstance(policy, str | EvictionPolicy):
        return policy
    made = policy() if callable(policy) else None
    if not isinstance(made, EvictionPolicy):
        remedy = "must be a name of a policy, its class, an instance or a function that makes one"
        raise BadInput("policy", policy, remedy)
    return made


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
    if not fits(blocks, int) or blocks < 1:
        raise BadInput("capacity_blocks", blocks, "must be a whole number of at least 1")
    return int(blocks)


def _check_known_ahead(name: str, trace, service=None) -> None:
    if not isinstance(trace, Trace) or service:
        remedy = "needs a whole trace, known ahead, without service times"
        raise BadInput("policy", name, remedy)


def _compiled(policy, capacity, trace, prefix, partial_blocks, host, shape) -> Compiled:
    cost = recompute_cost(shape, trace.block_size) if prefix else (lambda depth: 1.0)
    named = isinstance(policy, str)
    _check_asks(asked(policy) if named else policy, prefix, trace)
    tiers = [(tier.policy, _capacity(tier.capacity_blocks), tier.mode) for tier in _levels(host)]
    most = max(_capacity(capacity), *(blocks for _, blocks, _ in tiers), 1)
    if most > MOST_COMPILED:  # its links are 32-bit numbers, and a block takes 100 bytes
        raise BadInput("capacity_blocks", most, f"is more than compiled replay has room for, "
                       f"{MOST_COMPILED}; compiled=False")
    runner = Compiled(
        policy, _capacity(capacity), prefix, not_hittable(partial_blocks), cost=cost,
        tiers=tiers, whole=isinstance(trace, Trace),
    )  # fmt: skip
    if named and asked(policy).foresees:
        _check_known_ahead(policy, trace)
        if policy != "belady" and not prefix:
            raise BadInput("prefix", prefix, f"{policy} goes by requests; it needs prefix=True")
        runner.foresee(trace, hittable(trace, capacity, partial_blocks) if prefix else None)
    return runner


def _check_compiled(service, events, sessions) -> None:
    if events:
        raise BadInput("compiled", True, "has no events")
    if service and sessions and sessions.loop == "closed":
        remedy = "looks requests up in the order of the trace, which a closed loop changes"
        raise BadInput("compiled", True, remedy)


def _levels(host: Host | None) -> list[Host]:
    return [] if host is None else [host, *_levels(host.behind)]


def _check_hosts(host: Host | None, prefix: bool, trace) -> None:
    for tier in _levels(host):
        named = isinstance(tier.policy, str)
        _check_asks(asked(tier.policy) if named else tier.policy, prefix, trace)


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
    return InFlight(prompts, service, _link(host, service, shape, trace.block_size), sessions)


def _link(host, service: CostModel, shape: ModelShape, block_size: int) -> Link:
    each = service.measures.token_bytes if service.measures else token_bytes("bf16", shape)
    return Link(host, service, each * block_size)
