"""Which ids are free, and which block holds which content: `BlockLedger` on arrays.

Ids are the ledger's, since ties may go by id: the lowest free one first.
"""

from __future__ import annotations

from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import (
    CONTENT,
    DEPTH,
    FREE,
    FRESH,
    HELD,
    MARKS,
    PARENT,
    STATE,
    WHERE,
)  # fmt: skip


@verb
def seal(s, content, parent, depth):
    """A free block for a content that has none, as it is before the policy hears of it."""
    x = _take(s)
    s.meta[x, CONTENT], s.meta[x, PARENT], s.meta[x, DEPTH] = content, parent, depth
    s.meta[x, MARKS] = s.node[x, STATE] = 0
    s.content[content, WHERE] = x
    return x


@verb
def free(s, x):
    """Give a block back that the policy no longer knows; `meta` stays readable until `seal`."""
    s.content[s.meta[x, CONTENT], WHERE] = 0
    s.book[HELD] -= 1
    spot = s.book[FREE]
    s.book[FREE] = spot + 1
    while spot and s.free[(spot - 1) >> 1] > x:
        s.free[spot] = s.free[(spot - 1) >> 1]
        spot = (spot - 1) >> 1
    s.free[spot] = x


@verb
def _take(s):
    s.book[HELD] += 1
    left = s.book[FREE] - 1
    if left < 0:
        s.book[FRESH] += 1
        return s.book[FRESH] - 1
    s.book[FREE] = left
    last = s.free[left]
    x, spot = s.free[0], 0
    while True:
        child = 2 * spot + 1
        if child >= left:
            break
        if child + 1 < left and s.free[child + 1] < s.free[child]:
            child += 1
        if last < s.free[child]:
            break
        s.free[spot] = s.free[child]
        spot = child
    s.free[spot] = last
    return x
