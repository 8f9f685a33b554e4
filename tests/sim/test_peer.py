"""Flat hits against libcachesim's, from the recorded table in tests/data."""

import json
from pathlib import Path

import pytest

from kvlab.sim import fast, simulate
from kvlab.sim.bounds import bound

RECORDED = Path(__file__).parent.parent / "data" / "libcachesim_hits.json"
EXACT = ("fifo", "lru", "lfu", "sieve")
TOLERANCE = {"arc": 0.001, "s3fifo": 0.01, "mq": 0.01}  # of all accesses


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())["traces"]


def flat(trace, policy, capacity, **more):
    more.setdefault("window_seconds", None)
    return simulate(trace, policy, capacity, prefix=False, **more).block_hits


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("capacity", [1000, 5000, 10_000, 30_000])
def test_policy_objects_hit_as_often_as_libcachesim(recorded, synthetic, policy, capacity):
    known = recorded["synthetic_trace"]["hits"][policy][str(capacity)]
    assert flat(synthetic, policy, capacity) == known


@pytest.mark.parametrize("policy", EXACT)
def test_policy_objects_hit_as_often_on_the_conversation(recorded, conversation, policy):
    known = recorded["conversation_trace"]["hits"][policy]["10000"]
    assert flat(conversation, policy, 10_000) == known


@pytest.mark.skipif(fast.loops is None, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("policy", fast.FLAT)
def test_compiled_loops_hit_as_often_everywhere(recorded, conversation, synthetic, policy):
    for trace in (conversation, synthetic):
        for capacity, known in recorded[f"{trace.name}_trace"]["hits"][policy].items():
            allowed = TOLERANCE.get(policy, 0) * trace.accesses
            assert abs(flat(trace, policy, int(capacity), compiled=True) - known) <= allowed


def test_the_flat_bound_is_libcachesims_belady(recorded, conversation, synthetic):
    for trace in (conversation, synthetic):
        for capacity, known in recorded[f"{trace.name}_trace"]["hits"]["belady"].items():
            found = bound(trace, int(capacity), prefix=False, window_seconds=None)
            assert found.block_hits == known


@pytest.mark.parametrize("policy", TOLERANCE)
def test_policies_with_freedom_are_near(recorded, synthetic, policy):
    for capacity, known in recorded["synthetic_trace"]["hits"][policy].items():
        found = flat(synthetic, policy, int(capacity))
        assert abs(found - known) <= TOLERANCE[policy] * synthetic.accesses
