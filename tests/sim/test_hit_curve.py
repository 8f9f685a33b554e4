"""The one-pass curve against direct simulation, and known points of the bundled traces."""

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import hit_curve, simulate, stack_distances, weighted_curve
from kvlab.sim.workloads import agents, chats, scans, system_prompts


@pytest.mark.parametrize("partial", ["hit", "miss"])
def test_curve_equals_simulation_on_random_tries(trie, partial):
    for seed in range(60):
        trace = trie(seed, requests=25, depth=5, fan=3)
        capacities, hits = hit_curve(trace, partial)
        assert capacities[0] == np.diff(trace.first).max()
        for capacity, expected in zip(capacities.tolist(), hits.tolist()):
            found = simulate(trace, "lru", capacity, partial_blocks=partial, window_seconds=None)
            assert found.block_hits == expected, (seed, capacity)


@pytest.mark.parametrize("make", [system_prompts, chats, agents, scans])
def test_curve_equals_simulation_on_workloads(make):
    trace = make(80)
    capacities, hits = hit_curve(trace)
    for at in np.linspace(0, len(capacities) - 1, 5).astype(int).tolist():
        result = simulate(trace, "lru", int(capacities[at]), window_seconds=None)
        assert result.block_hits == hits[at]


def test_curve_equals_simulation_on_a_bundled_trace(synthetic):
    capacities, hits = hit_curve(synthetic)
    for capacity in (374, 1000, 12_345):
        result = simulate(synthetic, "lru", capacity, window_seconds=None)
        assert result.block_hits == hits[capacity - capacities[0]]


def test_known_points(conversation, synthetic):
    capacities, hits = hit_curve(synthetic)
    known = {1000: 10_252, 5000: 34_043, 10_000: 51_669, 30_000: 76_077}
    assert {c: hits[c - capacities[0]] for c in known} == known
    assert hits[-1] == 77_953
    assert hit_curve(conversation)[1][-1] == 105_710
    assert hit_curve(conversation, "miss")[1][-1] == 105_592


def test_distances_by_hand(tiny):
    trace = tiny([0, 1], [0, 2], [3], [0, 1])
    # before the last request, from the most recent: 3, 0, 2, 1
    assert stack_distances(trace).tolist() == [0, 0, 1, 0, 0, 2, 4]


def test_weights_give_token_curves(synthetic):
    capacities, tokens = weighted_curve(synthetic, synthetic.block_tokens)
    result = simulate(synthetic, "lru", 5000, window_seconds=None)
    assert tokens[5000 - capacities[0]] == result.token_hits


def test_ids_must_be_chained_and_the_setting_known(tiny):
    with pytest.raises(BadInput, match="chained"):
        hit_curve(tiny([0, 1], [2, 1]))
    with pytest.raises(BadInput, match="'hit' or 'miss'"):
        hit_curve(tiny([0, 1]), "maybe")


def test_an_empty_trace_has_an_empty_curve(tiny):
    capacities, hits = hit_curve(tiny())
    assert capacities.tolist() == [0] and hits.tolist() == [0]
