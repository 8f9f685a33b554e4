"""Forks, all or none; and what else a caller may ask of sequences at the wrong time."""

from __future__ import annotations

import pytest
import torch
from driver import Driver, make
from test_copies import opened, state

from kvlab.blocks import BlockLedger
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.offload import OutOfHost, Shelf
from kvlab.pool import BlockPool, SlabStore
from kvlab.source import Digests, Summaries

AXES = [
    {},
    {"groups": "per_layer", "format": "int8"},
    {"prefix": "hash", "policy": "lru", "budget_blocks": 30},
    {"retrieval": "quest", "offload": "host", "policy": "lru", "budget_blocks": 16},
    {"summary": "merged", "policy": "fifo", "budget_blocks": 20},
]
POINTS = [(BlockLedger, "allocate"), (SlabStore, "_allocate"),
          (BlockPool, "write"), (BlockPool, "open_block"), (Digests, "fork"),
          (Shelf, "require"), (Summaries, "fork")]  # fmt: skip


def filled(axes) -> Driver:
    driver = Driver(make(**axes))
    a = opened(driver, range(15))
    driver.step([a], [15])
    driver.step([driver.open(), a], [6, 5])
    for _ in range(4):
        driver.step([a], [9 if axes.get("offload") else 1])
    brief = driver.open()  # what it evicts stays away, what it leaves is room
    driver.step([brief], [13])
    driver.close(brief)
    return driver


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_forks_that_fail_anywhere_leave_nothing(axes, monkeypatch):
    """Every allocation in turn fails; then the same forks succeed, and work."""
    driver = filled(axes)
    parents = [*sorted(driver.past), min(driver.past)]
    before, failed, left = state(driver.cache), 0, [0]

    def tripped(method):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise MemoryError("injected")
            return method(*args, **kwargs)
        return call

    with monkeypatch.context() as patch:
        for owner, name in POINTS:
            patch.setattr(owner, name, tripped(getattr(owner, name)))
        while True:
            left[0] = failed + 1
            try:
                children = driver.cache.fork_all(parents)
                break
            except MemoryError:
                failed += 1
            left[0] = 0
            driver.cache.check()
            assert state(driver.cache) == before, f"after failure {failed}"
    assert failed >= 3 * len(parents) - 1
    driver.cache.check()
    for child, parent in zip(children, parents):
        driver.past[child] = list(driver.past[parent])
    seqs = sorted(driver.past)
    driver.step(seqs, [1] * len(seqs))
    for seq in seqs:
        driver.close(seq)
    driver.cache.check()


def test_forks_that_find_no_host_memory_change_nothing(monkeypatch):
    """Room for the open tail has to be made, and what would leave has nowhere to go."""
    driver = Driver(make(offload="host", policy="lru", budget_blocks=4))
    seq = driver.open()
    driver.step([seq], [14])
    before = state(driver.cache)

    def full(shelf, count):
        raise OutOfHost(count, 0, 0)

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "require", full)
        with pytest.raises(OutOfHost):
            driver.cache.fork(seq)
    assert state(driver.cache) == before
    driver.step([driver.fork(seq), seq], [1, 1])
    driver.cache.check()


@pytest.mark.parametrize("axes", [{"policy": "none"}, {"policy": "lru"},
                                  {"policy": "fifo", "prefix": "hash"},
                                  {"policy": "lru", "groups": "per_layer"}], ids=str)  # fmt: skip
def test_too_many_forks_change_nothing(axes):
    driver = Driver(make(budget_blocks=5, **axes))
    seq = driver.open()
    driver.step([seq], [11])
    before = state(driver.cache)
    with pytest.raises(OutOfBlocks):
        driver.cache.fork_all([seq] * 7)
    assert state(driver.cache) == before
    driver.step([driver.fork(seq), seq], [1, 1])
    driver.cache.check()


def test_forks_of_full_blocks_take_no_room():
    driver = Driver(make(budget_blocks=3, policy="none"))
    seq = driver.open()
    driver.step([seq], [12])
    for child in driver.cache.fork_all([seq] * 9):
        driver.past[child] = list(driver.past[seq])
    driver.cache.check()
    assert driver.cache.stats().blocks == 3


