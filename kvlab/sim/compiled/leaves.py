"""Leaf-only eviction, `policy.leaves.LeafFirst`, over the verbs `m` of a member given by `bind`.

As there, the member holds a block that is pinned or has known children.
"""

from __future__ import annotations

from kvlab.sim.compiled import verbs as m  # those of a member are given by `bind`
from kvlab.sim.compiled.state import (
    CHILDREN,
    CONTENT,
    DEPTH,
    FIRST_BLOCK,
    FRESH,
    MARKS,
    PARENT,
    WHERE,
)  # fmt: skip

KNOWN, PINNED = 1, 2


def add(s, x, at):
    admit(s, x, at, 0)


def admit(s, x, at, hits):
    waits = s.content[s.meta[x, CONTENT], CHILDREN] > 0
    if waits and m.EARLY:
        m.hold(s, x)
    if m.COUNTS:
        m.admit(s, x, at, hits)
    else:
        m.add(s, x, at)
    if waits and not m.EARLY:
        m.hold(s, x)
    s.meta[x, MARKS] = KNOWN
    parent = s.meta[x, PARENT]
    if parent:
        s.content[parent, CHILDREN] += 1
        if s.content[parent, CHILDREN] == 1:
            above = s.content[parent, WHERE]
            if above > 0 and s.meta[above, MARKS] == KNOWN:
                m.hold(s, above)


def forget(s, x):
    s.meta[x, MARKS] = 0
    parent = s.meta[x, PARENT]
    if parent:
        s.content[parent, CHILDREN] -= 1
        if not s.content[parent, CHILDREN]:
            above = s.content[parent, WHERE]
            if above > 0 and s.meta[above, MARKS] == KNOWN:
                m.release(s, above)


def remove(s, x):
    m.remove(s, x)
    forget(s, x)


def hold(s, x):
    s.meta[x, MARKS] = KNOWN | PINNED
    if not s.content[s.meta[x, CONTENT], CHILDREN]:
        m.hold(s, x)


def release(s, x):
    s.meta[x, MARKS] = KNOWN
    if not s.content[s.meta[x, CONTENT], CHILDREN]:
        m.release(s, x)


def touch(s, x, at):
    m.touch(s, x, at)


def expect(s, content):
    m.expect(s, content)


def tick(s):
    m.tick(s)


def begin(s, moments, request):
    m.begin(s, moments, request)


def pop(s):
    x = m.pop(s)
    if not x:
        x = deepest(s)
        if not x:
            return 0
        m.remove(s, x)
    forget(s, x)
    return x


def deepest(s):
    """The deepest block that is not pinned, of equals the one with the lowest id."""
    found = 0
    for x in range(FIRST_BLOCK, s.book[FRESH]):
        if s.meta[x, MARKS] == KNOWN and (not found or s.meta[x, DEPTH] > s.meta[found, DEPTH]):
            found = x
    return found
