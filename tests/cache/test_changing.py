"""The model changes under a live cache: nothing of before is found, nothing leaks, nobody stops."""

from __future__ import annotations

import random

import pytest
import torch
from driver import SCALE, held_bytes, make

from kvlab.blocks import HashSharing
from kvlab.cache import ModelFacts
from kvlab.core import KvlabError, OutOfBlocks

SIZE = 4


def cache_of(hold=True, **axes):
    return make(prefix=HashSharing(hold=hold), policy="lru", **{"budget_blocks": 40} | axes)


def step(cache, seqs, counts, told=None):
    g, longest = cache.geometry, max(counts)
    for seq, ids in zip(seqs, told or ()):
        cache.tell(seq, ids)
    cache.begin(seqs, counts)
    for layer in range(g.layers):
        q = torch.randn(len(seqs), g.query_heads, longest, g.head_dim)
        k, v = torch.randn(2, len(seqs), g.kv_heads, longest, g.head_dim)
        cache.attend(layer, q, k, v, scale=SCALE)
    cache.commit()


def run(cache, ids):
    """Open, compute what is missing; the sequence, and how much was there."""
    seq = cache.open(ids)
    known = cache.length(seq)
    step(cache, [seq], [len(ids) - known])
    return seq, known


def change(cache, name):
    cache.lineage.facts = ModelFacts(name)


WORDS = list(range(1, 22))


@pytest.mark.parametrize("hold", [True, False])
def test_nothing_of_an_earlier_identity_is_found(hold):
    cache = cache_of(hold)
    for name, known in (("", 0), ("", 20), ("b", 0), ("b", 20), ("", 0), ("", 20)):
        change(cache, name)
        seq, found = run(cache, WORDS)
        assert found == known
        cache.close(seq)
        cache.check()
    assert cache.renewals == 2
    assert cache.audit()[2]["never_seen"] == 5  # not "evicted": it is another content


@pytest.mark.parametrize("hold", [True, False])
def test_a_running_sequence_is_never_known_again(hold):
    cache = cache_of(hold)
    seq, _ = run(cache, WORDS)
    change(cache, "b")
    step(cache, [seq], [8], [range(22, 30)])
    cache.recheck()
    change(cache, "")
    cache.recheck()
    step(cache, [seq], [8], [range(30, 38)])
    child = cache.fork(seq)
    cache.close(seq)
    cache.close(child)
    assert run(cache, list(range(1, 38)))[1] == 0
    cache.check()


def test_a_change_seen_only_when_the_request_ends():
    cache = cache_of()
    seq, _ = run(cache, WORDS)
    assert cache.prefix_tokens == 20
    change(cache, "b")
    cache.close(seq)
    assert (cache.prefix_tokens, cache.stats().blocks, held_bytes(cache)) == (0, 0, 0)


def test_known_blocks_behind_a_gap_do_not_return_to_a_changed_model():
    cache = cache_of(budget_blocks=8)
    seq, _ = run(cache, WORDS)
    cache.close(seq)
    share = cache.groups[0].held
    first = share.known.found(cache.sequences.chain(WORDS))[1]
    cache.groups[0].ledger.pin([b for b in share.known.blocks if b != first])
    cache.groups[0].held.room.evict(1)
    cache.groups[0].ledger.unpin(list(share.known.blocks))
    seq = cache.open(WORDS)
    assert cache.length(seq) == 4 and share.claims[seq].kept
    change(cache, "b")
    cache.recheck()
    assert not share.claims[seq].kept
    step(cache, [seq], [17])
    cache.check()
    cache.close(seq)
    cache.check()
    assert cache.stats().blocks == 0


def test_a_sequence_kept_apart_leaves_what_it_shared_before():
    cache = cache_of()
    seq, _ = run(cache, WORDS)
    cache.keep_apart(seq)
    cache.keep_apart(seq)
    step(cache, [seq], [8], [range(22, 30)])
    cache.close(seq)
    assert run(cache, list(range(1, 30)))[1] == 20
    cache.check()


def test_a_sequence_of_two_models_keeps_nothing_by_name():
    cache = cache_of()
    seq, _ = run(cache, WORDS)
    change(cache, "b")
    with pytest.raises(KvlabError, match="since a running sequence began"):
        cache.cache_prefix(WORDS, seq=seq)
    assert cache.cache_prefix(WORDS).tokens == 0


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("groups", ["all", "per_layer"])
@pytest.mark.parametrize("hold", [True, False])
def test_random_lives_under_a_changing_model(hold, groups, offload):
    draw = random.Random(f"{hold} {groups} {offload}")
    cache = cache_of(hold, groups=groups, offload=offload, budget_blocks=16)
    live: dict[int, list[int]] = {}
    made: set[tuple] = set()  # (identity, beginning) that some sequence has computed

    def opened():
        ids = [draw.randrange(1, 3) for _ in range(draw.randrange(2, 20))]
        seq = cache.open(ids)
        known = cache.length(seq)
        assert not known or (cache.identity, *ids[:known]) in made
        try:
            step(cache, [seq], [len(ids) - known])
        except OutOfBlocks:
            cache.abort()
            cache.close(seq)
            return
        live[seq] = ids
        made.update((cache.identity, *ids[:n]) for n in range(SIZE, len(ids) + 1, SIZE))

    def grown():
        seq, new = draw.choice(list(live)), [draw.randrange(1, 3) for _ in range(5)]
        step(cache, [seq], [5], [new])
        live[seq] = live[seq] + new
        if not getattr(cache.sequences.chains[seq], "outdated", False):
            whole = range(SIZE, len(live[seq]) + 1, SIZE)
            made.update((cache.identity, *live[seq][:n]) for n in whole)

    def cropped():
        seq = draw.choice(list(live))
        length = draw.randrange(1, len(live[seq]) + 1) // SIZE * SIZE or 1
        cache.truncate(seq, length)
        live[seq] = live[seq][:length]

    def forked():
        seq = draw.choice(list(live))
        live[cache.fork(seq)] = live[seq]

    def closed():
        seq = draw.choice(list(live))
        del live[seq]
        cache.close(seq)

    def changed():
        change(cache, draw.choice(sorted(set("abc") - {cache.facts.identity})))
        cache.recheck()
        assert cache.prefix_tokens == 0 and not cache.prefixes.handles
        made.clear()

    def attached():
        cache.attach_prefix([1, 2] * 4)

    for _ in range(150):
        act = draw.choice([opened, opened, grown, grown, cropped, forked, closed, changed,
                           attached] if live else [opened])
        try:
            act()
        except (OutOfBlocks, KvlabError):
            cache.abort()
        cache.check()
    cache.close_all(list(live))
    cache.drop_prefixes()
    cache.check()
    assert cache.stats().blocks == 0 and held_bytes(cache) == 0
