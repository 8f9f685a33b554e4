"""Policies by class, `policy.classes.ByClass`: a line for each class, the heads are compared. Bound
to a policy `w`, which says what differs:

row(s, x)          the number of the class of a block that is used now, below COUNT
clock(s)           the time of a use
worth(s, row, since)   of the head of a class; the smallest leaves

Lines are the rows of `node` behind the blocks: SPOT of the i-th is the i-th class that was ever
used, STATE of a class says whether it was. While blocks leave one after another the heads of the
other classes stay as they are, so the best of those others is kept (RIVAL) until anything changes.
"""

from __future__ import annotations

import numpy as np

from kvlab.sim.compiled import lines
from kvlab.sim.compiled import wa_lru as w  # those of a policy are given by `bind`
from kvlab.sim.compiled.state import (
    CAPACITY,
    FIRST_BLOCK,
    LINE,
    MINE,
    NEXT,
    OWN,
    PREV,
    SPOT,
    STATE,
)  # fmt: skip

BEST, PLACE, USED = MINE, MINE + 1, MINE + 2  # the line last chosen; of the rival; classes used
RIVAL = OWN  # worth of the best head of another class


def ends(state, count):
    """Plain Python: empty lines for so many classes."""
    rows = FIRST_BLOCK + int(state.book[CAPACITY]) + np.arange(count)
    state.node[rows, NEXT] = state.node[rows, PREV] = rows


def add(s, x, at):
    _enter(s, x)


def touch(s, x, at):
    lines.leave(s, x)
    _enter(s, x)


def _enter(s, x):
    first = FIRST_BLOCK + s.book[CAPACITY]
    line = first + w.row(s, x)
    if not s.node[line, STATE]:
        s.node[line, STATE] = 1
        s.node[first + s.book[USED], SPOT] = line
        s.book[USED] += 1
    s.key[x] = w.clock(s)
    lines.enter(s, line, x)
    s.book[BEST] = 0


def hold(s, x):
    lines.hold(s, x)
    s.book[BEST] = 0


def release(s, x):
    lines.release(s, x)
    s.book[BEST] = 0


def remove(s, x):
    lines.remove(s, x)
    s.book[BEST] = 0


def begin(s, moments, request):
    w.begin(s, moments, request)
    s.book[BEST] = 0


def tick(s):
    w.tick(s)
    s.book[BEST] = 0


def pop(s):
    first, line = FIRST_BLOCK + s.book[CAPACITY], s.book[BEST]
    x = lines.head(s, line) if line else 0
    if not x or not _before(s, w.worth(s, line - first, s.key[x]), s.place[x]):
        x = _choose(s, first)
        if not x:
            return 0
    lines.leave(s, x)
    return x


def _before(s, worth, place):
    return worth < s.key[RIVAL] or (worth == s.key[RIVAL] and place < s.book[PLACE])


def _choose(s, first):
    """The block that leaves; of the other classes' heads the best becomes the rival."""
    found, best, best_place = 0, 0.0, 0
    s.key[RIVAL], s.book[PLACE], s.book[BEST] = w.NEVER, 0, 0
    for i in range(s.book[USED]):
        line = s.node[first + i, SPOT]
        x = lines.head(s, line)
        if not x:
            continue
        worth, place = w.worth(s, line - first, s.key[x]), s.place[x]
        if not found or worth < best or (worth == best and place < best_place):
            if found:
                s.key[RIVAL], s.book[PLACE] = best, best_place
            found, best, best_place = x, worth, place
        elif _before(s, worth, place):
            s.key[RIVAL], s.book[PLACE] = worth, place
    if found:
        s.book[BEST] = s.node[found, LINE]
    return found
