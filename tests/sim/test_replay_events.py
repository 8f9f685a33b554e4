"""A recorded run, replayed into a fresh policy: the same victims in the same order."""

import pytest

from kvlab.blocks import BlockLedger
from kvlab.blocks.replay import replay, victims
from kvlab.policy import by_name
from kvlab.sim import CostModel, simulate
from kvlab.sim.workloads import chats

POLICIES = ("fifo", "lru", "lfu", "random", "sieve", "s3fifo", "arc", "mq", "gdsf", "pgdsf")
CAPACITY = 400


@pytest.fixture(scope="module")
def trace():
    return chats(150, open_chats=15, block_size=64)


def record(trace, policy, **more):
    events = []
    result = simulate(trace, policy, CAPACITY, events=events.append, **more)
    return result, events


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_victims_in_the_same_order(trace, policy, prefix):
    result, events = record(trace, policy, prefix=prefix)
    assert result.evictions > 100
    ledger = BlockLedger(CAPACITY, by_name(policy))
    assert replay(events, ledger) is None
    ledger.check()
    if prefix:
        assert len(victims(events)) == result.evictions


def test_the_recording_tells_policies_apart(trace):
    events = {policy: record(trace, policy)[1] for policy in POLICIES}
    assert len({tuple(victims(e)) for e in events.values()}) == len(POLICIES)
    assert replay(events["lru"], BlockLedger(CAPACITY, by_name("fifo"))) is not None


def test_requests_in_flight_replay_too(trace):
    result, events = record(trace, "lru", service=CostModel(50_000.0, 200.0))
    assert result.service["peak_in_flight_requests"] > 1
    ledger = BlockLedger(CAPACITY, by_name("lru"))
    assert replay(events, ledger) is None
    ledger.check()
    assert ledger.evictable_count == ledger.held_count  # all pins are gone
