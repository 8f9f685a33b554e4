"""Priority: a line for the prefix, one for the rest, which goes first. A trace has no levels."""

from kvlab.sim.compiled import lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import DEPTH, LINE, MINE

hold, release, remove = lines.hold, lines.release, lines.remove


def prepare(state, policy):
    state.book[MINE] = policy.prefix_blocks


@verb
def add(s, x, at):
    lines.enter(s, 1 if s.meta[x, DEPTH] < s.book[MINE] else 0, x)


@verb
def touch(s, x, at):
    lines.move(s, s.node[x, LINE], x)


@verb
def pop(s):
    x = lines.pop(s, 0)
    return x if x else lines.pop(s, 1)
