"""Which choice for each item, where losses add up and bytes are given: exact, by tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """One way to store an item: what it loses, and its bytes."""

    loss: float
    nbytes: int


def allot(items: Sequence[Sequence[Choice]], nbytes: int) -> list[int] | None:
    """The number of the choice of each item that together lose least within `nbytes`; None where
    not even the smallest fit.

    Dynamic programming over bytes in units of their greatest common divisor, so the sum of losses
    is the least there is, not merely a good one.
    """
    unit = reduce(gcd, (choice.nbytes for choices in items for choice in choices), 0) or 1
    room = nbytes // unit
    if sum(min(c.nbytes for c in choices) for choices in items) > room * unit:
        return None
    best, taken = np.zeros(room + 1), []  # best[b]: the least loss of the items so far within b
    for choices in items:
        tried = np.full((len(choices), room + 1), np.inf)
        for number, choice in enumerate(choices):
            size = choice.nbytes // unit
            if size <= room:
                tried[number, size:] = best[: room + 1 - size] + choice.loss
        taken.append(tried.argmin(0))
        best = tried.min(0)
    found = []
    for choices, table in zip(reversed(items), reversed(taken)):
        found.append(int(table[room]))
        room -= choices[found[-1]].nbytes // unit
    return found[::-1]
