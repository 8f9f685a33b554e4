"""GDSF: by clock + uses; the clock rises to each victim's key."""

from kvlab.sim.compiled import order
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import CLOCK, USES

ORDER = EARLY = COUNTS = True
hold, release, remove = order.hold, order.release, order.remove


@verb
def admit(s, x, at, hits):
    s.node[x, USES] = 1 + hits
    order.file(s, x, s.key[CLOCK] + s.node[x, USES])


@verb
def add(s, x, at):
    admit(s, x, at, 0)


@verb
def touch(s, x, at):
    s.node[x, USES] += 1
    order.file(s, x, s.key[CLOCK] + s.node[x, USES])


@verb
def pop(s):
    x = order.pop(s)
    if x:
        s.key[CLOCK] = s.key[x]
    return x
