"""Tiers in three modes, the third one, and what their copies cost."""

from __future__ import annotations

import pytest

from kvlab.core import BadInput
from kvlab.sim import CostModel, Host, from_requests, simulate, workloads
from kvlab.sim.queueing import Link

MODES = ("exclusive", "write_back", "write_through")


def one_by_one(*requests):
    rows = [(1e3 * n, 4 * len(ids), 0, ids) for n, ids in enumerate(requests)]
    return from_requests(rows, 4)


ROUNDS = one_by_one([0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5])


def of_host(trace, device, host):
    result = simulate(trace, "lru", device, host=host)
    return result.host_hits, result.tiers["host_written_blocks"]


@pytest.mark.parametrize(
    "mode, hits, written",
    [
        # 2 on the device, 4 on the host: all six have a place only if none has two
        ("exclusive", 6, 10), ("write_back", 4, 8), ("write_through", 0, 12),
    ],
)  # fmt: skip
def test_where_a_copy_stays_less_fits(mode, hits, written):
    assert of_host(ROUNDS, 2, Host(4, mode=mode)) == (hits, written)


@pytest.mark.parametrize("mode, written", [*zip(MODES, (10, 6, 6))])
def test_a_copy_that_stays_is_written_once(mode, written):
    assert of_host(ROUNDS, 2, Host(6, mode=mode)) == (6, written)


def test_write_through_writes_what_never_leaves():
    written = [of_host(one_by_one([0, 1]), 9, Host(9, mode=mode))[1] for mode in MODES]
    assert written == [0, 0, 2]


@pytest.mark.parametrize("mode, written", [*zip(MODES, (8, 6, 6))])
def test_a_third_tier_holds_what_the_host_gives_up(mode, written):
    two = simulate(ROUNDS, "lru", 2, host=Host(2))
    three = simulate(ROUNDS, "lru", 2, host=Host(2, behind=Host(6, mode=mode)))
    assert two.block_hits == 0 and three.block_hits == 6 == three.deep_hits
    assert three.host_hits == 0 and three.tiers["third_written_blocks"] == written
    names = {row.name for row in three.measurements()}
    assert {"third_hit_percent", "host_written_blocks", "third_dropped_blocks"} <= names


def test_tiers_that_hold_each_block_once_hit_as_often_as_one_cache_of_their_size():
    """Exclusive LRU tiers are one LRU list, cut in three."""
    trace = workloads.chats(300, open_chats=10, system_tokens=256, block_size=64)
    whole = simulate(trace, "lru", 900).block_hits
    host = Host(200, behind=Host(300))
    parts = simulate(trace, "lru", 400, host=host)
    assert parts.deep_hits and parts.host_hits
    assert abs(parts.block_hits - whole) <= 0.01 * whole


def test_copies_take_time_before_the_rest_is_computed():
    slow = CostModel(prefill_tokens_per_second=4.0, decode_tokens_per_second=1.0)
    pace = {"gigabytes_per_second": 1e-3, "latency_ms": 5.0}
    link = Link(Host(9, **pace, behind=Host(9, latency_ms=100.0)), slow, block_bytes=2e6)
    assert link.ms(0, 0) == 0 and link.ms(3, 0) == 5 + 3 * 2000 and link.ms(1, 1) == 2005 + 100
    t = from_requests([(0, 8, 0, [0, 1]), (10e3, 8, 0, [2, 3]), (20e3, 12, 0, [0, 1, 4])], 4)
    ttft = simulate(t, "lru", 3, host=Host(9, latency_ms=500.0), service=slow).service["ttft_ms"]
    # the third finds two blocks on the host and computes the third of them: 500 + 1000 ms
    assert ttft == pytest.approx((2000 + 2000 + 1500) / 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Host(9, mode="copy"), lambda: Host(9, gigabytes_per_second=0),
        lambda: Host(9, latency_ms=-1), lambda: Host(9, behind=Host(9, behind=Host(9))),
        lambda: simulate(ROUNDS, "lru", 2, host=Host(4, latency_ms=1.0)),
        lambda: simulate(ROUNDS, "lru", 2, host=Host(4, behind=Host(4, latency_ms=1.0))),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(BadInput):
        call()
