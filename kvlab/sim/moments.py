"""What policies hear of each request of a trace, and the refusal of what a trace does not say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from kvlab.core import BadInput
from kvlab.policy import Moment
from kvlab.sim.trace import Trace

_SAYS = {"session": "which requests are a session", "tool": "which answers call a tool"}


def check_asks(policy: str, asks: Sequence[str], trace: Trace) -> None:
    """Raise `BadInput` where a policy goes by what the trace does not hold."""
    for field in asks:
        if field in _SAYS and field not in trace.columns:
            remedy = f"asks {_SAYS[field]}, and trace {trace.name} does not say it"
            raise BadInput("policy", policy, remedy)


class Moments:
    """The `Moment` of each request, piece by piece; turns are counted over all pieces."""

    def __init__(self):
        self._number = 0
        self._turns: dict[int, int] = defaultdict(int)

    def of(self, piece: Trace) -> Iterator[Moment]:
        """In the order of the piece, at the time of arrival."""
        unknown = [-1] * len(piece)
        sessions = piece.columns["session"].tolist() if "session" in piece.columns else unknown
        tools = piece.columns["tool"].tolist() if "tool" in piece.columns else unknown
        rows = zip(piece.arrival_ms.tolist(), sessions, piece.input_tokens.tolist(), tools)
        for ms, session, tokens, tool in rows:
            turn = self._turns[session]
            if session >= 0:
                self._turns[session] += 1
            called = None if tool < 0 else bool(tool)
            yield Moment(self._number, ms, session, turn, tokens, called)
            self._number += 1
