"""BlockTable: logical order, holes, slots."""

from __future__ import annotations

import pytest

from kvlab.blocks import BlockTable, HoleError
from kvlab.core import BadInput


def table(*ids, block_size=4, tokens=0) -> BlockTable:
    made = BlockTable(block_size)
    made.append(list(ids), tokens)
    return made


def test_slots_span_blocks():
    t = table(7, 3, 9, tokens=10)
    assert t.slots(2, 8) == [(7, 2, 2), (3, 0, 4), (9, 0, 2)]
    assert t.slots(4, 4) == [(3, 0, 4)]
    assert t.slots(5, 0) == []


def test_growth_and_room():
    t = table(7, 3)
    assert (t.room, t.missing(8), t.missing(9), t.missing(0)) == (8, 0, 1, 0)
    t.grow(6)
    assert (t.length, t.room, t.missing(3), t.missing(7)) == (6, 2, 1, 2)
    with pytest.raises(BadInput, match="room for 0 to 2"):
        t.grow(3)


def test_holes():
    t = table(7, 3, 9, tokens=12)
    assert t.punch(1) == 3
    assert (t.ids, t.holes, t.length) == ([7, None, 9], [1], 12)
    assert t.slots(8, 4) == [(9, 0, 4)]
    with pytest.raises(HoleError, match="block 1"):
        t.slots(3, 2)
    with pytest.raises(HoleError):
        t.punch(1)


def test_truncate_frees_tail_first():
    t = table(7, 3, 9, 8, tokens=13)
    t.punch(2)
    assert t.truncate(5) == [8]
    assert (t.ids, t.length) == ([7, 3], 5)
    assert t.truncate(4) == [3]
    assert t.truncate(0) == [7]
    with pytest.raises(BadInput):
        t.truncate(1)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1), (7, 2)])
def test_ranges_outside_are_refused(start, count):
    with pytest.raises(BadInput):
        table(7, 3).slots(start, count)


def test_block_size_is_checked():
    with pytest.raises(BadInput, match="cache.block_size=0"):
        BlockTable(0)
