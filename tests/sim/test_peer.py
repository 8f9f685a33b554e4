"""Flat hits of `simulate` and of the bound against libcachesim's, from the table in tests/data.

`tests/policy` holds the policy objects against the whole table; here are the ways to them.
"""

import json
from pathlib import Path

import pytest

from kvlab.sim import fast, simulate
from kvlab.sim.bounds import bound

RECORDED = Path(__file__).parent.parent / "data" / "libcachesim_hits.json"
S3FIFO_FREEDOM = 0.01  # of all accesses; the others are exact


@pytest.fixture(scope="module")
def recorded(conversation, synthetic):
    """(trace, policy -> capacity -> hits) of both bundled traces."""
    found = json.loads(RECORDED.read_text())["traces"]
    return [(t, found[f"mooncake_{t.name}"]["hits"]) for t in (conversation, synthetic)]


def flat(trace, policy, capacity, **more):
    how = {"prefix": False, "window_seconds": None, **more}
    return simulate(trace, policy, capacity, **how).block_hits


@pytest.mark.parametrize("policy", ["fifo", "lru", "lfu", "sieve", "belady"])
def test_simulate_hits_as_often_as_libcachesim(recorded, policy):
    trace, hits = recorded[1]
    assert flat(trace, policy, 10_000) == hits[policy]["10000"]


@pytest.mark.skipif(fast.loops is None, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("policy", fast.FLAT)
def test_compiled_loops_hit_as_often_everywhere(recorded, policy):
    for trace, hits in recorded:
        for capacity, known in hits[policy].items():
            allowed = S3FIFO_FREEDOM * trace.accesses if policy == "s3fifo" else 0
            assert abs(flat(trace, policy, int(capacity), compiled=True) - known) <= allowed


def test_the_flat_bound_is_libcachesims_belady(recorded):
    for trace, hits in recorded:
        for capacity, known in hits["belady"].items():
            found = bound(trace, int(capacity), prefix=False, window_seconds=None)
            assert found.block_hits == known
