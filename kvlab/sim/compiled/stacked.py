"""Two tiers behind the device as one, `sim.tiers.Stack` on arrays: bound to the functions `u` of
the upper tier and `l` of the lower one, both of `behind`.

The state of the upper one is `state.Stacked`. What it gives up goes down; a content that both hold
is taken from the upper one.
"""

from __future__ import annotations

from kvlab.sim.compiled import behind as l  # noqa: E741 -- those of modes are given by `bind`
from kvlab.sim.compiled import behind as u
from kvlab.sim.compiled.state import WHERE
from kvlab.sim.outcome import DEEP_HIT, HIT, MISS


def begin(host, moments, request):
    u.begin(host, moments, request)
    l.begin(host.below, moments, request)


def holds(host, content):
    code = u.holds(host, content)
    if code >= HIT:
        return code
    return DEEP_HIT if l.holds(host.below, content) >= HIT else MISS


def claim(host, ids, unique, block, at):
    for i in range(unique):
        if not block[i]:
            x, y = host.content[ids[at[i]], WHERE], host.below.content[ids[at[i]], WHERE]
            if x:
                u.take_one(host, x)
            elif y:
                l.take_one(host.below, y)


def left(s, host, moved, count):
    u.left(s, host, moved, count)


def arrived(host, ids, unique, block, at):
    u.arrived(host, ids, unique, block, at)
    l.arrived(host.below, ids, unique, block, at)


def born(s, host, block, low, high, moved):
    u.born(s, host, block, low, high, moved)
    l.born(s, host.below, block, low, high, moved)
