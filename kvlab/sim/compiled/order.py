"""Blocks by rising (`key`, id): `policy.base.PriorityPolicy` on arrays.

Only the first blocks are kept in order: those whose key is not above a threshold. When they are
used up, all blocks are looked through, the threshold rises so that about a quarter of them lie
below, and these are sorted (by radix, so equal keys stay by id). A block filed above the threshold
costs nothing, one below enters a heap beside them. Entries are not taken back: one counts if its
block is here (SPOT), not held, and still has this key.
"""

from __future__ import annotations

from math import inf

from kvlab.sim.compiled.bind import rare, verb
from kvlab.sim.compiled.lines import IS_HELD
from kvlab.sim.compiled.state import (
    BINS,
    FIRST_BLOCK,
    FRESH,
    HEAD,
    LENGTH,
    SPOT,
    STATE,
    TAIL,
    THRESHOLD,
)  # fmt: skip

SHARE = 4  # part of the blocks that is sorted at a time
MOST = (1 << 63) - 1


@verb
def file(s, x, key):
    """Give a block, new or known, its key."""
    s.key[x] = key + 0.0  # no minus zero: keys are sorted by their bits
    s.node[x, SPOT] = 1
    if key <= s.key[THRESHOLD] and not s.node[x, STATE] & IS_HELD:
        _push(s, x, key)


@verb
def hold(s, x):
    s.node[x, STATE] |= IS_HELD


@verb
def release(s, x):
    s.node[x, STATE] &= ~IS_HELD
    if s.key[x] <= s.key[THRESHOLD]:
        _push(s, x, s.key[x])


@verb
def remove(s, x):
    s.node[x, SPOT] = s.node[x, STATE] = 0


@verb
def pop(s):
    """Take out the first block that is not held; 0 if there is none."""
    while True:
        x, other = _sorted_head(s), _heap_head(s)
        if x and (not other or _before(s.key[x], x, s.bound[0], other)):
            s.book[HEAD] += 1
        elif other:
            x = other
            _drop_top(s)
        elif _sort_more(s):
            continue
        s.node[x, SPOT] = 0
        return x


@verb
def _before(key, x, other_key, other):
    return key < other_key or (key == other_key and x < other)


@verb
def _here(s, x):
    return s.node[x, SPOT] and not s.node[x, STATE] & IS_HELD


@verb
def _sorted_head(s):
    """The first sorted block that still counts, 0 if there is none."""
    head, end, found = s.book[HEAD], s.book[TAIL], 0
    while head < end:
        x = s.first[0, head]
        if _here(s, x) and _rank(s, x) == s.first_key[0, head]:
            found = x
            break
        head += 1
    s.book[HEAD] = head
    return found


@verb
def _heap_head(s):
    """The first block of the heap, those that no longer count being dropped; 0 if it is empty."""
    while s.book[LENGTH]:
        x = s.heap[0]
        if _here(s, x) and s.key[x] == s.bound[0]:
            return x
        _drop_top(s)
    return 0


@verb
def _rank(s, x):
    """The key as an integer of the same order."""
    bits = s.bits[x]
    return bits ^ ((bits >> 63) & MOST)


@verb
def _push(s, x, key):
    heap, bound, spot = s.heap, s.bound, s.book[LENGTH]
    if spot == len(heap):  # too many that no longer count: begin anew
        s.book[LENGTH] = s.book[HEAD] = s.book[TAIL] = 0
        s.key[THRESHOLD] = -inf
        return
    s.book[LENGTH] = spot + 1
    while spot:
        up = (spot - 1) >> 1
        if _before(bound[up], heap[up], key, x):
            break
        heap[spot], bound[spot] = heap[up], bound[up]
        spot = up
    heap[spot], bound[spot] = x, key


@verb
def _drop_top(s):
    heap, bound, end = s.heap, s.bound, s.book[LENGTH] - 1
    s.book[LENGTH] = end
    x, key, spot = heap[end], bound[end], 0
    while True:
        child = 2 * spot + 1
        if child >= end:
            break
        right = child + 1
        if right < end and _before(bound[right], heap[right], bound[child], heap[child]):
            child = right
        if _before(key, x, bound[child], heap[child]):
            break
        heap[spot], bound[spot] = heap[child], bound[child]
        spot = child
    heap[spot], bound[spot] = x, key


@rare
def _sort_more(s):
    """Sort the next blocks, all being above the threshold; how many."""
    low, high, count = inf, -inf, 0
    for x in range(FIRST_BLOCK, s.book[FRESH]):
        if _here(s, x):
            low, high, count = min(low, s.key[x]), max(high, s.key[x]), count + 1
    if not count:
        return 0
    bins = min(BINS, count)
    scale = (bins - 1) / (high - low) if high > low else 0.0
    size = s.first_key[1]
    size[:bins] = 0
    for x in range(FIRST_BLOCK, s.book[FRESH]):
        if _here(s, x):
            size[int((s.key[x] - low) * scale)] += 1
    last, below = 0, size[0]
    while below * SHARE < count:
        last += 1
        below += size[last]
    taken = 0
    for x in range(FIRST_BLOCK, s.book[FRESH]):
        if _here(s, x) and int((s.key[x] - low) * scale) <= last:
            s.first[0, taken], s.first_key[0, taken] = x, _rank(s, x)
            s.key[THRESHOLD] = max(s.key[THRESHOLD], s.key[x])
            taken += 1
    _sort(s, taken)
    s.book[HEAD], s.book[TAIL] = 0, taken
    return taken


@verb
def _sort(s, count):
    """The first `count` entries by rank, stable, byte by byte where they differ."""
    differ, start = 0, 0
    for i in range(count):
        differ |= s.first_key[0, i] ^ s.first_key[0, 0]
    for byte in range(8):
        if (differ >> (8 * byte)) & 255:
            _sort_byte(s, count, start, 8 * byte, 128 if byte == 7 else 0)
            start = 1 - start
    for i in range(count if start else 0):
        s.first[0, i], s.first_key[0, i] = s.first[1, i], s.first_key[1, i]


@verb
def _sort_byte(s, count, start, shift, sign):
    size = s.digits
    size[:] = 0
    for i in range(count):
        size[((s.first_key[start, i] >> shift) & 255) ^ sign] += 1
    below = 0
    for digit in range(256):
        size[digit], below = below, below + size[digit]
    for i in range(count):
        key = s.first_key[start, i]
        digit = ((key >> shift) & 255) ^ sign
        spot = size[digit]
        size[digit] = spot + 1
        s.first[1 - start, spot], s.first_key[1 - start, spot] = s.first[start, i], key
