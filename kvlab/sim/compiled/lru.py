"""LRU: one line; a used block goes to its end."""

from kvlab.sim.compiled import lines
from kvlab.sim.compiled.bind import verb

hold, release, remove = lines.hold, lines.release, lines.remove


@verb
def add(s, x, at):
    lines.enter(s, 0, x)


@verb
def touch(s, x, at):
    lines.move(s, 0, x)


@verb
def pop(s):
    return lines.pop(s, 0)
