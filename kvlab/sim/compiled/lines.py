"""Lines of blocks by rising `place`: `policy.line.Line` on arrays, several to a policy.

A block enters at the end. A held one stays where it is until `pop` meets it, which then takes it
out; released, it is late: its place is in the past, and it waits in a pairing heap beside the line.
`pop` takes the smaller of the two heads. So most pins cost two additions.

A line is a row of `node` that is no block: NEXT and PREV are its ends, SIZE counts the blocks that
stand in it, HIDDEN those of them that are held, LATE is the root of the heap.
"""

from __future__ import annotations

from kvlab.sim.compiled.bind import rare, verb
from kvlab.sim.compiled.state import (
    CHILD,
    ENTRIES,
    HIDDEN,
    LATE,
    LINE,
    NEXT,
    PREV,
    SIZE,
    STATE,
)  # fmt: skip

IS_HELD, IS_LATE, IS_OUT = 1, 2, 4  # bits of STATE


@verb
def enter(s, line, x):
    """Put a block that stands nowhere, held or not, at the end of a line."""
    s.book[ENTRIES] += 1
    s.place[x] = s.book[ENTRIES]
    node = s.node
    last = node[line, PREV]
    node[last, NEXT] = x
    node[x, PREV], node[x, NEXT], node[x, LINE] = last, line, line
    node[line, PREV] = x
    node[line, SIZE] += 1
    node[line, HIDDEN] += node[x, STATE] & IS_HELD


@verb
def leave(s, x):
    """Take a block out of the line where it stands, held or not."""
    node = s.node
    line, how = node[x, LINE], node[x, STATE]
    node[line, SIZE] -= 1
    node[line, HIDDEN] -= how & IS_HELD
    if how <= IS_HELD:
        before, after = node[x, PREV], node[x, NEXT]
        node[before, NEXT] = after
        node[after, PREV] = before
    elif how & IS_LATE:
        _unheap(s, line, x)
    node[x, STATE] = how & IS_HELD


@verb
def remove(s, x):
    """Take a block out for good."""
    leave(s, x)
    s.node[x, STATE] = 0


@verb
def move(s, line, x):
    """From the line where it stands to the end of a line."""
    leave(s, x)
    enter(s, line, x)


@verb
def length(s, line):
    """Blocks that `pop` could give."""
    return s.node[line, SIZE] - s.node[line, HIDDEN]


@verb
def hold(s, x):
    s.node[x, STATE] |= IS_HELD
    s.node[s.node[x, LINE], HIDDEN] += 1


@verb
def release(s, x):
    node = s.node
    line = node[x, LINE]
    node[line, HIDDEN] -= 1
    if node[x, STATE] & IS_OUT:
        node[x, STATE] = IS_LATE
        node[x, CHILD] = node[x, NEXT] = node[x, PREV] = 0
        node[line, LATE] = _meld(s, node[line, LATE], x)
    else:
        node[x, STATE] &= ~IS_HELD


@verb
def head(s, line):
    """The block of smallest place that is not held, which stays; 0 if there is none."""
    node = s.node
    while True:
        x, late = node[line, NEXT], node[line, LATE]
        if late and (x == line or s.place[late] < s.place[x]):
            x = late
        elif x == line:
            return 0
        if not node[x, STATE] & IS_HELD:
            return x
        if x == late:
            _unheap(s, line, x)
        else:
            before, after = node[x, PREV], node[x, NEXT]
            node[before, NEXT] = after
            node[after, PREV] = before
        node[x, STATE] = IS_HELD | IS_OUT


@verb
def pop(s, line):
    """Take out the block of smallest place that is not held; 0 if there is none."""
    x = head(s, line)
    if x:
        leave(s, x)
    return x


@rare
def _meld(s, a, b):
    """One pairing heap of two: the root of greater place becomes the first child of the other.

    CHILD is a block's first child, NEXT its next sibling, PREV its sibling before or its parent."""
    node = s.node
    if not a or not b:
        return a + b
    if s.place[b] < s.place[a]:
        a, b = b, a
    first = node[a, CHILD]
    node[b, NEXT], node[b, PREV] = first, a
    if first:
        node[first, PREV] = b
    node[a, CHILD] = b
    node[a, NEXT] = node[a, PREV] = 0
    return a


@rare
def _unheap(s, line, x):
    """Take a block out of a line's heap of late ones."""
    node = s.node
    if x == node[line, LATE]:
        node[line, LATE] = _pairs(s, node[x, CHILD])
        return
    before, after = node[x, PREV], node[x, NEXT]
    if node[before, CHILD] == x:
        node[before, CHILD] = after
    else:
        node[before, NEXT] = after
    if after:
        node[after, PREV] = before
    node[line, LATE] = _meld(s, node[line, LATE], _pairs(s, node[x, CHILD]))


@rare
def _pairs(s, first):
    """One heap of a list of siblings: melded in pairs, then from the last pair on."""
    node, done = s.node, 0
    while first:
        second = node[first, NEXT]
        rest = node[second, NEXT] if second else 0
        node[first, NEXT] = 0
        if second:
            node[second, NEXT] = 0
        pair = _meld(s, first, second)
        node[pair, NEXT] = done  # a stack of pairs
        done, first = pair, rest
    whole = 0
    while done:
        rest = node[done, NEXT]
        node[done, NEXT] = 0
        whole = _meld(s, whole, done)
        done = rest
    return whole
