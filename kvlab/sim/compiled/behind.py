"""The tier behind the device, exclusive: what leaves there comes here, what hits here goes back.

Bound to the policy `p` of that tier. `nothing` has the same functions where there is no such tier.
"""

from __future__ import annotations

from kvlab.sim.compiled import verbs as p  # those of a policy are given by `bind`
from kvlab.sim.compiled.blocks import free, seal
from kvlab.sim.compiled.state import CAPACITY, CONTENT, DEPTH, DROPPED, HELD, NOW, PARENT, WHERE


def holds(host, content):
    return host.content[content, WHERE] > 0


def take(s, host, ids, begin, end):
    """Give up what a request misses on the device, tail first."""
    for access in range(end - 1, begin - 1, -1):
        x = host.content[ids[access], WHERE]
        if x and s.content[ids[access], WHERE] < 0:
            p.remove(host, x)
            free(host, x, p.ORDERED)


def put(s, host, gone, left, count):
    """Take in `count` blocks of the device, the newest if not all fit."""
    fit = min(count, host.book[CAPACITY])
    end = left + count
    short = fit + host.book[HELD] - host.book[CAPACITY]
    for i in range(end - short, end):
        if p.EXPECTS:
            p.expect(host, s.meta[gone[i], CONTENT])
        free(host, p.pop(host), p.ORDERED)
        host.book[DROPPED] += 1
    for i in range(end - fit, end):
        row = s.meta[gone[i]]
        host.book[NOW] += 1
        p.add(host, seal(host, row[CONTENT], row[PARENT], row[DEPTH], p.ORDERED), -1)
