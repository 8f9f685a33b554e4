"""Belady: a bucket for each next use, and for each depth of what nobody uses again.

`draws` has the bucket of each access of the trace; the highest bucket leaves first, and in it the
deepest block, of equals the least recent. Blocks of one bucket are one path of the trie, and
parents are used when their children are, so a block enters at the end. `first` has the two ends
of each bucket. `digits` says which hold anything: a bit for each, in words of 32, a bit for each
word that is not zero, and so on, up to one word.
"""

from __future__ import annotations

import numpy as np

from kvlab.sim.compiled.bind import cached, rare, verb
from kvlab.sim.compiled.lines import IS_HELD
from kvlab.sim.compiled.state import BOOK, DEPTH, LINE, MINE, NEXT, OWN, PREV, STATE, State

TOP, LEVELS, OFFSETS = MINE, MINE + 1, MINE + 2  # the highest bucket; levels of bits, where each is
SCRATCH = OWN
EXPONENT, BIAS = 52, 1023  # of a float64


def foresee(state: State, buckets: np.ndarray) -> State:
    """Plain Python. buckets int64 [A]."""
    count = int(buckets.max(initial=0)) + 1
    words, offset, level = count, 0, 0
    while words > 1 or not level:
        state.book[OFFSETS + level] = offset
        words = -(-words // 32)
        offset, level = offset + words, level + 1
    state.book[LEVELS] = level
    assert OFFSETS + level <= BOOK, "2^30 buckets"
    return state._replace(
        draws=buckets.astype(float), first=np.zeros((2, count), dtype=np.int32),
        digits=np.zeros(offset, dtype=np.int64),
    )  # fmt: skip


@verb
def add(s, x, at):
    s.node[x, LINE] = int(s.draws[at])
    if not s.node[x, STATE] & IS_HELD:
        _enter(s, x)


@verb
def touch(s, x, at):
    held = s.node[x, STATE] & IS_HELD
    if not held:
        _leave(s, x)
    s.node[x, LINE] = int(s.draws[at])
    if not held:
        _enter(s, x)


@verb
def hold(s, x):
    _leave(s, x)
    s.node[x, STATE] = IS_HELD


@verb
def release(s, x):
    s.node[x, STATE] = 0
    _enter(s, x)


@verb
def pop(s):
    x = s.first[0, s.book[TOP]]
    if x:
        _leave(s, x)
    return x


@verb
def _enter(s, x):
    node, bucket, after = s.node, int(s.node[x, LINE]), 0
    before = s.first[1, bucket]
    while before and s.meta[before, DEPTH] < s.meta[x, DEPTH]:
        after, before = before, node[before, PREV]
    node[x, PREV], node[x, NEXT] = before, after
    _join(s, bucket, before, x, x, after)
    if not before and not after:
        s.book[TOP] = max(s.book[TOP], bucket)
        for level in range(s.book[LEVELS]):
            word = s.book[OFFSETS + level] + (bucket >> 5)
            was = s.digits[word]
            s.digits[word] = was | (1 << (bucket & 31))
            if was:
                break
            bucket >>= 5


@verb
def _leave(s, x):
    node, bucket = s.node, int(s.node[x, LINE])
    before, after = node[x, PREV], node[x, NEXT]
    _join(s, bucket, before, after, before, after)
    if not before and not after:
        _clear(s, bucket)


@verb
def _join(s, bucket, before, then, last, after):
    """Behind `before` comes `then`, and `last` is before `after`; where these are 0, of the bucket
    itself."""
    if before:
        s.node[before, NEXT] = then
    else:
        s.first[0, bucket] = then
    if after:
        s.node[after, PREV] = last
    else:
        s.first[1, bucket] = last


@rare
def _clear(s, bucket):
    """A bucket is empty."""
    was_top = bucket == s.book[TOP]
    for level in range(s.book[LEVELS]):
        word = s.book[OFFSETS + level] + (bucket >> 5)
        s.digits[word] &= ~(1 << (bucket & 31))
        if s.digits[word]:
            break
        bucket >>= 5
    if was_top:
        top = 0
        for level in range(s.book[LEVELS] - 1, -1, -1):
            s.key[SCRATCH] = s.digits[s.book[OFFSETS + level] + top]  # its exponent is the top bit
            if s.bits[SCRATCH]:
                top = (top << 5) + (s.bits[SCRATCH] >> EXPONENT) - BIAS
        s.book[TOP] = top


@cached
def buckets(numbers, time, depth, counts, following, end, found):
    """The bucket of each access, into `found` int64 [A].

    numbers int32 [A] contents; time int64 [A] of the uses; depth int64 [A]; counts bool [A]:
    whether the use can hit. following int64 [contents]: `end`, which is after all times.
    """
    for at in range(len(numbers) - 1, -1, -1):
        after = following[numbers[at]]
        found[at] = after if after < end else end + depth[at]
        if counts[at]:
            following[numbers[at]] = time[at]
