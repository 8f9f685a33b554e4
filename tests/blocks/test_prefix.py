"""PrefixIndex and PrefixCache: chains, collisions, duplicates, reference counts."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.blocks import (
    FREE,
    SEALED,
    BlockLedger,
    NoPrefix,
    PrefixCache,
    PrefixIndex,
    chained_hashes,
    prefix,
)
from kvlab.core import BadInput, KvlabError
from kvlab.policy import LRU

TOKENS = list(range(100, 111))  # with blocks of 4: two whole ones and three tokens


def index(*sequences) -> PrefixIndex:
    """An index of blocks 0, 1, 2, ... for whole blocks of 4 tokens of each sequence."""
    made, id = PrefixIndex("model fp16", 4), 0
    for tokens in sequences:
        count = len(tokens) // 4
        made.insert(tokens, range(id, id + count))
        id += count
    made.check()
    return made


def test_matches_the_longest_run_of_whole_blocks():
    found = index(TOKENS)
    assert found.match(TOKENS) == [0, 1]
    assert found.match(TOKENS[:7]) == [0]
    assert found.match(TOKENS[:3]) == []
    assert found.match([*TOKENS[:4], 1, 2, 3, 4]) == [0]
    assert found.match([1, *TOKENS]) == []
    assert found.match([]) == []


def test_token_ids_may_be_any_integers():
    found = index(TOKENS)
    for kind in (np.int32, np.int64, np.uint16):
        assert found.match(np.array(TOKENS, dtype=kind)) == [0, 1]


def test_same_tokens_elsewhere_are_another_block():
    found = index([5, 5, 5, 5, 5, 5, 5, 5])
    assert found.match([5] * 12) == [0, 1]
    assert len(set(found.contents([5] * 12))) == 3


@pytest.mark.parametrize(("identity", "block_size"), [("model int4", 4), ("model fp16", 2)])
def test_chains_start_from_the_identity(identity, block_size):
    ours = chained_hashes("model fp16", 4, TOKENS)
    assert ours == index().contents(TOKENS) == NoPrefix("model fp16", 4).contents(TOKENS)
    assert not set(ours) & set(chained_hashes(identity, block_size, TOKENS))


def test_a_duplicate_keeps_the_earlier_block():
    found = index(TOKENS)
    longer = [*TOKENS[:8], 1, 2, 3, 4]
    assert found.insert(longer, [7, 8, 9]) == [0, 1, 9]
    assert found.match(longer) == [0, 1, 9]
    assert 7 not in found
    assert len(found) == 3


def test_a_gap_ends_the_match_and_closes_again():
    found = index(list(range(12)))
    found.forget(1)
    found.check()
    assert found.match(range(12)) == [0]
    assert found.insert(range(8), [0, 5]) == [0, 5]
    assert found.match(range(12)) == [0, 5, 2]


def test_forgetting_all_leaves_nothing():
    found = index(list(range(12)), [0, 1, 2, 3, 9, 9, 9, 9])
    assert found.match([0, 1, 2, 3, 9, 9, 9, 9]) == [0, 4]
    for id in (0, 2, 4, 1, 77):
        found.forget(id)
        found.check()
    assert len(found) == 0
    assert not found._nodes


def test_colliding_hashes_are_told_apart(monkeypatch):
    monkeypatch.setattr(prefix, "xxh3_64_intdigest", lambda data, seed=0: 42)
    found = index(list(range(8)), list(range(50, 58)))
    assert found.match(range(8)) == [0, 1]
    assert found.match(range(50, 58)) == [2, 3]
    assert found.match([*range(4), *range(54, 58)]) == [0]
    found.forget(0)
    assert found.match(range(50, 58)) == [2, 3]
    found.check()


def test_misuse_is_refused():
    found = index(TOKENS)
    with pytest.raises(BadInput, match="hole"):
        found.insert(range(8), [5, None])
    with pytest.raises(BadInput, match="fill fewer blocks"):
        found.insert(range(7), [5, 6])
    with pytest.raises(BadInput, match="another content"):
        found.insert(range(4), [0])
    with pytest.raises(BadInput, match="block_size"):
        PrefixIndex("m", 0)


def test_no_prefix_knows_nothing():
    none = NoPrefix("m", 4)
    assert none.insert(TOKENS, [3, 4]) == [3, 4]
    assert none.match(TOKENS) == []
    none.forget(3)
    assert len(none) == 0
    assert 3 not in none


def cache(capacity=4) -> PrefixCache:
    return PrefixCache(BlockLedger(capacity, LRU()), PrefixIndex("m", 4))


def fill(made: PrefixCache, tokens) -> list[int]:
    """Sealed blocks for the whole blocks of a sequence, as a prefill leaves them."""
    contents = made.index.contents(tokens)
    ids = made.ledger.allocate(len(contents), owner="seq")
    made.ledger.seal(ids, contents)
    return ids


def test_cached_prefixes_are_found_and_pinned():
    made = cache()
    handle = made.cache_prefix(TOKENS, fill(made, TOKENS))
    assert (handle.ids, handle.tokens) == ([0, 1], 8)
    assert made.ledger.meta(0).owner == "prefix"
    other = made.attach_prefix(TOKENS)
    assert other.ids == [0, 1]
    made.release_prefix(handle)
    made.release_prefix(handle)
    assert made.ledger.evictable_count == 0
    made.release_prefix(other)
    assert made.evict(1) == [1]  # tail first
    assert made.attach_prefix(TOKENS).ids == [0]


def test_without_pin_the_policy_decides():
    made = cache()
    made.cache_prefix(TOKENS, fill(made, TOKENS), pin=False)
    assert made.ledger.evictable_count == 2
    assert made.attach_prefix(list(range(8))).ids == []


def test_a_duplicate_gives_way():
    made = cache()
    first = made.cache_prefix(TOKENS, fill(made, TOKENS))
    second = made.cache_prefix(TOKENS, fill(made, TOKENS))
    assert second.ids == first.ids == [0, 1]
    assert [made.ledger.state(id) for id in range(4)] == [SEALED, SEALED, FREE, FREE]


def test_drop_waits_for_readers():
    made = cache()
    handle = made.cache_prefix(TOKENS, fill(made, TOKENS))
    made.drop(handle.ids)
    assert made.attach_prefix(TOKENS).ids == []
    assert made.ledger.held_count == 2
    made.release_prefix(handle)
    assert made.ledger.held_count == 0
    made.ledger.check()


def test_open_blocks_are_not_shared():
    made = cache()
    with pytest.raises(KvlabError, match="not sealed"):
        made.cache_prefix(TOKENS, made.ledger.allocate(2))
