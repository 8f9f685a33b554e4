"""LFU: a line for each number of uses that some block has, the lines chained by that number.

Their ends are the rows of `node` behind the blocks; of those, STATE is the number of uses, LINE and
SPOT the next and the previous line. The first row is the end of the chain.
"""

from kvlab.sim.compiled import lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import (
    CAPACITY,
    FIRST_BLOCK,
    HIDDEN,
    LATE,
    LINE,
    MINE,
    NEXT,
    PREV,
    SIZE,
    SPOT,
    STATE,
)  # fmt: skip

ROWS, COUNTS = (1, 2), True
CHAIN, UNUSED, USED = MINE, MINE + 1, MINE + 2  # first row; lines given back; rows ever used
hold, release = lines.hold, lines.release


def prepare(state, policy):
    chain = FIRST_BLOCK + state.book[CAPACITY]
    state.book[CHAIN], state.book[USED] = chain, chain + 1
    state.node[chain, [LINE, SPOT, STATE]] = chain, chain, -1


@verb
def _line_after(s, line, uses):
    """The line of so many uses, which comes after `line`; a new one if there is none."""
    node, book = s.node, s.book
    after = node[line, LINE]
    if node[after, STATE] == uses:
        return after
    new = book[UNUSED]
    if new:
        book[UNUSED] = node[new, LINE]
    else:
        new = book[USED]
        book[USED] += 1
    node[new, NEXT] = node[new, PREV] = new
    node[new, LATE] = node[new, SIZE] = node[new, HIDDEN] = 0
    node[new, STATE], node[new, LINE], node[new, SPOT] = uses, after, line
    node[line, LINE] = node[after, SPOT] = new
    return new


@verb
def _close(s, line):
    """Give a line back that is empty."""
    node = s.node
    if not node[line, SIZE]:
        before, after = node[line, SPOT], node[line, LINE]
        node[before, LINE], node[after, SPOT] = after, before
        node[line, LINE], s.book[UNUSED] = s.book[UNUSED], line


@verb
def add(s, x, at):
    lines.enter(s, _line_after(s, s.book[CHAIN], 0), x)


@verb
def admit(s, x, at, hits):
    line = s.book[CHAIN]
    while s.node[s.node[line, LINE], STATE] >= 0 and s.node[s.node[line, LINE], STATE] < hits:
        line = s.node[line, LINE]
    lines.enter(s, _line_after(s, line, hits), x)


@verb
def touch(s, x, at):
    line = s.node[x, LINE]
    lines.move(s, _line_after(s, line, s.node[line, STATE] + 1), x)
    _close(s, line)


@verb
def remove(s, x):
    line = s.node[x, LINE]
    lines.remove(s, x)
    _close(s, line)


@verb
def pop(s):
    line = s.node[s.book[CHAIN], LINE]
    while line != s.book[CHAIN]:
        x = lines.pop(s, line)
        if x:
            _close(s, line)
            return x
        line = s.node[line, LINE]
    return 0
