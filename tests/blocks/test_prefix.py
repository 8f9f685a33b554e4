"""PrefixIndex: chains, collisions, gaps; what `Prefixes` keeps of what sequences computed."""

from __future__ import annotations

import numpy as np
import pytest
from house import House

from kvlab.blocks import (
    FREE,
    SEALED,
    BlockLedger,
    Chain,
    Ground,
    Holding,
    Prefixes,
    PrefixIndex,
    Sequences,
    Serving,
    chain,
    chained_hashes,
    leading,
    prefix,
)
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.policy import LRU

TOKENS = list(range(100, 111))  # with blocks of 4: two whole ones and three tokens
NAME = "model fp16"


def index(*sequences) -> PrefixIndex:
    """An index of blocks 0, 1, 2, ... for whole blocks of 4 tokens of each sequence, those that
    are known already left out."""
    made, id = PrefixIndex(NAME, 4), 0
    for tokens in sequences:
        found = made.lookup(Chain(NAME, 4, tokens))
        new = [i for i, block in enumerate(found) if block is None]
        made.add(Chain(NAME, 4, tokens), new, range(id, id + len(new)))
        id += len(new)
    made.check()
    return made


def match(made: PrefixIndex, tokens) -> list[int]:
    found = made.lookup(Chain(NAME, 4, tokens))
    return found[: leading(found)]


def test_matches_the_longest_run_of_whole_blocks():
    found = index(TOKENS)
    assert match(found, TOKENS) == [0, 1]
    assert match(found, TOKENS[:7]) == [0]
    assert match(found, TOKENS[:3]) == []
    assert match(found, [*TOKENS[:4], 1, 2, 3, 4]) == [0]
    assert match(found, [1, *TOKENS]) == []
    assert match(found, []) == []


def test_token_ids_may_be_any_integers():
    found = index(TOKENS)
    for kind in (np.int32, np.int64, np.uint16):
        assert match(found, np.array(TOKENS, dtype=kind)) == [0, 1]


def test_same_tokens_elsewhere_are_another_block():
    found = index([5, 5, 5, 5, 5, 5, 5, 5])
    assert match(found, [5] * 12) == [0, 1]
    assert len(set(chained_hashes(NAME, 4, [5] * 12))) == 3


@pytest.mark.parametrize(("identity", "block_size"), [("model int4", 4), (NAME, 2)])
def test_chains_start_from_the_identity(identity, block_size):
    ours = chained_hashes(NAME, 4, TOKENS)
    assert ours == Chain(NAME, 4, TOKENS).names()
    assert not set(ours) & set(chained_hashes(identity, block_size, TOKENS))


def test_a_content_is_held_once():
    found = index(TOKENS, [*TOKENS[:8], 1, 2, 3, 4])
    assert match(found, [*TOKENS[:8], 1, 2, 3, 4]) == [0, 1, 2]
    with pytest.raises(BadInput, match="holds this content already"):
        found.add(Chain(NAME, 4, TOKENS), [1], [7])
    assert 7 not in found
    assert len(found) == 3


def test_a_gap_ends_the_match_and_closes_again():
    found, twelve = index(list(range(12))), Chain(NAME, 4, range(12))
    assert found.drop([1, 99]) == [twelve.names()[1]]
    found.check()
    assert found.lookup(twelve) == [0, None, 2]
    found.add(twelve, [1], [5])
    assert match(found, range(12)) == [0, 5, 2]


def test_forgetting_all_leaves_nothing():
    found = index(list(range(12)), [0, 1, 2, 3, 9, 9, 9, 9])
    assert match(found, [0, 1, 2, 3, 9, 9, 9, 9]) == [0, 3]
    for id in (0, 2, 3, 1, 77):
        found.drop([id])
        found.check()
    assert len(found) == 0
    assert not found._nodes


