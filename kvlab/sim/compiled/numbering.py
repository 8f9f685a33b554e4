"""Contents numbered by first appearance, whatever their ids: so those of a prompt lie together."""

from __future__ import annotations

import numpy as np

from kvlab.sim.compiled.bind import cached
from kvlab.sim.compiled.state import FIRST_CONTENT

STEP = 1 << 18  # ids numbered before the table is looked at again
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class Numbering:
    """Numbers ids int64 as FIRST_CONTENT, FIRST_CONTENT + 1, ...; about 24 bytes a distinct id.

    `ids` [count] are the ids by number. Mostly an id has the number after that of the id before it,
    since prompts repeat how they begin; a hash table knows the rest.
    """

    def __init__(self):
        self.count = FIRST_CONTENT
        self.ids = np.zeros(1 << 10, dtype=np.int64)
        self._table = np.zeros(1 << 12, dtype=np.int32)

    def number(self, ids: np.ndarray) -> np.ndarray:
        """int32, as many as ids; new ones are given numbers."""
        out = np.empty(len(ids), dtype=np.int32)
        last = 0
        for start in range(0, len(ids), STEP):
            part = ids[start : start + STEP]
            self._make_room(self.count + len(part))
            known = out[start : start + STEP]
            self.count = _number(part, known, self.ids, self._table, self.count, last)
            last = int(known[-1])
        return out

    def _make_room(self, count: int) -> None:
        if count > len(self.ids):
            more = max(count, 2 * len(self.ids)) - len(self.ids)
            self.ids = np.concatenate([self.ids, np.zeros(more, dtype=np.int64)])
        if 2 * count > len(self._table):
            self._table = np.zeros(1 << (2 * count).bit_length(), dtype=np.int32)
            _enter_all(self.ids, self._table, self.count)


@cached
def _spot(id, table):
    """Where a hash table of a power of two begins to look for an id."""
    return np.int64((np.uint64(id) * _SPREAD) >> np.uint64(20)) & (len(table) - 1)


@cached
def _number(ids, out, known, table, count, last):
    for i in range(len(ids)):
        id = ids[i]
        last += 1
        if last >= count or last < FIRST_CONTENT or known[last] != id:
            spot = _spot(id, table)
            while table[spot] and known[table[spot]] != id:
                spot = (spot + 1) & (len(table) - 1)
            if not table[spot]:
                table[spot], known[count] = count, id
                count += 1
            last = table[spot]
        out[i] = last
    return count


@cached
def _enter_all(known, table, count):
    for number in range(FIRST_CONTENT, count):
        spot = _spot(known[number], table)
        while table[spot]:
            spot = (spot + 1) & (len(table) - 1)
        table[spot] = number
