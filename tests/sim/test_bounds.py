"""Belady's bounds against trying everything; leaf-only and tail-first eviction."""

import random
from itertools import combinations

import pytest

from kvlab.core import BadInput
from kvlab.sim import Trace, simulate
from kvlab.sim.bounds import bound, smallest_ideal_capacity

FAST = {"window_seconds": None}


def test_reachable_bound_equals_search_on_hundreds_of_tries(trie):
    for seed in range(400):
        trace = trie(seed, requests=7, depth=3, fan=2 + seed % 2)
        for capacity in (2, 3, 4, 5):
            found = bound(trace, capacity, **FAST).block_hits
            assert found == best_by_search(trace, capacity), (seed, capacity)


def test_flat_bound_equals_search(tiny):
    draw = random.Random(0)
    for _ in range(150):
        ids = [draw.randrange(5) for _ in range(12)]
        trace = tiny(*[[i] for i in ids])
        for capacity in (1, 2, 3):
            found = bound(trace, capacity, prefix=False, **FAST).block_hits
            assert found == optimum_flat_by_search(ids, capacity)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("partial", ["hit", "miss"])
def test_bound_equals_the_belady_policy_object(trie, prefix, partial):
    partial = partial if prefix else "hit"
    for seed in range(60):
        trace = trie(seed, requests=25, depth=5, fan=3)
        for capacity in (3, 5, 9, 14):
            best = bound(trace, capacity, prefix, partial, **FAST)
            policy = simulate(trace, "belady", capacity, prefix, partial, **FAST)
            assert best.block_hits == policy.block_hits, (seed, capacity)
            assert best.refused_requests == policy.refused_requests


@pytest.mark.parametrize("policy", ["fifo", "lru", "lfu", "random", "sieve", "s3fifo", "arc"])
def test_no_policy_beats_the_bound(trie, policy):
    for seed in range(40):
        trace = trie(seed, requests=40, depth=5, fan=3)
        for capacity in (5, 8, 13):
            best = bound(trace, capacity, **FAST)
            found = simulate(trace, policy, capacity, **FAST)
            assert found.block_hit_percent <= best.block_hit_percent


def test_known_points(synthetic):
    assert bound(synthetic, 1000, **FAST).block_hits == 32_803
    assert bound(synthetic, 1000, prefix=False, **FAST).block_hits == 33_713
    assert bound(synthetic, 5000, **FAST).block_hits == 64_063


def test_smallest_ideal_capacity_is_exact(trie, synthetic):
    for seed in range(60):
        trace = trie(seed, requests=25, depth=5, fan=3)
        ideal, most = smallest_ideal_capacity(trace), (trace.previous >= 0).sum()
        assert bound(trace, ideal, **FAST).block_hits == most
        assert bound(trace, ideal - 1, **FAST).block_hits < most or ideal == 1
    assert smallest_ideal_capacity(synthetic) == 12_712


def test_belady_needs_the_whole_trace(trie):
    from kvlab.sim import CostModel

    with pytest.raises(BadInput, match="whole trace"):
        simulate(trie(0), "belady", 10, service=CostModel())


def best_by_search(trace: Trace, capacity: int) -> int:
    """Most block hits over all choices of victims, by trying them all. For tiny traces only."""
    states: dict[frozenset, int] = {frozenset(): 0}
    for contents in trace.requests():
        if len(contents) > capacity:
            continue
        reached: dict[frozenset, int] = {}
        for resident, hits in states.items():
            run = next((i for i, c in enumerate(contents) if c not in resident), len(contents))
            others = sorted(resident - set(contents))
            short = len(others) + len(contents) - capacity
            for victims in combinations(others, max(0, short)):
                after = (resident | set(contents)) - set(victims)
                reached[after] = max(reached.get(after, 0), hits + run)
        states = reached
    return max(states.values(), default=0)


def optimum_flat_by_search(ids: list[int], capacity: int) -> int:
    """Most hits of single blocks, by trying all victims. For tiny traces only."""
    states: dict[frozenset, int] = {frozenset(): 0}
    for content in ids:
        reached: dict[frozenset, int] = {}
        for resident, hits in states.items():
            hit = content in resident
            full = not hit and len(resident) == capacity
            for victim in sorted(resident) if full else [None]:
                after = (resident - {victim}) | {content}
                reached[after] = max(reached.get(after, 0), hits + hit)
        states = reached
    return max(states.values(), default=0)
