"""Many at a time are one after the other: verbs for many blocks give what single verbs give."""

import random

import pytest
from rows import ROWS

from kvlab.blocks import BlockLedger, replay
from kvlab.policy import LRU, EvictionPolicy

BULK = ("add_all", "touch_all", "hold_all", "release_all", "pop_all")


def single(policy: EvictionPolicy) -> EvictionPolicy:
    """The same policy with the verbs for many as the base class has them."""
    kind = type(policy)
    plain = {verb: getattr(EvictionPolicy, verb) for verb in BULK}
    policy.__class__ = type("Single", (kind,), {**plain, "name": kind.name, "__module__": "kvlab."})
    return policy


def used(ledger: BlockLedger, seed: int) -> None:
    draw, sealed, pinned = random.Random(seed), [], []
    for at in range(60):
        count = draw.randint(1, 6)
        short = count - ledger.free_count
        if short > ledger.evictable_count:
            ledger.unpin(pinned)
            pinned = []
            short = min(short, ledger.evictable_count)
        gone = ledger.reclaim(short, [at * 10 + i for i in range(short)]) if short > 0 else []
        ledger.free(gone)
        sealed = [id for id in sealed if id not in gone]
        ids = ledger.allocate(min(count, ledger.free_count))
        ledger.seal(ids, [at * 10 + i for i in range(len(ids))], range(len(ids)))
        sealed += ids
        held = draw.sample(sealed, draw.randint(0, min(4, len(sealed))))
        ledger.pin(held)
        pinned += held
        ledger.touch(draw.sample(sealed, draw.randint(0, len(sealed))))
        ledger.touch(draw.choices(sealed, k=3))
        back = draw.sample(pinned, draw.randint(0, len(pinned)))
        for id in back:
            pinned.remove(id)
        ledger.unpin(back)
        ledger.tick()
        ledger.check()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("seed", range(3))
def test_many_are_one_after_the_other(row, seed):
    events = []
    used(BlockLedger(24, row.build(), events.append), seed)
    assert replay(events, BlockLedger(24, single(row.build()))) is None


def test_a_verb_that_is_new_speaks_for_its_form_for_many():
    heard = []

    class Mine(LRU):
        def add(self, meta):
            heard.append(meta.id)
            super().add(meta)

    ledger = BlockLedger(4, Mine())
    ledger.seal(ledger.allocate(3))
    ledger.pin([1])
    ledger.unpin([1])
    assert heard == [0, 1, 2, 1]
