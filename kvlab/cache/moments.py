"""What the policies of a live cache hear of requests: which one comes, when, of which session."""

from __future__ import annotations

import time
from collections import defaultdict

from kvlab.core import BadInput
from kvlab.policy import EvictionPolicy, Moment


class Wall:
    """Time of the day's clock, for caches that nobody gives another one."""

    @property
    def now_ms(self) -> float:
        return 1e3 * time.perf_counter()


class Moments:
    """Counts requests and the turns of their sessions.

    policy: who is to hear of them. clock: whose `now_ms` is the time; a driver may put its own here
    (`kvlab.serve` does), and what it says never runs backwards.
    """

    def __init__(self, policy: EvictionPolicy):
        self.policy, self.clock = policy, Wall()
        self._number, self._ms = 0, float("-inf")
        self._turns: dict[int, int] = defaultdict(int)

    def next(self, tokens: int, session: int | None, tool: bool | None) -> Moment:
        """The request that comes now; the same again until it has `begun`, as it may find no room.

        Raises `BadInput` where the policy goes by what is not said.
        """
        said = {"session": session, "tool": tool}
        for field in self.policy.asks:
            if field in said and said[field] is None:
                raise BadInput("policy", self.policy.name, f"goes by the {field} of a request, and "
                               f"this one does not say it: open(..., {field}=...), or policy=lru")
        self._ms = max(self._ms, self.clock.now_ms)
        known = -1 if session is None else session
        turn = self._turns[known] if known >= 0 else 0
        return Moment(self._number, self._ms, known, turn, tokens,
                      None if tool is None else bool(tool))

    def begun(self, moment: Moment) -> None:
        """It has its sequence."""
        self._number += 1
        if moment.session >= 0:
            self._turns[moment.session] += 1
