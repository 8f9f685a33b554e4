"""Where a compiled tier keeps what it knows: the same few arrays for every policy.

A block is a row of `node` (the policy's notes) and `meta` (what was known when it was sealed), and
its number is its id in the ledger plus FIRST_BLOCK. The rows before are the ends of the policy's
lines. A content is a row of `content`; contents are numbered by first appearance, so that those of
one prompt lie side by side, from FIRST_CONTENT on. So 0 is never a block nor a content, and tables
that grow are filled with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FIRST_BLOCK = FIRST_CONTENT = 16  # rows for the ends of lines
END = 1  # the row of `content` that is the end of all ghost lists

# Columns of `node`. NEXT and PREV link a line or, for a block that is late, a heap; NOTE is its
# place among the blocks that the running request names, plus one.
NEXT, PREV, CHILD, STATE, LINE, USES, SPOT, NOTE = range(8)
LATE, SIZE, HIDDEN = CHILD, USES, NOTE  # of the end of a line
# Columns of `meta`; MARKS are those of `leaves`
CONTENT, PARENT, DEPTH, MARKS = range(4)
# Columns of `content`: the block that holds it, or -1 minus its place among those that the running
# request names; its known children; then a pair for each ghost list, and a number remembered.
WHERE, CHILDREN, LISTS = range(3)
VALUE = LISTS + 2  # where there is one list only
# Numbers in `book`
CAPACITY, HELD, FRESH, FREE, NOW, ENTRIES, DROPPED, LENGTH, HEAD, TAIL, OTHERS, PART = range(12)
PINNED, WRITTEN = 12, 13  # of a tier behind
GHOSTS = 14  # how many are remembered in each of three ghost lists
MINE = 17  # from here on the policy's own
BOOK = 24
THRESHOLD, CLOCK, OWN = range(3)  # numbers in `key`, in rows that are no block's
BINS = 1024  # of the histogram that finds the threshold of `order`


class State(NamedTuple):
    """One tier under one policy.

    node int32 [N, 8], meta int32 [N, 4]; place int64 [N], the order of a line; key float64 [N],
    that of `order`, and bits, the same memory as int64; rows before FIRST_BLOCK are the policy's.
    heap int32 and bound float64 [N], first int32 and first_key int64 [2, N], digits
    int64 [256]: the books of `order`. free int32 [N], ids given back. content int32 [C, W]. book
    int64. draws float64, random numbers to be used. costs float64, of computing a block, by depth.
    notes float64, as many as the policy asks for (NOTES).
    """

    node: np.ndarray
    meta: np.ndarray
    place: np.ndarray
    key: np.ndarray
    bits: np.ndarray
    heap: np.ndarray
    bound: np.ndarray
    first: np.ndarray
    first_key: np.ndarray
    digits: np.ndarray
    free: np.ndarray
    content: np.ndarray
    book: np.ndarray
    draws: np.ndarray
    costs: np.ndarray
    notes: np.ndarray


def new_state(
    capacity: int, width: int, rows: int = 0, ordered: bool = False, notes: int = 0
) -> State:
    """An empty tier of `capacity` blocks.

    width: columns of `content`. rows: more rows of `node`. ordered: `order` is used. notes: how
    many.
    """
    count = FIRST_BLOCK + capacity
    node = np.zeros((count + rows, 8), dtype=np.int32)
    ends = np.arange(FIRST_BLOCK)
    node[ends, NEXT] = node[ends, PREV] = ends
    book = np.zeros(BOOK, dtype=np.int64)
    book[CAPACITY], book[FRESH] = capacity, FIRST_BLOCK
    key, entries = np.zeros(count), max(count, BINS) if ordered else 0
    key[THRESHOLD] = -np.inf
    return State(
        node, np.zeros((count, 4), dtype=np.int32), np.zeros(count, dtype=np.int64), key,
        key.view(np.int64), np.zeros(entries, dtype=np.int32), np.zeros(entries),
        np.zeros((2, entries), dtype=np.int32), np.zeros((2, entries), dtype=np.int64),
        np.zeros(256, dtype=np.int64), np.zeros(count, dtype=np.int32), _contents(width), book,
        np.zeros(0), np.zeros(0), np.zeros(notes),
    )  # fmt: skip


# States with a state within: that of a door (`admission`), that of a tier below with room for the
# blocks on their way there (`stacked`), both.
_FIELDS, _DOOR = list(State.__annotations__.items()), [("door", State)]
_BELOW = [("below", State), ("lost", np.ndarray)]
Doored = NamedTuple("Doored", _FIELDS + _DOOR)
Stacked = NamedTuple("Stacked", _FIELDS + _BELOW)
StackedDoored = NamedTuple("StackedDoored", _FIELDS + _DOOR + _BELOW)


def with_door(state: State, door: State) -> Doored:
    return Doored(*state, door)


def stacked(state: State, below: State) -> Stacked | StackedDoored:
    """A tier and the tier below it, which gets what the tier gives up."""
    kind = StackedDoored if hasattr(state, "door") else Stacked
    return kind(*state, below, np.zeros(int(state.book[CAPACITY]), dtype=np.int32))


def _contents(width: int) -> np.ndarray:
    """No content yet, all ghost lists empty: each end is its own neighbour."""
    table = np.zeros((FIRST_CONTENT, width), dtype=np.int32)
    table[END, LISTS:] = END
    return table


def with_contents(state: State, count: int) -> State:
    """The state with room for contents below `count`; new rows are zeros."""
    for inner in ("door", "below"):
        if hasattr(state, inner):
            state = state._replace(**{inner: with_contents(getattr(state, inner), count)})
    have, width = state.content.shape
    if count <= have:
        return state
    longer = np.zeros((max(count, have + have // 2), width), dtype=np.int32)
    longer[:have] = state.content
    return state._replace(content=longer)
