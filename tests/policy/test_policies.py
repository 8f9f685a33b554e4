"""Laws that every policy keeps, over the one list of `rows`."""

from __future__ import annotations

import random

import pytest
from rows import ROWS, Row

from kvlab import policy
from kvlab.blocks import SEALED, BlockLedger
from kvlab.core import BadInput, OutOfBlocks

CAPACITY = 12

every_policy = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def ledger_of(row: Row, blocks: int = CAPACITY) -> BlockLedger:
    """A full ledger of sealed blocks 0..n-1 with contents 0..n-1."""
    ledger = BlockLedger(CAPACITY, row.build())
    ids = ledger.allocate(blocks)
    ledger.seal(ids, content=ids, depth=ids)
    return ledger


def drain(ledger: BlockLedger) -> list[int]:
    return ledger.reclaim(ledger.evictable_count)


@every_policy
def test_pops_each_evictable_block_once(row):
    ledger = ledger_of(row)
    assert sorted(drain(ledger)) == list(range(CAPACITY))
    assert ledger.evictable_count == 0
    with pytest.raises(IndexError):
        ledger.policy.pop()
    with pytest.raises(OutOfBlocks):
        ledger.reclaim(1)


@every_policy
def test_length_and_membership_follow(row):
    ledger = ledger_of(row)
    assert len(ledger.policy) == CAPACITY
    (victim,) = ledger.reclaim(1)
    assert victim not in ledger.policy
    assert len(ledger.policy) == CAPACITY - 1
    assert all(id in ledger.policy for id in range(CAPACITY) if id != victim)


@every_policy
def test_removed_blocks_are_never_chosen(row):
    ledger = ledger_of(row)
    ledger.free([3, 7])
    assert set(drain(ledger)) == set(range(CAPACITY)) - {3, 7}


@every_policy
def test_pinned_blocks_are_never_chosen(row):
    ledger = ledger_of(row)
    ledger.pin([0, 5, 11])
    ledger.touch([5, 0])
    assert not {0, 5, 11} & set(drain(ledger))
    ledger.unpin([0, 5, 11])
    assert sorted(drain(ledger)) == [0, 5, 11]


@every_policy
def test_pin_and_unpin_change_no_choice(row):
    if row.by_pin:
        pytest.skip("what is offered decides over the next draw")
    plain, pinned = ledger_of(row), ledger_of(row)
    for ledger in (plain, pinned):
        ledger.touch([4, 1, 1, 9])
    pinned.pin([0, 1, 4, 6, 11])
    pinned.unpin([6, 0, 11, 4, 1])
    assert drain(plain) == drain(pinned)


@every_policy
def test_blocks_come_back_after_leaving(row):
    ledger = ledger_of(row)
    for step in range(6):
        victims = ledger.reclaim(5)
        ledger.free(victims)
        ids = ledger.allocate(5)
        ledger.seal(ids, content=range(100 * step, 100 * step + 5))
        ledger.check()
    assert sorted(drain(ledger)) == list(range(CAPACITY))


@every_policy
def test_use_protects(row):
    if not row.by_use:
        pytest.skip("this policy does not look at use")
    ledger = ledger_of(row)
    for _ in range(3):
        ledger.touch([1])
    assert 1 not in ledger.reclaim(CAPACITY - 1)


@every_policy
def test_same_verbs_give_same_victims(row):
    assert random_run(row, 7) == random_run(row, 7)


@every_policy
def test_random_verbs_keep_the_books(row):
    random_run(row, 11)


@every_policy
def test_order_is_that_of_the_metadata(row):
    """Against the plainest model: sort all evictable blocks at every choice."""
    if row.key is None:
        pytest.skip("the order of this policy is no function of the metadata")
    for seed in range(4):
        random_run(row, seed, steps=800, model=row.key)


@every_policy
def test_unbounded_ledger(row):
    ledger = BlockLedger(None, row.build())
    for start in range(0, 60, 6):
        ids = ledger.allocate(6)
        ledger.seal(ids, content=range(start, start + 6))
        ledger.touch(ids[::-2])
        ledger.free(ledger.reclaim(2))
        ledger.check()
    assert ledger.held_count == 40


def random_run(row: Row, seed: int, steps: int = 400, model=None) -> list[int]:
    """Victims of a random sequence of verbs; with a model, each one is the model's minimum."""
    draw = random.Random(seed)
    ledger, chosen = BlockLedger(CAPACITY, row.build()), []
    pins: list[int] = []
    for step in range(steps):
        sealed = [id for id in range(CAPACITY) if ledger.state(id) == SEALED]
        verb = draw.choice(
            ["fill", "fill", "touch", "touch", "pin", "unpin", "free", "score", "tick"]
        )
        if verb == "fill":
            chosen += fill(ledger, draw, step, model)
        elif verb == "touch":
            ledger.touch(draw.sample(sealed, min(len(sealed), 3)))
        elif verb == "pin" and sealed:
            pins.append(draw.choice(sealed))
            ledger.pin(pins[-1:])
        elif verb == "unpin" and pins:
            ledger.unpin([pins.pop(draw.randrange(len(pins)))])
        elif verb == "free" and sealed:
            free_unless_pinned(ledger, draw.choice(sealed))
        elif verb == "score" and sealed:
            ledger.score(draw.choice(sealed), draw.random())
        elif verb == "tick":
            ledger.tick()
        ledger.check()
    return chosen


def free_unless_pinned(ledger, id):
    if not ledger.meta(id).pins:
        ledger.free([id])


def fill(ledger, draw, step, model) -> list[int]:
    """Seal two new blocks, making room by the policy's choice where needed and possible."""
    victims = []
    while ledger.free_count < 2 and ledger.evictable_count:
        offered = [ledger.meta(id) for id in range(CAPACITY) if id in ledger.policy]
        (victim,) = ledger.reclaim(1)
        if model is not None:
            assert victim == min(offered, key=lambda meta: (model(meta), meta.id)).id
        ledger.free([victim])
        victims.append(victim)
    if ledger.free_count >= 2:
        ids = ledger.allocate(2)
        facts = [[draw.randrange(60) for _ in ids], [draw.randrange(4) for _ in ids]]
        levels = [draw.randrange(2) for _ in ids]
        ledger.seal(ids, facts[0], facts[1], levels, [1.0 + draw.random() for _ in ids])
    return victims


def test_every_policy_has_its_row():
    assert {row.name for row in ROWS} == set(policy.names()) - {"none"}


def test_no_eviction_says_so():
    ledger = ledger_of(Row("none", policy.NoEviction))
    assert ledger.evictable_count == 0
    ledger.check()
    with pytest.raises(OutOfBlocks, match="choose an eviction policy"):
        ledger.reclaim(1)


def test_names_make_policies():
    assert isinstance(policy.by_name("s3fifo", small=0.2), policy.S3FIFO)
    with pytest.raises(BadInput, match="known: adaptive, admit_cost"):
        policy.by_name("lrru")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("s3fifo", {"small": 1.5}),
        ("mq", {"queues": 0}),
        ("hybrid", {"half_life": 0}),
        ("priority", {"prefix_blocks": -1}),
        ("adaptive", {"members": []}),
        ("adaptive", {"members": ["lru", "mru"]}),
        ("belady", {}),
    ],
)
def test_senseless_parameters_are_refused(name, parameters):
    with pytest.raises(BadInput):
        policy.by_name(name, **parameters)
