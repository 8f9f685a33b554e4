"""What policies hear of each request, as rows of numbers: `policy.Moment` for compiled loops."""

from __future__ import annotations

import numpy as np

from kvlab.sim.trace import Trace

# Columns. TOOL is 0 or 1, unknown as no; TURN stops at MOST_TURNS; BEFORE is the kind of the
# session's request before (TOOL * (MOST_TURNS + 1) + TURN), -1 where there was none.
MS, TOKENS, TOOL, TURN, BEFORE = range(5)
MOST_TURNS = 7
SILENCE = np.zeros((0, 5))  # for policies that do not listen


class Said:
    """Rows of each piece, float64 [R, 5]; sessions are followed over all pieces."""

    def __init__(self):
        self._turns: dict[int, int] = {}
        self._kinds: dict[int, int] = {}

    def of(self, piece: Trace) -> np.ndarray:
        count, column = len(piece), piece.columns.get
        rows = np.zeros((count, 5))
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
        before = np.roll(kinds, 1)
        before[begins] = [self._kinds.get(name, -1) for name in names.tolist()]
        rows[order, BEFORE] = before
        self._turns.update(zip(names.tolist(), (np.array(known, dtype=np.int64) + sizes).tolist()))
        self._kinds.update(zip(names.tolist(), kinds[begins + sizes - 1].tolist()))
        return rows
