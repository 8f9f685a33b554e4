"""What Learned asks of its leaves: chances of reuse by class and age.

`draws` has the tables of all classes one after another, `notes` where each begins, and the end.
Uses of a content so far are counted in its row.
"""

from __future__ import annotations

from math import inf

import numpy as np

from kvlab.sim.compiled.bind import cached, verb
from kvlab.sim.compiled.state import CONTENT, DEPTH, FIRST_CONTENT, LISTS, MINE

DEPTHS, MOST_USES = 32, 3
COUNT, NEVER = DEPTHS * (MOST_USES + 1), inf
NOTES, ROWS, WIDTH = COUNT + 1, (0, COUNT), LISTS + 1
USED_SO_FAR = LISTS
NOW = MINE + 3


@verb
def _class(depth, uses):
    bits = 0
    while depth:
        depth >>= 1
        bits += 1
    return bits * (MOST_USES + 1) + min(uses, MOST_USES)


@verb
def row(s, x):
    content = s.meta[x, CONTENT]
    s.content[content, USED_SO_FAR] += 1
    return _class(s.meta[x, DEPTH], s.content[content, USED_SO_FAR])


@verb
def clock(s):
    return float(s.book[NOW])


@verb
def tick(s):
    s.book[NOW] += 1


@verb
def worth(s, row, since):
    begin, end = int(s.notes[row]), int(s.notes[row + 1])
    return s.draws[min(begin + s.book[NOW] - int(since), end - 1)]


def fitted(
    numbers: np.ndarray, first: np.ndarray, keep: np.ndarray, count: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tables and where they begin, as `policy.classes.Learned` fits them to a whole trace.

    numbers int32 [A] contents; first int64 [R + 1]; keep int64 [R]: accesses of each request that
    count; count: numbers there are.
    """
    state = np.zeros((count, 3), dtype=np.int64)  # uses, request and class of the last one
    classes, gaps = np.empty((2, len(numbers)), dtype=np.int64)
    alive = np.zeros(COUNT, dtype=np.int64)
    found = _gaps(numbers, first, keep, state, classes, gaps, alive)
    order = np.lexsort((gaps[:found], classes[:found]))
    classes, gaps = classes[:found][order], gaps[:found][order]
    known = int(np.count_nonzero(state[FIRST_CONTENT:, 0]))
    stay = max(capacity / max(known / max(len(keep), 1), 1e-9), 1.0)
    tables = [_table(gaps[classes == at], alive[at], stay) for at in range(COUNT)]
    return np.concatenate(tables), np.cumsum([0, *map(len, tables)]).astype(float)


def _table(gaps: np.ndarray, alive: int, stay: float) -> np.ndarray:
    if not len(gaps):
        return np.zeros(1)
    ages = np.arange(gaps[-1] + 1)
    gone = np.searchsorted(gaps, ages, "right")
    soon = np.searchsorted(gaps, ages + stay, "right") - gone
    return soon / np.maximum(alive - gone, 1)


@cached
def _gaps(numbers, first, keep, state, classes, gaps, alive):
    """Of each use that is followed by another: its class and the requests in between; how many."""
    found = 0
    for request in range(len(keep)):
        for depth in range(keep[request]):
            last = state[numbers[first[request] + depth]]
            if last[0]:
                classes[found], gaps[found] = last[2], request - last[1]
                found += 1
            last[0] += 1
            last[1], last[2] = request, _class(depth, last[0])
            alive[last[2]] += 1
    return found
