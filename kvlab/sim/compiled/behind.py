"""The tier behind the device: `blocks.tiers` on arrays. Bound to the policy `p` of that tier.

MODES says which function does what in which mode:

holds(host, content)                      whether a content waits here
claim(host, ids, unique, block, at)       a request misses these on the device and comes for them
left(s, host, moved, count)               these blocks leave the device
arrived(host, ids, unique, block, at)     what was claimed is on the device
born(s, host, block, low, high, moved)    a request's blocks from `high` down to `low` are known now
"""

from __future__ import annotations

from kvlab.sim.compiled import verbs as p  # those of a policy are given by `bind`
from kvlab.sim.compiled.blocks import free, seal
from kvlab.sim.compiled.state import (
    CAPACITY,
    CONTENT,
    DEPTH,
    DROPPED,
    HELD,
    NOW,
    PARENT,
    PINNED,
    WHERE,
    WRITTEN,
)

MODES = {
    "none": {"holds": "never", "claim": "no_claim", "left": "no_left", "arrived": "no_claim",
             "born": "no_born"},
    "exclusive": {"holds": "waits", "claim": "take", "left": "put", "arrived": "no_claim",
                  "born": "no_born"},
    "write_back": {"holds": "waits", "claim": "pin", "left": "put_new", "arrived": "unpin",
                   "born": "no_born"},
    "write_through": {"holds": "waits", "claim": "pin", "left": "touch", "arrived": "unpin",
                      "born": "put_born"},
}  # fmt: skip


def never(host, content):
    return False


def no_claim(host, ids, unique, block, at):
    pass


def no_left(s, host, moved, count):
    pass


def no_born(s, host, block, low, high, moved):
    pass


def waits(host, content):
    return host.content[content, WHERE] > 0


def take(host, ids, unique, block, at):
    """They leave at once, so that making room on the device cannot push them out."""
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and not block[i]:
            p.remove(host, x)
            free(host, x, p.ORDERED)


def pin(host, ids, unique, block, at):
    """They stay, pinned until they have arrived."""
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and not block[i]:
            p.hold(host, x)
            host.book[PINNED] += 1


def unpin(host, ids, unique, block, at):
    """What was pinned: nothing has come here in between that the device misses."""
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and not block[i]:
            p.release(host, x)
    host.book[PINNED] = 0
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and not block[i]:
            use(host, x)


def use(host, x):
    host.book[NOW] += 1
    p.touch(host, x, -1)


def put(s, host, moved, count):
    """Take in blocks of the device; the newest stay where not all fit."""
    host.book[WRITTEN] += count
    fit = min(count, host.book[CAPACITY] - host.book[PINNED])
    short = fit + host.book[HELD] - host.book[CAPACITY]
    for i in range(count - short, count):
        if p.EXPECTS:
            p.expect(host, s.meta[moved[i], CONTENT])
        free(host, p.pop(host), p.ORDERED)
        host.book[DROPPED] += 1
    for i in range(count - fit, count):
        row = s.meta[moved[i]]
        host.book[NOW] += 1
        p.add(host, seal(host, row[CONTENT], row[PARENT], row[DEPTH], p.ORDERED), -1)


def touch(s, host, moved, count):
    """What is here, too, was used."""
    for i in range(count):
        x = host.content[s.meta[moved[i], CONTENT], WHERE]
        if x:
            use(host, x)


def put_new(s, host, moved, count):
    """What is here already was only used."""
    touch(s, host, moved, count)
    new = 0
    for i in range(count):
        if not host.content[s.meta[moved[i], CONTENT], WHERE]:
            moved[new] = moved[i]
            new += 1
    put(s, host, moved, new)


def put_born(s, host, block, low, high, moved):
    new = 0
    for i in range(high, low - 1, -1):
        if not host.content[s.meta[-block[i], CONTENT], WHERE]:
            moved[new] = -block[i]
            new += 1
    put(s, host, moved, new)
