"""Replay a trace against a policy: the ordinary ledger and policy objects, nothing behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvlab.blocks import BlockLedger
from kvlab.core import BadInput
from kvlab.policy import EvictionPolicy, by_name
from kvlab.sim.curves import not_hittable
from kvlab.sim.engine import Engine, Tier
from kvlab.sim.files import TraceStream
from kvlab.sim.flat import Flat
from kvlab.sim.outcome import Tally
from kvlab.sim.result import SimResult
from kvlab.sim.service import CostModel, InFlight, OneByOne, recompute_cost
from kvlab.sim.sizes import ModelShape, shape_by_name
from kvlab.sim.trace import Trace


@dataclass(frozen=True)
class Host:
    """A tier behind the device: blocks evicted there come here, and a hit here moves back."""

    capacity_blocks: int
    policy: str | EvictionPolicy = "lru"


def simulate(
    trace: Trace | TraceStream,
    policy: str | EvictionPolicy = "lru",
    capacity_blocks: int = 1000,
    prefix: bool = True,
    partial_blocks: str = "hit",
    *,
    host: Host | None = None,
    service: CostModel | None = None,
    shape: str | dict | ModelShape = "llama-3.1-8b",
    window_seconds: float | None = 60.0,
    events: Callable[[tuple], None] | None = None,
) -> SimResult:
    """Hits, misses by class and evictions of `policy` on `trace` in `capacity_blocks` blocks.

    prefix=True: a block hits only if all earlier blocks of its request do. One request at a time:
    (1) its leading run of resident blocks is looked up, (2) its blocks are pinned, (3) victims
    leave until the missing ones fit, and a request larger than the capacity is refused, (4)
    metadata is updated once, deeper blocks being older. A resident block behind a gap is a miss
    that keeps its place. prefix=False: each block on its own, in file order.
    partial_blocks "miss": a partial last block takes its place but never hits.
    service: requests come at their arrival times and hold their blocks while they are served.
    shape: of the model whose prefill FLOPs hits save. window_seconds: for thrash; None skips it.
    events: called with each event of the device's ledger, to record the run.
    """
    _check(prefix, partial_blocks, host, service)
    shape = shape_by_name(shape)
    ledger = _ledger(policy, capacity_blocks, events)
    runner = _runner(ledger, trace, prefix, partial_blocks, host, service, shape)
    tally = Tally(shape, window_seconds)
    for piece in trace.pieces():
        tally.add(piece, runner.run(piece))
    return SimResult.of(tally, _name(policy), capacity_blocks, trace.block_size, **runner.more())


def _name(policy: str | EvictionPolicy) -> str:
    return policy if isinstance(policy, str) else policy.name or type(policy).__name__


def _ledger(policy: str | EvictionPolicy, capacity: int, events=None) -> BlockLedger:
    if not isinstance(capacity, (int, np.integer)) or capacity < 1:
        raise BadInput("capacity_blocks", capacity, "must be a whole number of at least 1")
    policy = by_name(policy) if isinstance(policy, str) else policy
    return BlockLedger(int(capacity), policy, events)


def _check(prefix, partial_blocks, host, service) -> None:
    if not prefix and (host or service or not_hittable(partial_blocks)):
        raise BadInput("prefix", prefix, "host, service and partial_blocks=miss need prefix=True")


def _runner(ledger, trace, prefix, partial_blocks, host, service, shape):
    if not prefix:
        return Flat(ledger)
    second = host and Tier(_ledger(host.policy, host.capacity_blocks))
    cost = recompute_cost(shape, trace.block_size)
    engine = Engine(Tier(ledger), second, not_hittable(partial_blocks), cost)
    return InFlight(engine, service) if service else OneByOne(engine)
