"""Requests in flight, output blocks, stalls, and the host tier."""

import json

import pytest

from kvlab.core import BadInput
from kvlab.sim import CostModel, Host, from_requests, simulate
from kvlab.sim.service import recompute_cost
from kvlab.sim.sizes import SHAPES

INSTANT = CostModel(float("inf"), float("inf"), chunk_tokens=None)
# 4 tokens (one block) take a second to prefill, an output token takes a second
SLOW = CostModel(4.0, 1.0, chunk_tokens=None)


def trace(*rows):
    """Rows of (second, block ids, output tokens), blocks of 4 tokens."""
    return from_requests([(1e3 * at, 4 * len(ids), out, ids) for at, ids, out in rows], 4)


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu", "arc"])
def test_instant_service_is_one_request_at_a_time(trie, policy):
    """Without output tokens: those take blocks even if for no time."""
    for seed in range(25):
        t = trie(seed, requests=40, depth=5, fan=3)
        t = from_requests(
            [(a, n, 0, i) for a, n, i in zip(t.arrival_ms, t.input_tokens, t.requests())], 4
        )
        for capacity in (5, 8, 13):
            alone = vars(simulate(t, policy, capacity))
            served = vars(simulate(t, policy, capacity, service=INSTANT))
            assert served.pop("service")["stalled_requests"] == 0
            assert alone.pop("service") == {}
            assert alone == served


def test_running_requests_pin_their_blocks(tiny):
    t = trace((0, [0, 1], 10), (5, [2, 3], 1), (100, [0, 1], 1))
    # the second comes while the first decodes: 2 + 3 output blocks are held of 8, 2 + 1 more fit
    result = simulate(t, "lru", 8, service=SLOW)
    assert result.block_hits == 2 and result.service["stalled_requests"] == 0
    assert result.service["peak_in_flight_requests"] == 2
    assert result.service["peak_pinned_blocks"] == 8


def test_a_request_waits_for_room_and_says_so():
    t = trace((0, [0, 1], 4), (1, [2, 3], 0))
    result = simulate(t, "lru", 4, service=SLOW)
    # the first holds 2 + 1 blocks until 2 s of prefill and 4 s of decode are over
    assert result.service["stalled_requests"] == 1
    assert result.service["stall_max_ms"] == 5_000
    # first token: 2 s for the first; waiting 5 s and prefilling 2 s for the second
    assert result.service["ttft_ms"] == (2_000 + 7_000) / 2
    assert result.evictions == 0  # the output block was freed


def test_blocks_are_found_once_the_prompt_is_computed():
    early = trace((0, [0, 1], 9), (1, [0, 1], 9))  # the first prefills until 2 s
    late = trace((0, [0, 1], 9), (3, [0, 1], 9))
    assert simulate(early, "lru", 20, service=SLOW).block_hits == 0
    assert simulate(late, "lru", 20, service=SLOW).block_hits == 2


def test_duplicates_of_a_running_prompt_are_dropped_at_its_end():
    t = trace((0, [0, 1], 9), (1, [0, 1], 9), (50, [5, 6, 7, 8], 0))
    result = simulate(t, "lru", 10, service=SLOW)
    assert result.evictions == 0  # 0 and 1 once, 5..8: the second copy was given back


def test_what_can_never_fit_is_refused():
    result = simulate(trace((0, [0, 1], 12), (1, [2], 0)), "lru", 4, service=SLOW)
    assert result.refused_requests == 1 and result.misses["refused"] == 2


def test_hits_shorten_the_time_to_first_token():
    t = trace((0, [0, 1, 2], 0), (60, [0, 1, 2, 3], 0))
    ttft = simulate(t, "lru", 20, service=SLOW).service["ttft_ms"]
    assert ttft == (3_000 + 1_000) / 2
    # a full hit still recomputes the last token, for its logits
    again = simulate(trace((0, [0], 0), (60, [0], 0)), "lru", 20, service=SLOW)
    assert again.service["ttft_ms"] == (1_000 + 250) / 2


def test_arrivals_must_not_go_back():
    with pytest.raises(BadInput, match="arrives before"):
        simulate(trace((5, [0], 0), (1, [1], 0)), service=SLOW)


def test_cost_model_from_a_run(tmp_path):
    rows = [
        {"name": "prefill_tokens_per_second", "value": 100.0},
        {"name": "prefill_tokens_per_second", "value": 300.0},
        {"name": "decode_tokens_per_second", "value": 7.0},
    ]
    path = tmp_path / "measurements.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(BadInput, match="decode_tokens_per_second"):
        CostModel.measured(tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert CostModel.measured(tmp_path) == CostModel(200.0, 7.0)
    with pytest.raises(BadInput, match="more than 0"):
        CostModel(prefill_tokens_per_second=0)


def test_recompute_cost_grows_with_depth():
    cost = recompute_cost(SHAPES["llama-3.1-8b"], 512)
    shape = SHAPES["llama-3.1-8b"]
    assert cost(0) == 512
    flops = shape.prefill_flops(8 * 512) - shape.prefill_flops(7 * 512)
    assert cost(7) == pytest.approx(512 * flops / shape.prefill_flops(512))


# -- tiers ------------------------------------------------------------------------------------


def test_evicted_blocks_are_found_on_the_host(tiny):
    t = tiny([0, 1], [2, 3], [0, 1])
    result = simulate(t, "lru", 2, host=Host(4))
    assert (result.block_hits, result.host_hits, result.device_hits) == (2, 2, 0)
    assert result.misses["capacity"] == 0 and result.evictions == 4


def test_device_and_host_are_one_lru_when_exclusive(trie):
    """Blocks live in one tier only, and LRU keeps the hot part of one stack on the device."""
    for seed in range(30):
        t = trie(seed, requests=40, depth=4, fan=3)
        both = simulate(t, "lru", 6, host=Host(7))
        one = simulate(t, "lru", 13)
        device = simulate(t, "lru", 6)
        assert both.block_hits == one.block_hits
        assert both.device_hits == device.block_hits


def test_a_chain_goes_on_over_both_tiers(tiny):
    # FIFO breaks the chain on the device; the host has the missing piece
    t = tiny([0, 1], [0, 1, 2], [3], [0, 1, 2])
    assert simulate(t, "fifo", 3).misses["broken_chain"] == 1
    result = simulate(t, "fifo", 3, host=Host(4))
    assert result.misses["broken_chain"] == 0
    assert (result.block_hits, result.host_hits) == (5, 1)


def test_host_evictions_are_counted_apart(tiny):
    result = simulate(tiny([0], [1], [2], [3], [0]), "lru", 1, host=Host(1, "fifo"))
    assert result.evictions == 4 and result.host_evictions == 3
    assert result.block_hits == 0
