"""The chooser against its members: regret on the bundled traces, gain where LRU thrashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from flat_replay import accesses, replay

from kvlab.blocks import BlockLedger
from kvlab.core import BadInput
from kvlab.policy import Adaptive, by_name
from kvlab.policy.adaptive import Choice
from kvlab.policy.shadows import followed, share_of
from kvlab.sim import load_trace, simulate, workloads

POINTS = 2.0  # of hit rate, the regret allowed


def hit_percent(contents, policy, capacity):
    return 100 * replay(contents, BlockLedger(capacity, policy)) / len(contents)


@pytest.mark.parametrize("capacity", [1000, 10_000])
def test_regret_on_a_bundled_trace(capacity):
    contents = accesses("mooncake_synthetic")[:60_000]
    best = max(
        hit_percent(contents, by_name(name), capacity)
        for name in ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "mq", "gdsf")
    )
    assert hit_percent(contents, Adaptive(), capacity) > best - POINTS


def test_a_scan_longer_than_the_cache():
    """LRU loses each block just before it comes again; to keep some, any, is better."""
    scan = list(range(60)) * 60
    assert hit_percent(scan, by_name("lru"), 40) == 0
    assert hit_percent(scan, Adaptive(), 40) > 30


def test_it_changes_its_mind():
    scan, local = list(range(60)) * 20, [c for base in range(1200) for c in (base, base + 30)]
    contents = scan + local + scan
    members = ["lru", "s3fifo"]
    chooser = Adaptive(members)
    both = hit_percent(contents, chooser, 40)
    assert both > max(hit_percent(contents, by_name(name), 40) for name in members) - POINTS
    assert all(chooser.followed)


def agents_sessions(capacity, policy):
    trace = load_trace(Path(__file__).parents[1] / "data" / "weka")
    return simulate(trace, policy, capacity, window_seconds=None).block_hit_percent


@pytest.mark.slow
@pytest.mark.parametrize("capacity, best", [(2000, "lru"), (4000, "pgdsf")])
def test_regret_on_sessions_of_agents(capacity, best):
    """Prompts nearly as large as the cache: a shadow that does not take them whole misleads."""
    fixed = agents_sessions(capacity, best)
    assert agents_sessions(capacity, "adaptive") > fixed - POINTS


def test_a_shadow_without_sampling_is_the_policy_alone(monkeypatch):
    trace = workloads.chats(requests=80)
    missed = []
    monkeypatch.setattr(Choice, "hear", lambda self, now, *_: missed.append(now) or 0)
    simulate(trace, Adaptive(), 600, window_seconds=None)
    for name, count in zip(("lru", "arc", "s3fifo", "mq", "pgdsf"), map(sum, zip(*missed))):
        alone = simulate(trace, name, 600, window_seconds=None)
        assert trace.accesses - count == alone.block_hits


def test_a_large_cache_is_followed_in_part():
    assert [share_of(c, 1024) for c in (None, 2047, 2048, 10_000)] == [1, 1, 2, 8]
    assert sum(followed(content, 8) for content in range(8000)) == pytest.approx(1000, rel=0.01)
    with pytest.raises(BadInput, match="patience >= 0"):
        Adaptive(patience=-1)


def test_one_member_is_that_member():
    contents = accesses("mooncake_synthetic")[:20_000]
    for name in ("lru", "s3fifo", "arc"):
        alone = hit_percent(contents, by_name(name), 500)
        assert hit_percent(contents, Adaptive(members=[name]), 500) == pytest.approx(alone, abs=0.5)
