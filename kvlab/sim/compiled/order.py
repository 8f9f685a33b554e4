"""Blocks by rising (`key`, id): `policy.base.PriorityPolicy` on arrays.

Only the first blocks are kept in order: those whose key is not above a threshold. The others are
a mere list (`place`; CHILD says who is in it). When the first are used up, the threshold rises so
that a part of the list lies below, which is sorted by radix. So a block filed above the threshold
costs next to nothing; one below enters a heap. Entries are not taken back: one counts if its block
is here (SPOT), not held, and still has this key. Where the heap grows large, all begins anew with a
lower threshold.
"""

from __future__ import annotations

from math import inf

from kvlab.sim.compiled.bind import rare, verb
from kvlab.sim.compiled.lines import IS_HELD
from kvlab.sim.compiled.state import (
    BINS,
    CHILD,
    FIRST_BLOCK,
    FRESH,
    HEAD,
    LENGTH,
    OTHERS,
    PART,
    SPOT,
    STATE,
    TAIL,
    THRESHOLD,
)  # fmt: skip

LISTED = CHILD
LEAST, GREATEST = 4, 64  # the part of the list that is sorted at a time is one in so many
LARGE = 16  # entries; and the part of all blocks that a heap should not reach
MOST = (1 << 63) - 1


@verb
def file(s, x, key):
    """Give a block, new or known, its key."""
    s.key[x] = key + 0.0  # no minus zero: keys are sorted by their bits
    s.node[x, SPOT] = 1
    if not s.node[x, STATE] & IS_HELD:
        _enter(s, x)


@verb
def hold(s, x):
    s.node[x, STATE] |= IS_HELD


@verb
def release(s, x):
    s.node[x, STATE] &= ~IS_HELD
    _enter(s, x)


@verb
def _enter(s, x):
    if s.key[x] <= s.key[THRESHOLD]:
        _push(s, x, s.key[x])
    elif not s.node[x, LISTED]:
        s.node[x, LISTED] = 1
        s.place[s.book[OTHERS]] = x
        s.book[OTHERS] += 1


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
    if spot >= LARGE and spot * LARGE >= s.book[FRESH]:
        _begin_anew(s)
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
def _begin_anew(s):
    """All blocks that are here into the list."""
    s.book[LENGTH] = s.book[HEAD] = s.book[TAIL] = 0
    s.key[THRESHOLD] = -inf
    s.book[PART] = min(GREATEST, 2 * s.book[PART])
    for x in range(FIRST_BLOCK, s.book[FRESH]):
        if _here(s, x) and not s.node[x, LISTED]:
            s.node[x, LISTED] = 1
            s.place[s.book[OTHERS]] = x
            s.book[OTHERS] += 1


@verb
def _look_through(s):
    """Leave in the list what is above the threshold: how many, the lowest and the highest key."""
    low, high, count = inf, -inf, 0
    for i in range(s.book[OTHERS]):
        x = s.place[i]
        if _here(s, x) and s.key[x] > s.key[THRESHOLD]:
            low, high = min(low, s.key[x]), max(high, s.key[x])
            s.place[count] = x
            count += 1
        else:
            s.node[x, LISTED] = 0
    s.book[OTHERS] = count
    return count, low, high


@rare
def _sort_more(s):
    """Sort the next blocks, all being above the threshold; how many."""
    count, low, high = _look_through(s)
    if not count:
        return 0
    s.book[PART] = max(LEAST, s.book[PART] >> 1)
    bins = min(BINS, count)
    scale = (bins - 1) / (high - low) if high > low else 0.0
    size = s.first_key[1]
    size[:bins] = 0
    for i in range(count):
        size[int((s.key[s.place[i]] - low) * scale)] += 1
    last, below = 0, size[0]
    while below * s.book[PART] < count:
        last += 1
        below += size[last]
    taken = left = 0
    for i in range(count):
        x = s.place[i]
        if int((s.key[x] - low) * scale) <= last:
            s.first[0, taken], s.first_key[0, taken] = x, _rank(s, x)
            s.key[THRESHOLD] = max(s.key[THRESHOLD], s.key[x])
            s.node[x, LISTED] = 0
            taken += 1
        else:
            s.place[left] = x
            left += 1
    s.book[OTHERS] = left
    _sort(s, taken)
    s.book[HEAD], s.book[TAIL] = 0, taken
    return taken


@verb
def _sort(s, count):
    """The first `count` entries by rank and id, byte by byte where they differ."""
    ids, ranks = 0, 0
    for i in range(count):
        ids |= s.first[0, i] ^ s.first[0, 0]
        ranks |= s.first_key[0, i] ^ s.first_key[0, 0]
    start = 0
    for byte in range(4):
        if (ids >> (8 * byte)) & 255:
            _sort_byte(s, count, start, 8 * byte, 0, True)
            start = 1 - start
    for byte in range(8):
        if (ranks >> (8 * byte)) & 255:
            _sort_byte(s, count, start, 8 * byte, 128 if byte == 7 else 0, False)
            start = 1 - start
    for i in range(count if start else 0):
        s.first[0, i], s.first_key[0, i] = s.first[1, i], s.first_key[1, i]


@rare
def _sort_byte(s, count, start, shift, sign, by_id):
    """Entries from one row to the other, by one byte of the id or the rank; equal ones stay."""
    size, here, rank = s.digits, s.first[start], s.first_key[start]
    size[:] = 0
    for i in range(count):
        value = here[i] if by_id else rank[i]
        size[((value >> shift) & 255) ^ sign] += 1
    below = 0
    for digit in range(256):
        size[digit], below = below, below + size[digit]
    for i in range(count):
        value = here[i] if by_id else rank[i]
        digit = ((value >> shift) & 255) ^ sign
        spot = size[digit]
        size[digit] = spot + 1
        s.first[1 - start, spot], s.first_key[1 - start, spot] = here[i], rank[i]
