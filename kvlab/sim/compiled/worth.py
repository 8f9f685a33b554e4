"""What Hybrid asks of its leaves: the logarithm of recency x frequency x cost."""

from math import log2

from kvlab.sim.compiled import order
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import DEPTH, NOW, OWN, USES

ORDER = EARLY = COUNTS = True
HALF_LIFE, FREQUENCY, POWER = range(OWN, OWN + 3)
hold, release, remove, pop = order.hold, order.release, order.remove, order.pop


def prepare(state, policy):
    state.key[HALF_LIFE : POWER + 1] = policy.half_life, policy.frequency, policy.cost


@verb
def _file(s, x):
    cost = s.costs[s.meta[x, DEPTH]]
    worth = s.book[NOW] / s.key[HALF_LIFE] + s.key[FREQUENCY] * log2(1.0 + s.node[x, USES])
    order.file(s, x, worth + s.key[POWER] * log2(max(cost, 1e-30)))


@verb
def admit(s, x, at, hits):
    s.node[x, USES] = hits
    _file(s, x)


@verb
def add(s, x, at):
    admit(s, x, at, 0)


@verb
def touch(s, x, at):
    s.node[x, USES] += 1
    _file(s, x)