UNKNOWN = {
    "close": lambda cache: cache.close(7), "fork": lambda cache: cache.fork(7),
    "truncate": lambda cache: cache.truncate(7, 0), "length": lambda cache: cache.length(7),
    "begin": lambda cache: cache.begin([7], [1]),
}  # fmt: skip


@pytest.mark.parametrize("verb", UNKNOWN)
def test_unknown_sequences_are_named(verb):
    driver = Driver(make())
    driver.step([driver.open()], [5])
    with pytest.raises(KvlabError, match="no sequence 7 is open"):
        UNKNOWN[verb](driver.cache)
    driver.cache.check()


def test_verbs_within_a_step():
    driver = Driver(make())
    a, b = driver.open(), driver.open()
    driver.step([a, b], [5, 6])
    before = state(driver.cache)
    driver.cache.begin([a], [7])
    with pytest.raises(KvlabError, match="no sequence can be forked within it"):
        driver.cache.fork(b)
    with pytest.raises(KvlabError, match="no sequence can be cropped within it"):
        driver.cache.truncate(b, 1)
    driver.cache.abort()
    assert state(driver.cache) == before
    with pytest.raises(KvlabError, match="no step is under way"):
        driver.cache.commit()
    with pytest.raises(KvlabError, match="no step is under way"):
        driver.cache.attend(0, *(torch.zeros(1, h, 1, 16) for h in (4, 2, 2)), scale=1.0)
    driver.cache.begin([a], [7])
    driver.close(a)  # its step goes with it
    driver.cache.check()
    driver.step([b], [3])


@pytest.mark.parametrize(("seqs", "counts", "key"), [
    ([0, 0], [1, 1], "seqs"), ([0], [-1], "counts"), ([0], [1, 1], "counts"),
])  # fmt: skip
def test_impossible_steps_are_refused(seqs, counts, key):
    driver = Driver(make())
    driver.step([driver.open()], [5])
    with pytest.raises(BadInput) as refused:
        driver.cache.begin(seqs, counts)
    assert refused.value.key == key
    driver.step([0], [1])


def test_a_prompt_longer_than_the_budget():
    """Nothing of it is known, so it opens; its room is asked for when it is reserved or begun."""
    cache = make(prefix="hash", policy="lru", budget_blocks=3)
    cache.close(cache.open(range(100)))
    with pytest.raises(OutOfBlocks):
        cache.open(range(100), reserve=100)
    seq = cache.open(range(100))
    with pytest.raises(OutOfBlocks):
        cache.begin([seq], [100])
    cache.close(seq)
    cache.check()
    assert cache.stats().blocks == 0 and not cache.sequences.lengths


@pytest.mark.parametrize(("budget", "cut", "fits"), [
    (2, [0], False), (2, [1], False), (3, [0], True), (3, [0, 1], True), (3, [1, 0], True),
    (2, [0, 1], False),
])  # fmt: skip
def test_crops_of_a_block_that_two_hold(budget, cut, fits):
    """Each needs an open copy, unless the other let go before; without room none is cropped."""
    driver = Driver(make(budget_blocks=budget, policy="none", layers=1))
    first = driver.open()
    driver.step([first], [8])
    pair, before = [first, driver.fork(first)], state(driver.cache)
    lengths = {pair[i]: 7 for i in cut}
    if not fits:
        with pytest.raises(OutOfBlocks):
            driver.cache.truncate_all(lengths)
        assert state(driver.cache) == before
        return
    for seq in lengths:
        driver.past[seq] = [(k[:7], v[:7]) for k, v in driver.past[seq]]
    driver.cache.truncate_all(lengths)
    driver.cache.check()
    driver.step(list(lengths), [1] * len(lengths))


@pytest.mark.parametrize("axes", [{}, {"offload": "host"}], ids=str)
def test_crops_of_several_rows_take_each_others_room(axes):
    """Room that one row's crop counts on is not taken for another's."""
    driver = Driver(make(budget_blocks=6, policy="lru", layers=1, **axes))
    a, b = driver.open(), driver.open()
    driver.step([a, b], [8, 8])
    c = driver.fork(a)
    driver.step([b], [5])
    for lengths in ({a: 6, c: 7, b: 9}, {b: 4, c: 5}):
        for seq, length in lengths.items():
            driver.past[seq] = [(k[:length], v[:length]) for k, v in driver.past[seq]]
        driver.cache.truncate_all(lengths)
        driver.cache.check()
        driver.step([a, b, c], [1, 1, 1])
