"""A request that passes through tells the ledger what open, step, commit and close tell it."""

import random

import pytest

from kvlab.blocks import BlockLedger, Ground, Holding, NameIndex, Names, Sequences, Serving
from kvlab.core import OutOfBlocks
from kvlab.policy import by_name


def served(policy: str, through: bool) -> tuple[list, list]:
    """Events of the ledger and what each request found; owners and empty verbs left out."""
    draw, events, found = random.Random(3), [], []
    ledger = BlockLedger(20, by_name(policy), events.append)
    group = Holding(Serving(Ground(ledger, 1), index=NameIndex()))
    sequences = Sequences([group])
    for _ in range(150):
        head, depth = draw.randrange(4), draw.randint(1, 9)
        wild = draw.random() < 0.1
        names = [100 * head + n + 50 * (wild and n > 3) for n in range(depth + 15 * wild)]
        chain = Names(names, 1)
        opened = None
        try:
            if through:
                opened = group.sharing.pass_through(chain)
            if opened is None:
                seq, opened = sequences.open(chain, reserve=len(names))
                sequences.begin([seq], [len(names) - sequences.length(seq)])
                sequences.commit(publish=False)
                sequences.close([seq])
        except OutOfBlocks:
            found.append(None)
            continue
        found.append((opened.found, opened.evicted))
        ledger.check()
    told = [event[:2] if event[0] == "allocate" else event for event in events]
    return [event for event in told if event[1:] not in (([],), ((),))], found


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu", "arc", "leaf_first", "random"])
def test_it_is_the_long_way(policy):
    assert served(policy, True) == served(policy, False)
