"""The tier behind the device: `blocks.tiers` on arrays. Bound to the policy `p` of that tier.

MODES says which function does what in which mode:

begin(host, moments, request)             a request comes
holds(host, content)                      the code of an access to it: MISS where it does not wait
claim(host, ids, unique, block, at)       a request misses these on the device and comes for them
left(s, host, moved, count)               these blocks leave the device
arrived(host, ids, unique, block, at)     what was claimed is on the device
born(s, host, block, low, high, moved)    a request's blocks from `high` down to `low` are known now
"""

from __future__ import annotations

from kvlab.sim.compiled import sinks as g  # what becomes of what leaves, given by `bind`
from kvlab.sim.compiled import verbs as p  # those of a policy are given by `bind`
from kvlab.sim.compiled.blocks import free, seal
from kvlab.sim.compiled.state import (
    CAPACITY,
    CONTENT,
    DEPTH,
    DROPPED,
    HELD,
    NOTE,
    NOW,
    PARENT,
    PINNED,
    WHERE,
    WRITTEN,
)
from kvlab.sim.outcome import HOST_HIT, MISS

MODES = {
    "none": {"begin": "no_begin", "holds": "never", "claim": "no_claim", "left": "no_left",
             "arrived": "no_claim", "born": "no_born"},
    "exclusive": {"begin": "hear", "holds": "waits", "claim": "take_all", "left": "put",
                  "arrived": "no_claim", "born": "no_born", "take_one": "take"},
    "write_back": {"begin": "hear", "holds": "waits", "claim": "pin_all", "left": "put_new",
                   "arrived": "unpin", "born": "no_born", "take_one": "pin"},
    "write_through": {"begin": "hear", "holds": "waits", "claim": "pin_all", "left": "touch",
                      "arrived": "unpin", "born": "put_born", "take_one": "pin"},
}  # fmt: skip


def no_begin(host, moments, request):
    pass


def hear(host, moments, request):
    p.begin(host, moments, request)
    x = p.expired(host) if p.EXPIRES else 0
    while x:
        free(host, x)
        host.book[DROPPED] += 1
        x = p.expired(host)


def never(host, content):
    return MISS


def no_claim(host, ids, unique, block, at):
    pass


def no_left(s, host, moved, count):
    pass


def no_born(s, host, block, low, high, moved):
    pass


def waits(host, content):
    return HOST_HIT if host.content[content, WHERE] else MISS


def take(host, x):
    """It leaves at once, so that making room on the device cannot push it out."""
    p.remove(host, x)
    free(host, x)


def take_all(host, ids, unique, block, at):
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and not block[i]:
            take(host, x)


def pin(host, x):
    """It stays, pinned until it has arrived."""
    p.hold(host, x)
    host.node[x, NOTE] = 1
    host.book[PINNED] += 1


def pin_all(host, ids, unique, block, at):
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and not block[i]:
            pin(host, x)


def unpin(host, ids, unique, block, at):
    if not host.book[PINNED]:
        return
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and host.node[x, NOTE]:
            p.release(host, x)
    host.book[PINNED] = 0
    for i in range(unique):
        x = host.content[ids[at[i]], WHERE]
        if x and host.node[x, NOTE]:
            host.node[x, NOTE] = 0
            use(host, x)


def use(host, x):
    host.book[NOW] += 1
    p.touch(host, x, -1)


def put(s, host, moved, count):
    """Take in blocks of the device; the newest stay where not all fit."""
    host.book[WRITTEN] += count
    for i in range(count):
        x = host.content[s.meta[moved[i], CONTENT], WHERE]
        if x:  # an inclusive tier above has given it up twice
            take(host, x)
    fit = min(count, host.book[CAPACITY] - (host.book[PINNED] if p.EVICTS else host.book[HELD]))
    short = fit + host.book[HELD] - host.book[CAPACITY]
    for i in range(short):
        if p.EXPECTS:
            p.expect(host, s.meta[moved[count - short + i], CONTENT])
        x = p.pop(host)
        free(host, x)
        g.note(host, i, x)
    if short > 0:
        host.book[DROPPED] += short
        g.sink(host, short)
    for i in range(count - fit, count):
        row = s.meta[moved[i]]
        host.book[NOW] += 1
        p.add(host, seal(host, row[CONTENT], row[PARENT], row[DEPTH]), -1)


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
