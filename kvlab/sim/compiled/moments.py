"""What policies hear of each request, as rows of numbers: `policy.Moment` for compiled loops."""

from __future__ import annotations

import numpy as np

from kvlab.sim.trace import Trace

# Columns. TOOL is 0 or 1, unknown as no; TURN stops at MOST_TURNS; BEFORE is the kind of the
# session's request before (TOOL * (MOST_TURNS + 1) + TURN), -1 where there was none; LAST is the
# number of that request, over all pieces.
MS, TOKENS, TOOL, TURN, BEFORE, LAST = range(6)
MOST_TURNS = 7
SILENCE = np.zeros((0, 6))  # for policies that do not listen


def heard_since(moments: np.ndarray, number: int) -> np.ndarray:
    """The rows as one hears them who hears nothing before the request of this number."""
    forgotten = moments[:, LAST] < number
    if not forgotten.any():
        return moments
    moments = moments.copy()
    moments[forgotten, BEFORE] = -1
    return moments


class Said:
    """Rows of each piece, float64 [R, 6]; sessions are followed over all pieces."""

    def __init__(self):
        self.count = 0  # requests so far
        self._turns: dict[int, int] = {}
        self._kinds: dict[int, int] = {}
        self._numbers: dict[int, int] = {}

    def of(self, piece: Trace) -> np.ndarray:
        count, column = len(piece), piece.columns.get
        rows = np.zeros((count, 6))
        rows[:, MS], rows[:, TOKENS] = piece.arrival_ms, piece.input_tokens
        rows[:, TOOL] = column("tool", np.zeros(count)) > 0
        session = column("session", np.full(count, -1))
        order = np.argsort(session, kind="stable")
        names, begins, sizes = np.unique(session[order], return_index=True, return_counts=True)
        turns = np.arange(count) - np.repeat(begins, sizes)
        known = [self._turns.get(name, 0) for name in names.tolist()]
        turns += np.repeat(np.array(known, dtype=np.int64), sizes)
        turns[session[order] < 0] = 0
        rows[order, TURN] = np.minimum(turns, MOST_TURNS)
        kinds = (rows[:, TOOL] * (MOST_TURNS + 1) + rows[:, TURN])[order]
        rows[order, BEFORE] = _before(kinds, names, begins, sizes, self._kinds)
        rows[order, LAST] = _before(order + self.count, names, begins, sizes, self._numbers)
        self._turns.update(zip(names.tolist(), (np.array(known, dtype=np.int64) + sizes).tolist()))
        self.count += count
        return rows


def _before(of, names, begins, sizes, last: dict) -> np.ndarray:
    """What is said `of` [R] the request before, session by session; `last`, by session, goes on."""
    before = np.roll(of, 1)
    before[begins] = [last.get(name, -1) for name in names.tolist()]
    last.update(zip(names.tolist(), of[begins + sizes - 1].tolist()))
    return before
