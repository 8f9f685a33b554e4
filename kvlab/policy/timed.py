"""Policies by the clock of requests: a time to live, and keeping what waits for a tool."""

from __future__ import annotations

from kvlab.core import BadInput, BlockId
from kvlab.policy.classes import ByClass
from kvlab.policy.classic import LRU
from kvlab.policy.moment import NOW


class TTL(LRU):
    """LRU whose blocks end after some time, whether there is room or not.

    As hosted services bill prompt caches: 5 minutes, or an hour at a higher price, renewed by each
    use (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching).
    seconds: a block lives (default 300). refresh: whether a use renews it (default true); else the
    oldest leaves first, too.
    """

    name = "ttl"
    asks = ("ms",)
    expires = True

    def __init__(self, seconds: float = 300.0, refresh: bool = True):
        if not seconds > 0:
            raise BadInput("policy.seconds", seconds, "must be more than 0")
        super().__init__()
        self.seconds, self.refresh = seconds, refresh
        self._ms = NOW.ms
        self._since: dict[BlockId, float] = {}  # held blocks included

    def begin(self, moment):
        self._ms = moment.ms
        dead, limit, line = [], moment.ms - 1e3 * self.seconds, self._line
        while line and self._since[line.head().id] <= limit:
            dead.append(line.pop().id)
            del self._since[dead[-1]]
        return dead

    def add(self, meta):
        self._since.setdefault(meta.id, self._ms)  # one that was pinned has its own
        meta.place = meta.last if self.refresh else meta.born
        self._line.push(meta)

    def touch(self, meta):
        if self.refresh:
            self._since[meta.id] = self._ms
            super().touch(meta)

    def hold(self, meta):
        self._line.remove(meta)

    def remove(self, meta):
        super().remove(meta)
        self._since.pop(meta.id, None)

    def pop(self):
        id = super().pop()
        del self._since[id]
        return id


class KeepUntilReturn(ByClass):
    """LRU, but what waits for a tool stays until its session is back, or for `patience` seconds.

    After Continuum (https://arxiv.org/abs/2511.02230), which keeps blocks through calls of tools
    for a time to live. An agent's next prompt is sure to come where a chat's is not.
    patience: seconds after which a call of a tool counts as given up (default 300).
    Differs: one patience for all tools, and the blocks are not pinned: where nothing else is left,
    the longest wait gives way.
    """

    name = "keep_until_return"
    asks = ("ms", "tool")

    def __init__(self, patience: float = 300.0):
        if not patience > 0:
            raise BadInput("policy.patience", patience, "must be more than 0 seconds")
        super().__init__()
        self.patience = patience

    def sort(self, meta):
        return bool(self.moment.tool)

    def clock(self):
        return self.moment.ms

    def worth(self, key, since):
        return key and self.moment.ms - since <= 1e3 * self.patience, since
