"""BlockLedger: states, pins, owners, and what each verb refuses."""

from __future__ import annotations

import pytest

from kvlab.blocks import FREE, LEAVING, OPEN, SEALED, BlockLedger, BlockStateError
from kvlab.core import BadInput, OutOfBlocks
from kvlab.policy import ARC, LRU


def sealed(count=4, capacity=4, policy=None) -> BlockLedger:
    ledger = BlockLedger(capacity, LRU() if policy is None else policy)
    ids = ledger.allocate(count)
    ledger.seal(ids, content=[100 + id for id in ids])
    return ledger


def test_lowest_free_ids_first():
    ledger = BlockLedger(6)
    assert ledger.allocate(5) == [0, 1, 2, 3, 4]
    ledger.free([3, 0, 2])
    assert ledger.allocate(4) == [0, 2, 3, 5]
    assert (ledger.free_count, ledger.held_count) == (0, 6)


def test_a_block_passes_through_its_states():
    ledger = BlockLedger(1, LRU())
    assert ledger.state(0) == FREE
    (id,) = ledger.allocate(1, owner="me")
    assert (ledger.state(id), ledger.meta(id).owner) == (OPEN, "me")
    ledger.seal([id], content=[7], depth=[3], level=[1], cost=[2.5], parent=[6])
    meta = ledger.meta(id)
    facts = (meta.content, meta.depth, meta.level, meta.cost, meta.parent, meta.hits)
    assert (ledger.state(id), facts) == (SEALED, (7, 3, 1, 2.5, 6, 0))
    assert ledger.reclaim(1) == [id]
    assert ledger.state(id) == LEAVING
    assert ledger.meta(id).content == 7  # still readable
    ledger.free([id])
    assert ledger.state(id) == FREE
    ledger.check()


def test_allocate_never_evicts():
    ledger = sealed()
    with pytest.raises(OutOfBlocks, match="1 asked, 0 free of 4"):
        ledger.allocate(1)
    assert ledger.evictable_count == 4


def test_reclaim_is_all_or_nothing():
    ledger = sealed()
    ledger.pin([0, 1])
    with pytest.raises(OutOfBlocks):
        ledger.reclaim(3)
    assert ledger.evictable_count == 2


def test_open_and_leaving_blocks_are_not_evictable():
    ledger = sealed(count=2)
    ledger.allocate(1)
    ledger.reclaim(1)
    assert ledger.evictable_count == 1
    ledger.check()


def test_pins_count():
    ledger = sealed()
    ledger.pin([0, 0])
    ledger.unpin([0])
    assert 0 not in ledger.reclaim(3)
    ledger.unpin([0])
    assert ledger.reclaim(1) == [0]


def test_an_open_block_pinned_is_sealed_pinned():
    ledger = BlockLedger(2, ARC())
    ids = ledger.allocate(2)
    ledger.pin([0])
    ledger.seal(ids)
    assert ledger.evictable_count == 1
    ledger.unpin([0])
    assert ledger.evictable_count == 2
    ledger.check()


@pytest.mark.parametrize("policy", [LRU, ARC])
def test_a_pinned_block_is_freed_at_its_last_unpin(policy):
    ledger = sealed(policy=policy())
    ledger.pin([2, 2])
    ledger.free([2])
    assert ledger.state(2) == SEALED  # readable for those who pinned it
    assert ledger.meta(2).owner is None
    ledger.unpin([2])
    ledger.touch([2])
    ledger.check()
    ledger.unpin([2])
    assert ledger.state(2) == FREE
    assert ledger.allocate(1) == [2]
    ledger.check()


def test_leaving_blocks_can_be_pinned_for_a_spill():
    ledger = sealed()
    (victim,) = ledger.reclaim(1)
    ledger.pin([victim])
    ledger.free([victim])
    assert ledger.state(victim) == LEAVING
    ledger.unpin([victim])
    assert ledger.state(victim) == FREE


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("seal", ([0],)),
        ("touch", ([4],)),
        ("touch", ([5],)),
        ("score", (4, 0.5)),
        ("pin", ([5],)),
        ("unpin", ([0],)),
        ("free", ([5],)),
        ("free", ([-1],)),
        ("free", ([99],)),
        ("meta", (5,)),
    ],
)
def test_wrong_state_is_refused(verb, arguments):
    ledger = sealed(count=4, capacity=6)
    ledger.allocate(1)  # block 4 is open, block 5 free
    with pytest.raises(BlockStateError, match="block"):
        getattr(ledger, verb)(*arguments)


def test_freed_twice_is_refused_even_if_pinned():
    ledger = sealed()
    ledger.pin([1])
    ledger.free([1])
    with pytest.raises(BlockStateError):
        ledger.free([1])


def test_unbounded():
    ledger = BlockLedger(None)
    assert ledger.allocate(1000) == list(range(1000))
    assert ledger.free_count is None
    ledger.free(range(10))
    assert ledger.held_count == 990
    assert ledger.allocate(1) == [0]


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_ledger_of_nothing_is_refused(capacity):
    with pytest.raises(BadInput, match="at least 1 block"):
        BlockLedger(capacity)


def test_stamps_never_repeat():
    ledger = sealed()
    ledger.touch([3, 2, 2])
    ledger.tick()
    ledger.touch([0])
    stamps = [ledger.meta(id).last for id in range(4)]
    assert len(set(stamps)) == 4
    assert ledger.meta(2).hits == 2
    assert sorted(stamps) == [2, 5, 7, 9]


def test_admit_is_reclaim_free_allocate_seal():
    plain, fused = sealed(), sealed()
    contents = [200, 201, 202, 203, 204, 205]
    ids, gone = fused.admit(contents)
    expected_ids, expected_gone = [], []
    for content in contents:
        (victim,) = plain.reclaim(1, [content])
        expected_gone.append(plain.meta(victim).content)
        plain.free([victim])
        expected_ids += plain.allocate(1)
        plain.seal(expected_ids[-1:], [content])
    assert (ids, gone) == (expected_ids, expected_gone)
    assert [plain.meta(i).last for i in range(4)] == [fused.meta(i).last for i in range(4)]
    fused.check()


def test_admit_takes_free_blocks_first():
    ledger = sealed(count=2)
    assert ledger.admit([200, 201, 202]) == ([2, 3, 0], [100])


def test_admit_where_all_is_pinned():
    ledger = sealed()
    ledger.pin(range(4))
    with pytest.raises(OutOfBlocks):
        ledger.admit([200])


def test_events_name_each_verb():
    events = []
    ledger = BlockLedger(2, LRU(), events=events.append)
    ids = ledger.allocate(2, owner=9)
    ledger.pin(ids)
    ledger.seal(ids, content=[5, 6])
    ledger.touch(reversed(ids))
    ledger.unpin(ids)
    ledger.score(0, 0.5)
    ledger.tick()
    ledger.free(ledger.reclaim(1))
    assert [event[0] for event in events] == [
        "allocate", "pin", "seal", "touch", "unpin", "score", "tick", "reclaim", "free",
    ]  # fmt: skip
    assert events[0] == ("allocate", [0, 1], 9)
    assert events[7] == ("reclaim", 1, [], [1])
