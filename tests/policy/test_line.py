"""Line against a sorted list."""

from __future__ import annotations

import random

import pytest

from kvlab.policy.base import BlockMeta
from kvlab.policy.line import Line


def meta(id: int, place: int) -> BlockMeta:
    made = BlockMeta(id)
    made.place = place
    return made


def test_late_ones_find_their_place():
    line = Line()
    for id, place in enumerate([10, 30, 20, 40, 20]):
        line.push(meta(id, place))
    assert line.head().id == 0
    assert [line.pop().id for _ in range(5)] == [0, 2, 4, 1, 3]
    assert line.pop() is None
    assert not line


@pytest.mark.parametrize("seed", range(5))
def test_random_verbs(seed):
    draw = random.Random(seed)
    metas = [meta(id, 0) for id in range(20)]
    line, here, held = Line(), set(), set()
    for now in range(1, 1500):
        m = draw.choice(metas)
        verb = draw.choice(["push", "renew", "remove", "hold", "release", "pop"])
        if verb == "push" and m.id not in here | held:
            m.place = now - draw.choice([0, 0, 0, now // 2, 5])
            line.push(m)
            here.add(m.id)
        elif verb == "renew" and m.id not in held:
            assert line.renew(m, now) == (m.id in here)
        elif verb == "remove" and m.id not in held:
            assert line.remove(m) == (m.id in here)
            here.discard(m.id)
        elif verb == "hold" and m.id in here:
            assert line.hold(m)
            here.remove(m.id)
            held.add(m.id)
        elif verb == "release" and m.id in held:
            line.release(m)
            held.remove(m.id)
            here.add(m.id)
        elif verb == "pop" and here:
            first = min(here, key=lambda id: (metas[id].place, id))
            assert line.head().id == first
            assert line.pop().id == first
            here.remove(first)
        assert len(line) == len(here)
        assert line.size == len(here) + len(held)
