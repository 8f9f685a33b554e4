"""Random: the list of the object's own, from which its own draws pick (`draws`, made before)."""

from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import LENGTH, MINE, SPOT

MARKED = ORDER = True
DRAWN = MINE  # how many of `draws` are used up


@verb
def add(s, x, at):
    end = s.book[LENGTH]
    s.heap[end] = x
    s.book[LENGTH] = s.node[x, SPOT] = end + 1


@verb
def remove(s, x):
    spot = s.node[x, SPOT]
    if spot:
        end = s.book[LENGTH] - 1
        last = s.heap[end]
        s.heap[spot - 1] = last
        s.node[last, SPOT] = spot
        s.node[x, SPOT] = 0
        s.book[LENGTH] = end


hold = remove


@verb
def release(s, x):
    add(s, x, -1)


@verb
def pop(s):
    if not s.book[LENGTH]:
        return 0
    x = s.heap[int(s.draws[s.book[DRAWN]] * s.book[LENGTH])]
    s.book[DRAWN] += 1
    remove(s, x)
    return x
