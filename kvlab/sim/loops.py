"""Compiled loops of flat and prefix-correct accounting (needs numba, the extra `fast`).

Same decisions as the policy objects of the same name, on tables indexed by block id. Lists are
doubly linked through `after` and `before`: nodes 0..2 are the ends of up to three lists, a block's
node is its id + 3. Node `end` is followed by the oldest and preceded by the newest.

Every loop takes (ids, first, tables, book, code, evicted) and returns how many it evicted, writing
their ids to `evicted` and the access of each to `evicted_at`. `book` keeps the counters that live
between pieces; `partial` [R] marks requests whose last block must not hit.
"""

from __future__ import annotations

from numba import njit

from kvlab.sim.outcome import HIT, PARTIAL, REFUSED

NODES = 3  # list ends before the first block's node
CAPACITY, HELD, FEWEST, SMALL, MAIN, GHOSTS, EVICTED, HAND = range(8)
_OUT, _IN_SMALL, _IN_MAIN, _IN_GHOSTS = range(4)

loop = njit(cache=True, nogil=True)
part = njit(inline="always")


@part
def _push(after, before, end, node):
    newest = before[end]
    after[newest] = node
    before[node] = newest
    after[node] = end
    before[end] = node


@part
def _drop(after, before, node):
    after[before[node]] = after[node]
    before[after[node]] = before[node]


@loop
def fifo(ids, first, partial, tables, book, code, evicted, evicted_at):
    inside, after, before = tables[0], tables[1], tables[2]
    gone = 0
    for at in range(len(ids)):
        node = ids[at] + NODES
        if inside[node]:
            code[at] = HIT
            continue
        if book[HELD] == book[CAPACITY]:
            victim = after[0]
            _drop(after, before, victim)
            inside[victim] = 0
            evicted[gone], evicted_at[gone] = victim - NODES, at
            gone += 1
        else:
            book[HELD] += 1
        inside[node] = 1
        _push(after, before, 0, node)
    return gone


@loop
def lru(ids, first, partial, tables, book, code, evicted, evicted_at):
    inside, after, before = tables[0], tables[1], tables[2]
    gone = 0
    for at in range(len(ids)):
        node = ids[at] + NODES
        if inside[node]:
            code[at] = HIT
            _drop(after, before, node)
        elif book[HELD] == book[CAPACITY]:
            victim = after[0]
            _drop(after, before, victim)
            inside[victim] = 0
            evicted[gone], evicted_at[gone] = victim - NODES, at
            gone += 1
        else:
            book[HELD] += 1
        inside[node] = 1
        _push(after, before, 0, node)
    return gone


@loop
def prefix_lru(ids, first, partial, tables, book, code, evicted, evicted_at):
    """Requests as units: the leading run hits, its blocks cannot leave, then tail first."""
    inside, after, before = tables[0], tables[1], tables[2]
    gone = 0
    for request in range(len(first) - 1):
        begin, end = first[request], first[request + 1]
        if end - begin > book[CAPACITY]:
            code[begin:end] = REFUSED
            continue
        missing = 0
        for at in range(begin, end):
            node = ids[at] + NODES
            if inside[node]:
                code[at] = HIT
                _drop(after, before, node)
            else:
                missing += 1
        if partial[request] and code[end - 1] == HIT:
            code[end - 1] = PARTIAL
        for _ in range(book[HELD] + missing - book[CAPACITY]):
            victim = after[0]
            _drop(after, before, victim)
            inside[victim] = 0
            evicted[gone], evicted_at[gone] = victim - NODES, begin
            gone += 1
            book[HELD] -= 1
        book[HELD] += missing
        for at in range(end - 1, begin - 1, -1):
            inside[ids[at] + NODES] = 1
            _push(after, before, 0, ids[at] + NODES)
    return gone


