"""What PGDSF asks of its leaves: GDSF where a use saves the cost of computing the block."""

from kvlab.sim.compiled import order
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.gdsf import hold, pop, release, remove  # noqa: F401
from kvlab.sim.compiled.state import CLOCK, DEPTH, USES

ORDER = EARLY = COUNTS = True


@verb
def _file(s, x):
    cost = s.costs[s.meta[x, DEPTH]]
    order.file(s, x, s.key[CLOCK] + s.node[x, USES] * cost)


@verb
def admit(s, x, at, hits):
    s.node[x, USES] = 1 + hits
    _file(s, x)


@verb
def add(s, x, at):
    admit(s, x, at, 0)


@verb
def touch(s, x, at):
    s.node[x, USES] += 1
    _file(s, x)
