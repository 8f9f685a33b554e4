"""In which order requests come to service: as recorded, or after the answers that they follow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from heapq import heappop, heappush

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.sessions import Sessions
from kvlab.sim.trace import Trace


def refuse_unsorted(piece: Trace) -> None:
    back = np.flatnonzero(np.diff(piece.arrival_ms, prepend=0.0) < 0)
    if len(back):
        raise BadInput("trace", piece.name, f"request {back[0]} arrives before the one ahead")


class Open:
    """Requests come when the trace says, whatever becomes of those before."""

    def __init__(self, piece: Trace):
        self._ms, self._at = piece.arrival_ms.tolist(), 0
        refuse_unsorted(piece)

    @property
    def left(self) -> bool:
        """Whether requests are still to come."""
        return self._at < len(self._ms)

    def next_ms(self) -> float | None:
        """When the next request comes; None where none can come before something is done."""
        return self._ms[self._at] if self.left else None

    def pop(self) -> tuple[float, int]:
        """(ms, index) of the next request."""
        self._at += 1
        return self._ms[self._at - 1], self._at - 1

    def done(self, at: int, ms: float) -> None:
        """Hear that a request has its answer."""

    def as_ran(self, piece: Trace, ran: list[tuple[float, int]]) -> Trace | None:
        """The piece in the order and at the times of `ran`, None where they are its own."""
        return None


class Closed(Open):
    """A request comes `pause_ms` after the answer that it `follows`; where sessions run so many at
    a time, one begins when another has ended. Columns as `Sessions.apply` makes them."""

    def __init__(self, piece: Trace, sessions: Sessions):
        columns = piece.columns
        if "follows" not in columns:
            raise BadInput("sessions", piece.name, "is no trace that Sessions.apply has made")
        place = {number: at for at, number in enumerate(columns["number"].tolist())}
        self._pause = columns["pause_ms"].tolist()
        self._after: dict[int, list[int]] = {}
        session = columns["session"]
        root = columns.get("root", session)
        self._root = np.where(root < 0, session, root).tolist()
        self._count = Counter(self._root)
        self._ready: list[tuple[float, int]] = []
        self.left = len(piece)
        first: dict[int, list[int]] = {}  # of each session, the requests that follow none
        for at, before in enumerate(columns["follows"].tolist()):
            if before in place:
                self._after.setdefault(place[before], []).append(at)
            else:
                first.setdefault(self._root[at], []).append(at)
        self._waiting = list(reversed(first.values()))
        begins = piece.arrival_ms.tolist()
        if sessions.arrivals == "concurrency":
            for _ in range(min(sessions.concurrency, len(self._waiting))):
                self._begin(0.0)
        while sessions.arrivals != "concurrency" and self._waiting:
            at = self._waiting[-1][0]
            self._begin(begins[at] - self._pause[at])

    left = 0  # requests still to come

    def _begin(self, ms: float) -> None:
        """The next session begins."""
        for at in self._waiting.pop():
            heappush(self._ready, (ms + self._pause[at], at))

    def next_ms(self):
        return self._ready[0][0] if self._ready else None

    def pop(self):
        self.left -= 1
        return heappop(self._ready)

    def done(self, at, ms):
        for following in self._after.get(at, ()):
            heappush(self._ready, (ms + self._pause[following], following))
        root = self._root[at]
        self._count[root] -= 1
        if not self._count[root] and self._waiting:
            self._begin(ms)

    def as_ran(self, piece, ran):
        ms, order = np.array(ran, dtype=float).reshape(-1, 2).T
        ms = np.maximum.accumulate(ms) if len(ms) else ms
        return replace(piece.select(order.astype(np.int64)), arrival_ms=ms)


def arrivals_of(piece: Trace, sessions: Sessions | None) -> Open:
    if sessions is None or sessions.loop == "open":
        return Open(piece)
    return Closed(piece, sessions)