@loop
def sieve(ids, first, partial, tables, book, code, evicted, evicted_at):
    """`uses` marks blocks used since the hand's last visit; the hand is a node, 0 at the start."""
    inside, after, before, uses = tables[0], tables[1], tables[2], tables[3]
    gone = 0
    for at in range(len(ids)):
        node = ids[at] + NODES
        if inside[node]:
            code[at] = HIT
            uses[node] = 1
            continue
        if book[HELD] == book[CAPACITY]:
            hand = book[HAND] if book[HAND] else after[0]
            while uses[hand]:
                uses[hand] = 0
                hand = after[hand] if after[hand] else after[0]
            book[HAND] = after[hand]
            _drop(after, before, hand)
            inside[hand] = 0
            evicted[gone], evicted_at[gone] = hand - NODES, at
            gone += 1
        else:
            book[HELD] += 1
        inside[node], uses[node] = 1, 0
        _push(after, before, 0, node)
    return gone


@loop
def s3fifo(ids, first, partial, tables, book, code, evicted, evicted_at):
    """`inside` says which list a block is in: 0 none, 1 small, 2 main, 3 ghosts."""
    inside, after, before, uses = tables[0], tables[1], tables[2], tables[3]
    small = int(0.1 * book[CAPACITY])
    most_ghosts = int(0.9 * book[CAPACITY])
    gone = 0
    for at in range(len(ids)):
        node = ids[at] + NODES
        if inside[node] == _IN_SMALL or inside[node] == _IN_MAIN:
            code[at] = HIT
            uses[node] = min(uses[node] + 1, 3)
            continue
        victim = -1
        too_many = book[MAIN] > book[CAPACITY] - small
        while victim < 0 and book[SMALL] + book[MAIN] == book[CAPACITY]:
            book[EVICTED] = 1
            from_main = too_many or not book[SMALL]
            head = after[1 if from_main else 0]
            _drop(after, before, head)
            if from_main and uses[head]:  # a hit pays for another round
                uses[head] -= 1
                _push(after, before, 1, head)
            elif from_main:
                victim = head
                book[MAIN] -= 1
                inside[head] = _OUT
            elif uses[head] >= 2:  # proven
                uses[head] = 0
                inside[head] = _IN_MAIN
                book[SMALL] -= 1
                book[MAIN] += 1
                _push(after, before, 1, head)
            else:
                victim = head
                book[SMALL] -= 1
                book[GHOSTS] += 1
                inside[head] = _IN_GHOSTS
                _push(after, before, 2, head)
                if book[GHOSTS] > most_ghosts:
                    oldest = after[2]
                    _drop(after, before, oldest)
                    inside[oldest] = _OUT
                    book[GHOSTS] -= 1
        if victim >= 0:
            evicted[gone], evicted_at[gone] = victim - NODES, at
            gone += 1
        proven = inside[node] == _IN_GHOSTS
        if proven:
            _drop(after, before, node)
            book[GHOSTS] -= 1
        uses[node] = 0
        to_main = proven or (not book[EVICTED] and book[SMALL] >= small)
        inside[node] = _IN_MAIN if to_main else _IN_SMALL
        book[MAIN if to_main else SMALL] += 1
        _push(after, before, 1 if to_main else 0, node)
    return gone


@loop
def lfu(ids, first, partial, tables, book, code, evicted, evicted_at):
    """A list for each number of hits h: node 2h is its end, node 2i + 1 is block i."""
    inside, after, before, uses = tables[0], tables[1], tables[2], tables[3]
    gone = 0
    for at in range(len(ids)):
        block = ids[at]
        node = 2 * block + 1
        if inside[block]:
            code[at] = HIT
            _drop(after, before, node)
            uses[block] += 1
        else:
            if book[HELD] == book[CAPACITY]:
                while after[2 * book[FEWEST]] == 2 * book[FEWEST]:
                    book[FEWEST] += 1
                victim = after[2 * book[FEWEST]]
                _drop(after, before, victim)
                inside[victim // 2] = 0
                evicted[gone], evicted_at[gone] = victim // 2, at
                gone += 1
            else:
                book[HELD] += 1
            inside[block], uses[block] = 1, 0
            book[FEWEST] = 0
        _push(after, before, 2 * uses[block], node)
    return gone
