"""KeepUntilReturn: lines 0, and 1 of blocks whose request called a tool; `key` is when, in ms."""

from kvlab.sim.compiled import lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.moments import MS as AT
from kvlab.sim.compiled.moments import TOOL as CALLED
from kvlab.sim.compiled.state import MINE, OWN

hold, release, remove = lines.hold, lines.release, lines.remove
MS, PATIENCE = OWN, OWN + 1
TOOL = MINE


def prepare(state, policy):
    state.key[PATIENCE] = 1e3 * policy.patience


@verb
def begin(s, moments, request):
    s.key[MS], s.book[TOOL] = moments[request, AT], int(moments[request, CALLED])


@verb
def add(s, x, at):
    s.key[x] = s.key[MS]
    lines.enter(s, s.book[TOOL], x)


@verb
def touch(s, x, at):
    s.key[x] = s.key[MS]
    lines.move(s, s.book[TOOL], x)


@verb
def pop(s):
    x, waits = lines.head(s, 0), lines.head(s, 1)
    if waits and (not x or _first(s, waits, x)):
        x = waits
    if x:
        lines.leave(s, x)
    return x


@verb
def _first(s, waits, x):
    """Whether the block that waits for a tool leaves before the other."""
    if s.key[MS] - s.key[waits] <= s.key[PATIENCE]:
        return False
    return s.key[waits] < s.key[x] or (s.key[waits] == s.key[x] and s.place[waits] < s.place[x])
