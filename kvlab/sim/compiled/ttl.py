"""TTL: LRU, or FIFO by age, whose blocks end. `key` is since when a block lives, in ms."""

from kvlab.sim.compiled import lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.lru import hold, pop, release, remove  # noqa: F401
from kvlab.sim.compiled.moments import MS as AT
from kvlab.sim.compiled.state import MINE, OWN

EXPIRES = True
MS, LIFE = OWN, OWN + 1
REFRESH = MINE


def prepare(state, policy):
    state.book[REFRESH], state.key[LIFE] = policy.refresh, 1e3 * policy.seconds


@verb
def begin(s, moments, request):
    s.key[MS] = moments[request, AT]


@verb
def expired(s):
    x = lines.head(s, 0)
    if x and s.key[x] <= s.key[MS] - s.key[LIFE]:
        lines.leave(s, x)
        return x
    return 0


@verb
def add(s, x, at):
    s.key[x] = s.key[MS]
    lines.enter(s, 0, x)


@verb
def touch(s, x, at):
    if s.book[REFRESH]:
        s.key[x] = s.key[MS]
        lines.move(s, 0, x)
