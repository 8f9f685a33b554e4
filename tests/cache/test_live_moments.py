"""Policies that go by requests hear of them in a live cache."""

from __future__ import annotations

import pytest
import torch

from kvlab.cache import CacheSpec, PagedCache
from kvlab.core import BadInput, CacheGeometry

WORDS = list(range(1, 18))


class Hand:
    """A clock that is set by hand."""

    now_ms = 0.0


def made(policy: str, **axes) -> tuple[PagedCache, Hand]:
    g = CacheGeometry(layers=1, query_heads=2, kv_heads=1, head_dim=4, block_size=4)
    spec = CacheSpec(format="fp32", block_size=4, policy=policy, prefix="hash", **axes)
    cache = PagedCache(g, spec)
    cache.moments.clock = Hand()
    return cache, cache.moments.clock


def serve(cache: PagedCache, ids, **said) -> int:
    """Tokens that were there already, of a request that is over."""
    seq = cache.open(ids, **said)
    hit = cache.length(seq)
    x = torch.zeros(1, 1, len(ids) - hit, 4)
    cache.tell(seq, ids[hit:])
    cache.begin([seq], [len(ids) - hit])
    cache.store(0, x, x)
    cache.commit()
    cache.close(seq)
    cache.check()
    return hit


def test_blocks_end_with_their_time():
    cache, hand = made("ttl", budget_blocks=20)
    assert [serve(cache, WORDS), serve(cache, WORDS)] == [0, 16]
    hand.now_ms = 299e3
    assert serve(cache, WORDS) == 16  # which renews it
    hand.now_ms = 500e3
    assert serve(cache, WORDS) == 16
    hand.now_ms = 801e3
    assert serve(cache, WORDS) == 0
    assert cache.stats().evictions == 4


def test_a_clock_that_runs_backwards_is_not_followed():
    cache, hand = made("ttl", budget_blocks=20)
    hand.now_ms = 400e3
    serve(cache, WORDS)
    hand.now_ms = 0.0
    assert serve(cache, WORDS) == 16


@pytest.mark.parametrize("policy", ["request_lfu", "request_arc", "ttl", "admit_cost", "wa_lru",
                                    "keep_until_return"])  # fmt: skip
def test_each_of_them_serves(policy):
    cache, hand = made(policy, budget_blocks=6)
    for at in range(12):
        hand.now_ms += 1000.0
        serve(cache, [at % 4 + 1, *WORDS], session=at % 4, tool=at % 2)
    assert cache.stats().evictions


@pytest.mark.parametrize(
    ("policy", "field"), [("wa_lru", "session"), ("keep_until_return", "tool")]
)
def test_what_nobody_says_is_refused(policy, field):
    cache, _ = made(policy, budget_blocks=6)
    with pytest.raises(BadInput, match=f"goes by the {field} of a request"):
        cache.open(WORDS)
    assert not cache.sequences.lengths
    cache.check()


def test_turns_count_requests_that_found_room():
    cache, _ = made("wa_lru", budget_blocks=6)
    first = cache.moments.next(3, 5, False)
    assert cache.moments.next(3, 5, False) == first
    cache.moments.begun(first)
    again = cache.moments.next(3, 5, True)
    assert (again.number, again.turn, again.tool) == (1, 1, True)


def test_without_shared_prefixes_there_is_nothing_to_go_by():
    with pytest.raises(BadInput, match="only prefix=hash keeps"):
        CacheSpec(policy="ttl", budget_blocks=4)
