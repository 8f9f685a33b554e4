"""Accounting by hand, and against an independent model of the rules."""

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.policy import LRU, PriorityPolicy
from kvlab.sim import TraceStream, simulate, write_trace


def run(trace, policy="lru", capacity=4, **more):
    return simulate(trace, policy, capacity, **more)


def test_prefix_hits_are_the_leading_run(tiny):
    result = run(tiny([0, 1, 2], [0, 1, 3], [0, 1, 2]), capacity=3)
    # 2 leaves for 3, then 3 for 2: 0 and 1 hit twice
    assert (result.block_hits, result.block_accesses, result.evictions) == (4, 9, 2)
    assert (result.token_hits, result.tokens) == (16, 36)
    assert result.misses == {
        "compulsory": 4, "capacity": 1, "partial_block": 0, "broken_chain": 0, "refused": 0,
    }  # fmt: skip


def test_a_resident_block_behind_a_gap_is_a_miss_that_keeps_its_place(tiny):
    # FIFO, tail first: 1, 0, 2. Block 3 evicts 1: the chain 0-1-2 is broken, then 4 evicts 0.
    trace = tiny([0, 1], [0, 1, 2], [3], [0, 1, 2])
    result = run(trace, "fifo", 3)
    assert result.misses["broken_chain"] == 1  # 2 is there, 1 is not
    assert result.block_hits == 2 + 1
    assert result.evictions == 2  # 1 for 3, then 3 for 1: 0 and 2 are pinned


def test_orphans_are_counted(tiny):
    class HeadFirst(PriorityPolicy):
        name = "head_first"

        def priority(self, meta):
            return meta.depth

    result = run(tiny([0, 1, 2], [3]), HeadFirst(), 3)
    assert result.policy == "head_first" and result.orphans == 2
    assert run(tiny([0, 1, 2], [3]), "lru", 3).orphans == 0


def test_a_block_named_twice_in_a_request_is_one_block(tiny):
    result = run(tiny([0, 1, 0], [0, 1, 0]), capacity=2)
    assert (result.block_hits, result.evictions, result.refused_requests) == (3, 0, 0)


def test_requests_larger_than_the_capacity_are_refused_and_change_nothing(tiny):
    result = run(tiny([0, 1], [0, 2, 3, 4, 5], [0, 1]), capacity=4)
    assert result.refused_requests == 1 and result.misses["refused"] == 5
    assert (result.block_hits, result.evictions) == (2, 0)


def test_partial_blocks_hit_or_miss(tmp_path):
    from kvlab.sim import from_requests

    trace = from_requests([(0.0, 6, 0, [0, 1]), (1.0, 6, 0, [0, 1])], 4)
    hit, miss = run(trace), run(trace, partial_blocks="miss")
    assert (hit.block_hits, hit.token_hits) == (2, 6)
    assert (miss.block_hits, miss.token_hits) == (1, 4)
    assert miss.misses["partial_block"] == 1 and miss.misses["compulsory"] == 2


def test_ties_leave_from_the_tail(tiny):
    gone = []
    trace = tiny([0, 1, 2], [3, 4])
    run(trace, "lru", 3, events=lambda e: gone.append(e[-1]) if e[0] == "reclaim" else None)
    assert gone == [[2, 1]]  # blocks are numbered as allocated: head 0, tail 2


def test_flat_touches_every_id_in_file_order(tiny):
    result = run(tiny([0, 1, 2], [1, 0], [3, 1]), "lru", 3, prefix=False)
    assert (result.block_hits, result.evictions) == (3, 1)  # 3 evicts 2
    assert run(tiny([0, 0, 1, 0]), "lru", 1, prefix=False).block_hits == 1


def test_flops_weigh_later_tokens_more(tiny):
    result = run(tiny([0, 1], [0, 2]), capacity=9)
    assert 0 < result.flops_saved_percent < result.token_hit_percent
    shape = {"layers": 1, "query_heads": 1, "kv_heads": 1, "head_dim": 1, "parameters": 0.0}
    alone = run(tiny([0, 1], [0, 2]), capacity=9, shape=shape)
    # attention only: 2 n (n + 1) FLOPs for n tokens
    assert alone.flops == 2 * (2 * 8 * 9) and alone.flops_saved == 2 * 4 * 5


def test_thrash_is_what_comes_back_soon(tiny):
    trace = tiny([0], [1], [0], [2], [3], [4], [1])
    result = run(trace, capacity=1, window_seconds=2.0)
    assert result.evictions == 6
    assert result.thrashed == 1  # 0 after one second; 1 after four
    assert run(trace, capacity=1, window_seconds=4.0).thrashed == 2
    assert run(trace, capacity=1, window_seconds=None).thrash_percent is None


def model(trace, capacity, partial_misses):
    """The issue's four steps for LRU, written without ledger or policy: a list in order of age."""
    order, hits = [], 0
    for ids, tokens in zip(trace.requests(), trace.input_tokens.tolist()):
        if len(ids) > capacity:
            continue
        run = next((i for i, c in enumerate(ids) if c not in order), len(ids))
        partial = partial_misses and tokens % trace.block_size and run == len(ids)
        hits += run - bool(partial)
        others = [c for c in order if c not in ids]
        order = others[max(0, len(others) + len(ids) - capacity) :] + ids[::-1]
    return hits


