"""The chooser against its members: regret on the bundled traces, gain where LRU thrashes."""

from __future__ import annotations

import pytest
from flat_replay import accesses, replay

from kvlab.blocks import BlockLedger
from kvlab.policy import Adaptive, by_name

POINTS = 2.0  # of hit rate, the regret allowed


def hit_percent(contents, policy, capacity):
    return 100 * replay(contents, BlockLedger(capacity, policy)) / len(contents)


@pytest.mark.parametrize("capacity", [1000, 10_000])
def test_regret_on_a_bundled_trace(capacity):
    contents = accesses("mooncake_synthetic")
    best = max(
        hit_percent(contents, by_name(name), capacity)
        for name in ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "mq", "gdsf")
    )
    assert hit_percent(contents, Adaptive(), capacity) > best - POINTS


def test_a_scan_longer_than_the_cache():
    """LRU loses each block just before it comes again; to keep some, any, is better."""
    scan = list(range(60)) * 60
    assert hit_percent(scan, by_name("lru"), 40) == 0
    assert hit_percent(scan, Adaptive(memory=200), 40) > 30


def test_it_changes_its_mind():
    scan, local = list(range(60)) * 20, [c for base in range(1200) for c in (base, base + 30)]
    contents = scan + local + scan
    chooser = Adaptive(members=["lru", "lfu"], memory=200)
    both = hit_percent(contents, chooser, 40)
    assert both > max(hit_percent(contents, by_name(name), 40) for name in ("lru", "lfu")) - POINTS
    assert all(chooser.followed)


def test_one_member_is_that_member():
    contents = accesses("mooncake_synthetic")[:20_000]
    for name in ("lru", "s3fifo", "arc"):
        alone = hit_percent(contents, by_name(name), 500)
        assert hit_percent(contents, Adaptive(members=[name]), 500) == pytest.approx(alone, abs=0.5)