def test_colliding_hashes_are_told_apart(monkeypatch):
    for module in (prefix, chain):
        monkeypatch.setattr(module, "xxh3_64_intdigest", lambda data, seed=0: 42)
    found = index(list(range(8)), list(range(50, 58)))
    assert match(found, range(8)) == [0, 1]
    assert match(found, range(50, 58)) == [2, 3]
    assert match(found, [*range(4), *range(54, 58)]) == [0]
    found.drop([0])
    assert match(found, range(50, 58)) == [2, 3]
    found.check()


def test_misuse_is_refused():
    found = index(TOKENS)
    with pytest.raises(BadInput, match="another content"):
        found.add(Chain(NAME, 4, range(4)), [0], [0])
    with pytest.raises(BadInput, match="block_size"):
        PrefixIndex("m", 0)


# ---- prefixes that are kept


def made(capacity=4) -> Prefixes:
    ground = Ground(BlockLedger(capacity, LRU()), 4)
    group = Holding(Serving(ground, index=PrefixIndex("m", 4)))
    return Prefixes(Sequences([group], "m"))


def serve(kept: Prefixes, tokens, close=True) -> int:
    """A request that is over, or still there."""
    sequences = kept.sequences
    seq, _ = sequences.open(tokens)
    sequences.begin([seq], [len(tokens) - sequences.length(seq)])
    sequences.commit()
    if close:
        sequences.close([seq])
    return seq


def test_kept_prefixes_are_found_and_pinned():
    kept = made()
    ledger = kept.groups[0].ledger
    serve(kept, TOKENS)
    handle = kept.keep(TOKENS)
    assert (len(handle.ids), handle.tokens) == (2, 8)
    other = kept.attach(TOKENS)
    assert other.ids == handle.ids
    kept.release(handle)
    kept.release(handle)
    assert ledger.evictable_count == 0
    with pytest.raises(OutOfBlocks):
        kept.groups[0].room.make(3)
    kept.release(other)
    kept.groups[0].room.evict(1)  # tail first
    assert kept.attach(TOKENS).ids == handle.ids[:1]
    with pytest.raises(KvlabError, match="not pinned in this cache"):
        kept.release(made().attach(TOKENS))


def test_without_pin_the_policy_decides():
    kept = made()
    serve(kept, TOKENS)
    assert kept.keep(TOKENS, pin=False).tokens == 8
    assert kept.groups[0].ledger.evictable_count == 2


def test_what_two_compute_at_once_is_kept_once():
    kept = made(capacity=6)
    sequences, ledger = kept.sequences, kept.groups[0].ledger
    rows = [sequences.open(TOKENS[:8])[0] for _ in range(2)]
    sequences.begin(rows, [8, 8])
    sequences.commit()
    assert ledger.held_count == 2
    first, second = (kept.groups[0].tables[row].ids for row in rows)
    assert first == second
    sequences.close(rows)
    assert [ledger.state(id) for id in range(4)].count(SEALED) == 2
    assert ledger.evictable_count == 2


def test_what_is_dropped_in_use_waits_for_its_readers():
    kept = made()
    ledger = kept.groups[0].ledger
    seq = serve(kept, TOKENS[:8], close=False)
    kept.renew("another model")
    assert kept.attach(TOKENS).ids == []
    assert ledger.held_count == 2
    kept.sequences.close([seq])
    assert ledger.held_count == 0
    ledger.check()


def test_open_blocks_are_not_shared():
    kept = made()
    serve(kept, TOKENS[:3], close=False)
    assert kept.keep(TOKENS[:3]).tokens == 0
    assert kept.groups[0].ledger.state(1) == FREE


def test_a_house_of_two_groups_hits_in_both_or_in_none():
    house = House("lru", "serving", 8, groups=2)
    house.open([1, 0] * 3)
    house.close(0)
    house.sequences.groups[1].room.evict(3)
    assert house.sequences.hits(house.sequences.chain([1, 0] * 3)) == (0, 0)
    house.check()
    house.settle()
