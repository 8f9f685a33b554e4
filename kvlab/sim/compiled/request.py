"""One request: look up, pin, make room, publish tail first, unpin. Bound to policies by `bind`.

`p` is the policy's verbs, `b` the functions of `behind` for the tier behind the device.
"""

from __future__ import annotations

from kvlab.sim.compiled import behind as b
from kvlab.sim.compiled import verbs as p  # those of policies are given by `bind`
from kvlab.sim.compiled.blocks import free, seal
from kvlab.sim.compiled.state import CAPACITY, CONTENT, HELD, NOTE, NOW, WHERE
from kvlab.sim.outcome import BROKEN_CHAIN, HIT, MISS, PARTIAL, REFUSED


def replay(
    s, host, ids, first, partial, moments, depths, code, gone, gone_at, block, at, moved
):  # fmt: skip
    """Replay requests; how many blocks left, `gone` [E] the contents and `gone_at` [E] when.

    s, host: the states of the tiers. ids int32 [A] contents; first int64 [R + 1]; partial bool [R]:
    the last block must not hit; moments as in `moments`; depths int32 [A], or none: as they are
    named. Written: code uint8 [A], gone int32 [A], gone_at int64 [A].
    block and moved int32, at int64: room for the longest request.
    """
    left = 0
    for request in range(len(first) - 1):
        begin, end = first[request], first[request + 1]
        p.begin(s, moments, request)
        b.begin(host, moments, request)
        x = p.expired(s) if p.EXPIRES else 0
        while x:
            gone[left], gone_at[left] = s.meta[x, CONTENT], begin
            left += 1
            free(s, x)
            x = p.expired(s)
        unique, missing = look_up(s, host, ids, begin, end, code, block, at)
        short = missing + s.book[HELD] - s.book[CAPACITY]
        if unique > s.book[CAPACITY] or (short > 0 and not p.EVICTS):
            give_up(s, ids, unique, block, at)
            code[begin:end] = REFUSED
        else:
            if partial[request] and end > begin and code[end - 1] >= HIT:
                code[end - 1] = PARTIAL
            pin(s, unique, block)
            b.claim(host, ids, unique, block, at)
            if short > 0:
                evict(s, ids, begin, short, moved)
                for i in range(short):
                    gone[left + i], gone_at[left + i] = s.meta[moved[i], CONTENT], begin
                left += short
                b.left(s, host, moved, short)
            b.arrived(host, ids, unique, block, at)
            publish(s, host, ids, begin, depths, unique, block, at, moved)
            unpin(s, unique, block)
        s.book[NOW] += 1
        p.tick(s)
    return left


def look_up(s, host, ids, begin, end, code, block, at):
    """Codes of the accesses; of the different contents, in order, their blocks (0: missing) and
    last accesses in `block` and `at`. Returns how many contents, and how many are missing."""
    where = s.content
    unique = missing = 0
    leading = True
    for access in range(begin, end):
        content = ids[access]
        x = where[content, WHERE]
        if x > 0:
            code[access] = HIT if leading else BROKEN_CHAIN
        else:
            code[access] = b.holds(host, content) if leading else MISS
            leading = code[access] >= HIT
        if x < 0 or (x > 0 and s.node[x, NOTE]):  # named before in this request
            at[-1 - x if x < 0 else s.node[x, NOTE] - 1] = access
            continue
        if x == 0:
            missing += 1
            where[content, WHERE] = -1 - unique
        else:
            s.node[x, NOTE] = unique + 1
        block[unique], at[unique] = x, access
        unique += 1
    return unique, missing


def give_up(s, ids, unique, block, at):
    """Leave all as it was, but for the marks that pins leave."""
    if p.MARKED:
        pin(s, unique, block)
        for i in range(unique):
            if block[i]:
                p.release(s, block[i])
    for i in range(unique):
        if block[i]:
            s.node[block[i], NOTE] = 0
        else:
            s.content[ids[at[i]], WHERE] = 0


def pin(s, unique, block):
    for i in range(unique):
        if block[i]:
            p.hold(s, block[i])


def unpin(s, unique, block):
    for i in range(unique - 1, -1, -1):
        if block[i] > 0:
            p.release(s, block[i])
            s.node[block[i], NOTE] = 0


def evict(s, ids, begin, short, moved):
    """Blocks that leave, in order, into `moved`; the last of the missing contents, tail first, come
    in their places."""
    access = begin - 1
    if p.EXPECTS:
        for _ in range(short):  # where the last of these begin
            access += 1
            while s.content[ids[access], WHERE] >= 0:
                access += 1
    for i in range(short):
        if p.EXPECTS:
            p.expect(s, ids[access])
            access -= 1
            while access >= begin and s.content[ids[access], WHERE] >= 0:
                access -= 1
        x = p.pop(s)
        moved[i] = x
        free(s, x)


def publish(s, host, ids, begin, depths, unique, block, at, moved):
    """The prompt's blocks can be found. Metadata changes once, tail first."""
    for i in range(unique):
        if not block[i]:
            access = at[i]
            parent = ids[access - 1] if access > begin else 0
            depth = depths[access] if len(depths) else access - begin
            block[i] = -seal(s, ids[access], parent, depth)
    high = unique - 1
    for i in range(unique - 1, -1, -1):
        s.book[NOW] += 1
        if block[i] > 0:
            p.touch(s, block[i], at[i])
            high = i - 1
            continue
        p.add(s, -block[i], at[i])
        if i == 0 or block[i - 1] > 0:
            b.born(s, host, block, i, high, moved)
