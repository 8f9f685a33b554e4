"""Admission, `policy.admission`: a door in front of the verbs `m` of a member, bound to a rule `w`.

admits(s, x, new)  whether a block goes to the member, as it comes or is used at the door
left(s, x)         it was evicted at the door
begin(s, moments, request)

The door has a state of its own, `s.door`, since a line and what `order` keeps do not go together.
"""

from __future__ import annotations

from kvlab.sim.compiled import admit_cost as w  # that of a policy is given by `bind`
from kvlab.sim.compiled import lines
from kvlab.sim.compiled import verbs as m  # those of a member are given by `bind`
from kvlab.sim.compiled.lines import IS_HELD
from kvlab.sim.compiled.state import CAPACITY, NOTE, OWN, SIZE, SPOT, STATE

DOOR = 0  # the line of the door; SPOT of a block there is 1, NOTE counts its uses there
SHARE = OWN  # of the cache, in blocks; in `key` of the door


def add(s, x, at):
    if w.admits(s, x, True):
        m.add(s, x, at)
        return
    s.door.node[x, SPOT], s.door.node[x, NOTE] = 1, 0
    lines.enter(s.door, DOOR, x)


def touch(s, x, at):
    if not s.door.node[x, SPOT]:
        m.touch(s, x, at)
        return
    s.door.node[x, NOTE] += 1
    if w.admits(s, x, False):
        held = s.door.node[x, STATE] & IS_HELD
        _forget(s, x)
        if held and m.EARLY:
            m.hold(s, x)
        if m.COUNTS:
            m.admit(s, x, at, s.door.node[x, NOTE])
        else:
            m.add(s, x, at)
        if held and not m.EARLY:
            m.hold(s, x)


def _forget(s, x):
    lines.remove(s.door, x)
    s.door.node[x, SPOT] = 0


def remove(s, x):
    if s.door.node[x, SPOT]:
        _forget(s, x)
    else:
        m.remove(s, x)


def hold(s, x):
    if s.door.node[x, SPOT]:
        lines.hold(s.door, x)
    else:
        m.hold(s, x)


def release(s, x):
    if s.door.node[x, SPOT]:
        lines.release(s.door, x)
    else:
        m.release(s, x)


def expect(s, content):
    m.expect(s, content)


def tick(s):
    m.tick(s)


def begin(s, moments, request):
    w.begin(s, moments, request)
    m.begin(s, moments, request)


def pop(s):
    waits = lines.length(s.door, DOOR) > 0
    if waits and s.door.node[DOOR, SIZE] > s.door.key[SHARE] * s.book[CAPACITY]:
        return _turn_away(s)
    x = m.pop(s)
    return _turn_away(s) if waits and not x else x


def _turn_away(s):
    x = lines.pop(s.door, DOOR)
    s.door.node[x, SPOT] = s.door.node[x, STATE] = 0
    w.left(s, x)
    return x
