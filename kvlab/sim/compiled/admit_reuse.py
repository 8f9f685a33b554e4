"""Admission by expected reuse: contents asked for so many times. Counts are USES of a block at the
door, and VALUE of one that left it."""

from kvlab.sim.compiled import ghosts
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import CAPACITY, CONTENT, MINE, USES, VALUE

DOOR_WIDTH = VALUE + 1
LEAST, GHOST_ROOM = MINE, MINE + 1  # in `book` of the door


def prepare(door, policy):
    door.book[LEAST] = policy.uses
    door.book[GHOST_ROOM] = int(policy.ghosts * int(door.book[CAPACITY]))


@verb
def begin(s, moments, request):
    pass


@verb
def admits(s, x, new):
    door, content = s.door, s.meta[x, CONTENT]
    if new:
        door.node[x, USES] = 0
        if ghosts.knows(door, 0, content):
            door.node[x, USES] = door.content[content, VALUE]
            ghosts.forget(door, 0, content)
    door.node[x, USES] += 1
    return door.node[x, USES] >= door.book[LEAST]


@verb
def left(s, x):
    door, content = s.door, s.meta[x, CONTENT]
    door.content[content, VALUE] = door.node[x, USES]
    ghosts.remember(door, 0, content, door.book[GHOST_ROOM])
