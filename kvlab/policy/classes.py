"""Policies by class: blocks of one class wait in one LRU queue, and the heads are compared.

A worth that falls with the time since the last use needs no look at all blocks: of one class the
least recent is worth least, so a choice costs one comparison a class.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable
from math import inf

from kvlab.core import BadInput, BlockId
from kvlab.policy.base import BlockMeta, nothing
from kvlab.policy.belady import told_wrongly
from kvlab.policy.leaves import LeafFirst
from kvlab.policy.line import Line
from kvlab.policy.moment import NOW, Moment
from kvlab.policy.queues import QueuePolicy


class ByClass(QueuePolicy):
    """Subclasses say the class of a block at its use, the time, and what a head is worth."""

    name = ""

    def __init__(self):
        super().__init__([])
        self._line_of: dict[Hashable, Line] = {}
        self._since: dict[BlockId, float] = {}
        self.moment = NOW

    def sort(self, meta: BlockMeta) -> Hashable:
        """The class of a block that is used now."""
        raise NotImplementedError

    def clock(self) -> float:
        """The time of a use, in the unit of `worth`."""
        raise NotImplementedError

    def worth(self, key: Hashable, since: float) -> float | tuple:
        """Of a block of this class last used then; smallest leaves first, falling with age."""
        raise NotImplementedError

    def begin(self, moment: Moment):
        self.moment = moment
        return ()

    def add(self, meta):
        self._file(meta)

    def touch(self, meta):
        self._leave(meta)
        self._file(meta)

    def _file(self, meta):
        key = self.sort(meta)
        line = self._line_of.get(key)
        if line is None:
            line = self._line_of[key] = Line()
            self._lines.append(line)
        self._since[meta.id] = self.clock()
        self._enter(meta, line)

    def pop(self):
        best = None
        for key, line in self._line_of.items():
            if line:
                head = line.head()
                rank = self.worth(key, self._since[head.id]), head.place
                if best is None or rank < best[0]:
                    best = rank, line
        if best is None:
            raise nothing()
        return best[1].pop().id


class WALRU(ByClass):
    """A weighted sum of recency, the chance of reuse and size; the worst sum leaves.

    WA-LRU of SAGA (https://arxiv.org/abs/2605.00528): recency x min(1, age / horizon) + reuse x
    (1 - P) + size x (tokens / most tokens), the largest leaves.
    recency, reuse, size: the weights (0.5, 0.4, 0.1). horizon: seconds of age that count as all
    (default 300). Needs sessions.
    Differs: SAGA takes P from the graph of an agent's steps; here it is the share of requests at
    this turn of a session, with or without a call of a tool, that another one followed so far.
    Blocks go one by one, in classes of tokens by powers of two, where SAGA weighs whole sessions.
    """

    name = "wa_lru"
    asks = ("ms", "session")

    def __init__(
        self, recency: float = 0.5, reuse: float = 0.4, size: float = 0.1, horizon: float = 300.0
    ):
        weights = recency, reuse, size
        if not (min(weights) >= 0 and 0 < sum(weights) < inf and horizon > 0):
            remedy = "weights must be at least 0 and not all 0, the horizon more than 0"
            raise BadInput("policy", [recency, reuse, size, horizon], remedy)
        super().__init__()
        self.recency, self.reuse, self.size, self.horizon = recency, reuse, size, horizon
        self._seen: dict[tuple, int] = defaultdict(int)
        self._followed: dict[tuple, int] = defaultdict(int)
        self._last: dict[int, tuple] = {}  # session -> kind of its last request
        self._most = 1

    def begin(self, moment):
        kind = bool(moment.tool), min(moment.turn, 7)
        if moment.session in self._last:
            self._followed[self._last[moment.session]] += 1
        self._last[moment.session] = kind
        self._seen[kind] += 1
        self._most = max(self._most, moment.tokens)
        return super().begin(moment)

    def sort(self, meta):
        moment = self.moment
        return bool(moment.tool), min(moment.turn, 7), moment.tokens.bit_length()

    def clock(self):
        return self.moment.ms

    def worth(self, key, since):
        tool, turn, bits = key
        again = (self._followed[tool, turn] + 1) / (self._seen[tool, turn] + 2)
        age = min(1.0, (self.moment.ms - since) / (1e3 * self.horizon))
        tokens = min(1.0, (1 << bits) / self._most)
        return -(self.recency * age + self.reuse * (1 - again) + self.size * tokens)


class _Odds(ByClass):
    """The order of `Learned` among leaves."""

    def __init__(self, future: list):
        super().__init__()
        self._now, self._uses = 0, defaultdict(int)
        self._gaps: dict[tuple, list[int]] = defaultdict(list)  # requests until the next use
        self._count: dict[tuple, int] = defaultdict(int)
        self._chances: dict[tuple, list[float]] = {}
        self._fit(future)
        self._stay = 1.0  # requests that a block stays, about
        self._blocks_each = max(len(self._known) / max(len(future), 1), 1e-9)

    def _fit(self, future):
        last: dict[int, tuple[int, tuple]] = {}
        uses: dict[int, int] = defaultdict(int)
        for at, contents in enumerate(future):
            for depth, content in enumerate(contents):
                if content in last:
                    before, key = last[content]
                    self._gaps[key].append(at - before)
                uses[content] += 1
                key = self._class(depth, uses[content])
                self._count[key] += 1
                last[content] = at, key
        self._known = set(last)
        for gaps in self._gaps.values():
            gaps.sort()

    @staticmethod
    def _class(depth: int, uses: int) -> tuple:
        return depth.bit_length(), min(uses, 3)

    def resize(self, capacity):
        super().resize(capacity)
        self._stay = max((capacity or len(self._known)) / self._blocks_each, 1.0)

    def sort(self, meta):
        self._uses[meta.content] += 1
        return self._class(meta.depth, self._uses[meta.content])

    def clock(self):
        return self._now

    def worth(self, key, since):
        chances = self._chances.get(key)
        if chances is None:
            chances = self._chances[key] = self._table(key)
        return chances[min(self._now - since, len(chances) - 1)]

    def _table(self, key: tuple) -> list[float]:
        """Chance by age of a use while it would stay; beyond the longest gap seen it is 0."""
        gaps, alive = self._gaps.get(key, [0]), self._count[key]
        chances = []
        for age in range(gaps[-1] + 1):
            gone = bisect_right(gaps, age)
            soon = bisect_right(gaps, age + self._stay) - gone
            chances.append(soon / max(alive - gone, 1))
        return chances

    def tick(self, step):
        self._now += 1


class Learned(LeafFirst):
    """The block least likely to be used while it would stay, as learned from the very trace.

    What a predictor of reuse could gain that sees a block's depth and its uses so far: its table is
    fitted in hindsight, which no server can. Belady knows each use; this one the distribution of
    each class, as the workload-aware policy of "KVCache Cache in the Wild"
    (https://arxiv.org/abs/2506.02634) does without its exponential fit. By leaves, since classes
    alone would take blocks out of the middle of a prefix.
    future: contents of each request, in order. Time is the number of `tick`s, one a request.
    """

    name = "learned"
    foresees = True

    def __init__(self, future: Iterable[list[int]] | None = None, by_request: bool = True):
        if future is None or not by_request:
            remedy = "needs the requests of a trace, known ahead; only replays have them"
            raise BadInput("policy", self.name, remedy)
        try:
            odds = _Odds(list(future))
        except TypeError as error:
            raise told_wrongly("lists of contents", error) from error
        super().__init__(odds)
