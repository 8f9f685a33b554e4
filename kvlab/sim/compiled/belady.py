"""Belady: by the next use, which `draws` holds as a key for each access of the trace."""

from kvlab.sim.compiled import order
from kvlab.sim.compiled.bind import verb

ORDERED = ORDER = EARLY = True
hold, release, remove, pop = order.hold, order.release, order.remove, order.pop


@verb
def add(s, x, at):
    order.file(s, x, s.draws[at])


touch = add
