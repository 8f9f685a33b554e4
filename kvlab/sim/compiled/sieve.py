"""SIEVE: the part of the queue ahead of the hand and the part behind it, as in the object."""

from kvlab.sim.compiled import lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import MINE, USES

AHEAD = MINE  # which of the lines 0 and 1 is ahead of the hand
hold, release, remove = lines.hold, lines.release, lines.remove


@verb
def add(s, x, at):
    s.node[x, USES] = 0
    if not lines.length(s, s.book[AHEAD]):
        s.book[AHEAD] = 1 - s.book[AHEAD]
    lines.enter(s, s.book[AHEAD], x)


@verb
def touch(s, x, at):
    s.node[x, USES] = 1


@verb
def pop(s):
    if not lines.length(s, 0) + lines.length(s, 1):
        return 0
    while True:
        x = lines.pop(s, s.book[AHEAD])
        if not x:
            s.book[AHEAD] = 1 - s.book[AHEAD]
            x = lines.pop(s, s.book[AHEAD])
        if not s.node[x, USES]:
            return x
        s.node[x, USES] = 0
        lines.enter(s, 1 - s.book[AHEAD], x)
