"""S3-FIFO: lines 0 (small) and 1 (main), one ghost list."""

from kvlab.sim.compiled import ghosts, lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import CAPACITY, CONTENT, LISTS, MINE, SIZE, USES

WIDTH = LISTS + 2
SMALL, MAIN = 0, 1
SMALL_ROOM, MAIN_ROOM, GHOST_ROOM, PROMOTE, EVICTED = range(MINE, MINE + 5)
hold, release, remove = lines.hold, lines.release, lines.remove


def prepare(state, policy):
    book, blocks = state.book, int(state.book[CAPACITY])
    book[SMALL_ROOM] = int(policy.small * blocks)
    book[MAIN_ROOM] = blocks - book[SMALL_ROOM]
    book[GHOST_ROOM], book[PROMOTE] = int(policy.ghosts * blocks), policy.promote


@verb
def add(s, x, at):
    s.node[x, USES] = 0
    content = s.meta[x, CONTENT]
    if ghosts.knows(s, 0, content):
        ghosts.forget(s, 0, content)
        lines.enter(s, MAIN, x)
    elif s.book[EVICTED] or s.node[SMALL, SIZE] < s.book[SMALL_ROOM]:
        lines.enter(s, SMALL, x)
    else:
        lines.enter(s, MAIN, x)


@verb
def touch(s, x, at):
    if s.node[x, USES] < 3:
        s.node[x, USES] += 1


@verb
def pop(s):
    node, book = s.node, s.book
    if not lines.length(s, SMALL) + lines.length(s, MAIN):
        return 0
    book[EVICTED] = 1
    line = MAIN if node[MAIN, SIZE] > book[MAIN_ROOM] else SMALL
    while True:
        x = lines.pop(s, line)
        if not x:
            line = 1 - line
            continue
        if line == MAIN:
            if not node[x, USES]:
                return x
            node[x, USES] -= 1
        elif node[x, USES] < book[PROMOTE]:
            ghosts.remember(s, 0, s.meta[x, CONTENT], book[GHOST_ROOM])
            return x
        else:
            node[x, USES] = 0
        lines.enter(s, MAIN, x)