@pytest.mark.parametrize("partial", ["hit", "miss"])
def test_lru_equals_the_rules_written_out(trie, partial):
    for seed in range(60):
        trace = trie(seed, requests=30, depth=5, fan=3)
        for capacity in (2, 4, 6, 9, 14):
            found = run(trace, "lru", capacity, partial_blocks=partial).block_hits
            assert found == model(trace, capacity, partial == "miss")


def leaf_only(trace, capacity):
    """LRU that may evict only blocks without a resident child."""
    parent, last, hits, now = {}, {}, 0, 0
    for ids in trace.requests():
        if len(ids) > capacity:
            continue
        parent.update(zip(ids[1:], ids))
        hits += next((i for i, c in enumerate(ids) if c not in last), len(ids))
        missing = [c for c in ids if c not in last]
        while len(last) + len(missing) > capacity:
            inner = {parent[c] for c in last if c in parent}
            leaves = [c for c in last if c not in inner and c not in ids]
            del last[min(leaves, key=last.get)]
        for content in reversed(ids):
            now += 1
            last[content] = now
    return hits


def test_tail_first_lru_is_leaf_only_lru(trie):
    for seed in range(150):
        trace = trie(seed, requests=30, depth=5, fan=3)
        for capacity in (3, 5, 8, 13):
            assert run(trace, "lru", capacity).block_hits == leaf_only(trace, capacity)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo"])
def test_a_stream_gives_the_results_of_the_whole(tmp_path, trie, policy, prefix):
    trace = trie(5, requests=300, depth=6, fan=3)
    stream = TraceStream(write_trace(trace, tmp_path / "t.jsonl"), piece=40)
    whole = run(trace, policy, 20, prefix=prefix, window_seconds=0.02)
    pieces = run(stream, policy, 20, prefix=prefix, window_seconds=0.02)
    assert vars(whole) == vars(pieces) and whole.thrashed


def test_thrash_equals_a_plain_count(trie):
    """Evictions by events, wanted again by a scan forward: no arrays."""
    trace = trie(9, requests=200, depth=5, fan=3)
    for policy in ("lru", "fifo", "random"):
        events = []
        result = run(trace, policy, 12, window_seconds=0.01, events=events.append)
        assert result.thrashed == _thrash_by_replay(trace, events, 10.0)


def _thrash_by_replay(trace, events, window_ms):
    content, gone, thrashed, request = {}, {}, 0, 0
    arrivals = trace.arrival_ms.tolist()
    for event in events:
        if event[0] == "reclaim":
            gone.update((content[i], arrivals[request]) for i in event[-1])
        if event[0] == "seal":
            content.update((row[0], row[1]) for row in event[1])
            for row in event[1]:
                left = gone.pop(row[1], None)
                thrashed += left is not None and arrivals[request] - left <= window_ms
        request += event[0] == "tick"
    return thrashed


def test_known_points_of_the_synthetic_trace(synthetic):
    counts = {("lru", 1000): 10_252, ("fifo", 1000): 10_262, ("lfu", 1000): 6_104}
    for (policy, capacity), hits in counts.items():
        assert run(synthetic, policy, capacity, window_seconds=None).block_hits == hits


@pytest.mark.parametrize(
    "more, complaint",
    [
        ({"policy": "lfru"}, "known: "),
        ({"capacity": 0}, "capacity_blocks=0"),
        ({"capacity": 2.5}, "whole number"),
        ({"partial_blocks": "no"}, "'hit' or 'miss'"),
        ({"prefix": False, "partial_blocks": "miss"}, "need prefix=True"),
        ({"shape": "gpt-9"}, "llama-3.1-8b"),
    ],
)
def test_bad_settings_are_refused(tiny, more, complaint):
    with pytest.raises(BadInput, match=complaint):
        run(tiny([0]), **more)


def test_an_instance_is_taken_as_it_is_and_an_empty_trace_is_fine(tiny):
    assert run(tiny([0], [0]), LRU()).block_hits == 1
    nothing = run(tiny())
    assert nothing.block_hit_percent == 0.0 and nothing.evictions_per_second == 0.0


def test_measurements_have_the_agreed_names(synthetic):
    rows = {m.name: m for m in run(synthetic, "lru", 1000).measurements()}
    assert np.isclose(rows["block_hit_percent"].value, 8.4118, atol=1e-4)
    assert rows["block_hit_percent"].better == "higher"
    assert {
        "token_hit_percent", "flops_saved_percent", "evictions", "evictions_per_second",
        "thrash_percent", "orphans", "miss_compulsory_percent",
    } <= set(rows)  # fmt: skip


def test_a_policy_may_be_given_in_any_way(tiny):
    trace = tiny([1, 2, 3], [1, 2, 4], [1, 2, 3])
    ways = ("lru", "kvlab.policy.LRU", LRU, LRU(), lambda: LRU())
    assert {simulate(trace, way, 4).block_hit_percent for way in ways} == {
        simulate(trace, "lru", 4).block_hit_percent}  # fmt: skip
    for wrong in (7, dict):
        with pytest.raises(BadInput, match="must be a name of a policy"):
            simulate(trace, wrong, 4)
