"""ARC: lines 0 (once) and 1 (again), ghost lists 0 and 1 of what left them, and 2: expected.

Request ARC is ARC whose target moves once a request for each ghost list.
"""

from kvlab.policy import RequestARC
from kvlab.sim.compiled import ghosts, lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import CAPACITY, CLOCK, CONTENT, LISTS, MINE, SIZE

EXPECTS, WIDTH = True, LISTS + 6
ONCE, AGAIN, EXPECTED = range(3)
FOUND, NEW = MINE, MINE + 1  # where the next content was found: 0 nowhere, 1 once, 2 again
BY_REQUEST, MOVED = MINE + 2, MINE + 3  # Request ARC; bits of the lists that moved the target
TARGET = CLOCK
hold, release, remove = lines.hold, lines.release, lines.remove


def prepare(state, policy):
    state.book[BY_REQUEST] = isinstance(policy, RequestARC)


@verb
def begin(s, moments, request):
    s.book[MOVED] = 0


@verb
def _may_move(s, found):
    """Whether finding a content in this list moves the target."""
    if s.book[BY_REQUEST] and s.book[MOVED] & found:
        return False
    s.book[MOVED] |= found
    return True


@verb
def _recall(s, content):
    """Where a content is remembered, 0 nowhere; the target moves towards that list."""
    once, again, blocks = ghosts.count(s, ONCE), ghosts.count(s, AGAIN), s.book[CAPACITY]
    if ghosts.knows(s, ONCE, content):
        ghosts.forget(s, ONCE, content)
        if _may_move(s, 1):
            s.key[TARGET] = min(s.key[TARGET] + max(again / once, 1.0), float(blocks))
        return 1
    if ghosts.knows(s, AGAIN, content):
        ghosts.forget(s, AGAIN, content)
        if _may_move(s, 2):
            s.key[TARGET] = max(s.key[TARGET] - max(once / again, 1.0), 0.0)
        return 2
    return 0


@verb
def expect(s, content):
    s.book[FOUND] = _recall(s, content)
    if s.book[FOUND]:
        ghosts.remember(s, EXPECTED, content, s.book[CAPACITY])
    else:
        s.book[NEW] = content


@verb
def add(s, x, at):
    content, seen = s.meta[x, CONTENT], False
    if content != s.book[NEW]:
        if ghosts.knows(s, EXPECTED, content):
            ghosts.forget(s, EXPECTED, content)
            seen = True
        else:
            seen = _recall(s, content) > 0
    lines.enter(s, AGAIN if seen else ONCE, x)


@verb
def touch(s, x, at):
    lines.move(s, AGAIN, x)


@verb
def pop(s):
    if not lines.length(s, ONCE) + lines.length(s, AGAIN):
        return 0
    found, once, target, blocks = s.book[FOUND], s.node[ONCE, SIZE], s.key[TARGET], s.book[CAPACITY]
    s.book[FOUND] = 0
    if not found:
        if once >= blocks and lines.length(s, ONCE):
            return lines.pop(s, ONCE)
        known = once + ghosts.count(s, ONCE)
        if known >= blocks:
            ghosts.drop_oldest(s, ONCE)
        elif known + s.node[AGAIN, SIZE] + ghosts.count(s, AGAIN) >= 2 * blocks:
            ghosts.drop_oldest(s, AGAIN)
    over = once > target or (once == target and found == 2)
    line = ONCE if lines.length(s, ONCE) and (over or not lines.length(s, AGAIN)) else AGAIN
    x = lines.pop(s, line)
    ghosts.remember(s, line, s.meta[x, CONTENT], 2 * blocks)
    return x
