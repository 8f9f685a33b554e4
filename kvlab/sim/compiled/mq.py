"""MQ: a line for each queue, one ghost list with the number of uses."""

from kvlab.core import BadInput
from kvlab.sim.compiled import ghosts, lines
from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import (
    CAPACITY,
    CONTENT,
    ENTRIES,
    FIRST_BLOCK,
    MINE,
    SIZE,
    USES,
    VALUE,
)  # fmt: skip

WIDTH = VALUE + 1
QUEUES, LIFETIME, GHOST_ROOM, ACCESSES, NEXT_EXPIRY = range(MINE, MINE + 5)
hold, release, remove = lines.hold, lines.release, lines.remove


def prepare(state, policy):
    if policy.queues > FIRST_BLOCK:
        raise BadInput("policy.queues", policy.queues, f"at most {FIRST_BLOCK} where compiled")
    book = state.book
    book[QUEUES], book[LIFETIME] = policy.queues, policy.lifetime
    book[GHOST_ROOM] = int(policy.ghosts * int(book[CAPACITY]))


@verb
def add(s, x, at):
    content, uses = s.meta[x, CONTENT], 1
    if ghosts.knows(s, 0, content):
        uses += s.content[content, VALUE]
        ghosts.forget(s, 0, content)
    s.node[x, USES] = uses
    _file(s, x)


@verb
def touch(s, x, at):
    lines.leave(s, x)
    s.node[x, USES] += 1
    _file(s, x)


@verb
def _file(s, x):
    """Put a used block into its queue. An access makes at most one entry into each queue."""
    book, line, uses = s.book, 0, s.node[x, USES]
    while uses > 1 and line < book[QUEUES] - 1:
        uses >>= 1
        line += 1
    book[ENTRIES] = book[ACCESSES] * (book[QUEUES] + 1)
    lines.enter(s, line, x)
    book[ACCESSES] += 1
    if book[ACCESSES] > book[NEXT_EXPIRY]:
        _sink(s)


@verb
def _sink(s):
    """Move the expired head of each queue one queue down, and note the next expiry."""
    book = s.book
    now, scale, lifetime = book[ACCESSES], book[QUEUES] + 1, book[LIFETIME]
    book[ENTRIES] = now * scale - book[QUEUES]
    expired, oldest = (now - lifetime) * scale, (now - 1) * scale
    for line in range(1, book[QUEUES]):
        if not s.node[line, SIZE]:
            continue
        x = lines.head(s, line)
        if x and s.place[x] < expired:
            lines.move(s, line - 1, x)
            x = lines.head(s, line) if s.node[line, SIZE] else 0
        if x:
            oldest = min(oldest, s.place[x])
    book[NEXT_EXPIRY] = oldest // scale + lifetime


@verb
def pop(s):
    for line in range(s.book[QUEUES]):
        x = lines.pop(s, line)
        if x:
            content = s.meta[x, CONTENT]
            s.content[content, VALUE] = s.node[x, USES]
            ghosts.remember(s, 0, content, s.book[GHOST_ROOM])
            return x
    return 0
