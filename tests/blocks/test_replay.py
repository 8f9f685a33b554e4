"""A recorded run repeats on a fresh ledger of the same policy, and on no other."""

from __future__ import annotations

import random

import pytest

from kvlab.blocks import SEALED, BlockLedger, replay, victims
from kvlab.policy import by_name

NAMES = ["fifo", "lru", "lfu", "random", "arc", "s3fifo", "sieve", "mq", "gdsf", "adaptive"]


def record(name: str) -> list[tuple]:
    """A run of 40 blocks with uneven use, pins and scores."""
    events, draw = [], random.Random(3)
    ledger = BlockLedger(40, by_name(name), events=events.append)
    for content in range(0, 600, 5):
        short = 5 - ledger.free_count
        if short > 0:
            ledger.free(ledger.reclaim(short, range(content, content + short)))
        ids = ledger.allocate(5)
        ledger.seal(ids, content=[(c * c) % 97 for c in range(content, content + 5)])
        there = [id for id in range(40) if ledger.state(id) == SEALED]
        some = [id for id in there if draw.random() < 1 / (1 + id % 7)]
        ledger.pin(some[:3])
        ledger.touch(some)
        ledger.score(some[0], draw.random())
        ledger.unpin(some[:3])
        ledger.tick()
    return events


@pytest.mark.parametrize("name", NAMES)
def test_same_policy_same_victims(name):
    events = record(name)
    assert len(victims(events)) == 560
    assert replay(events, BlockLedger(40, by_name(name))) is None


def test_policies_disagree_on_this_run():
    chosen = [tuple(victims(record(name))) for name in NAMES if name != "adaptive"]
    assert len(set(chosen)) == len(chosen)


def test_another_policy_is_found_out():
    difference = replay(record("lru"), BlockLedger(40, by_name("fifo")))
    assert difference.verb == "reclaim"
    assert difference.recorded != difference.replayed


def test_admit_replays():
    events = []
    ledger = BlockLedger(4, by_name("lru"), events=events.append)
    ledger.admit(range(6))
    ledger.touch([3])
    ledger.admit([9])
    assert replay(events, BlockLedger(4, by_name("lru"))) is None
