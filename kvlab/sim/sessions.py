"""How sessions meet each other: the choices that a trace of single sessions leaves open.

Published ideal hit rates of one set of agent sessions lie between 66 and 97 %, by these choices and
those of `Definitions`. Like them they change the trace before it is replayed, and stand in every
row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from heapq import heapify, heapreplace

import numpy as np

from kvlab.core import BadInput
from kvlab.kinds import members
from kvlab.sim.trace import Trace

_CHOICES = {
    "arrivals": ("recorded", "together", "poisson", "concurrency"),
    "loop": ("open", "closed"),
    "over_context": ("cut", "drop", "end"),
}


@members("sessions")
@dataclass(frozen=True)
class Sessions:
    """When requests come, how long a prompt may be, and what sessions have in common.

    arrivals: of sessions; "recorded" as the trace says, "together" all at 0, "poisson" at `rate` a
    second, "concurrency" so many at a time, a new one when one ends.
    think: the pause before a session's next request, "recorded", or so many seconds for all.
    loop: "open" requests come when they were recorded to; in a "closed" one the next request waits
    for the answer and thinks then. Without `service` answers take no time.
    context_tokens: the longest prompt that the engine takes. over_context: a longer one is "cut" to
    its beginning, refused ("drop"), or the session ends there ("end").
    shared_heads: share of tools and system prompt that all sessions of a model begin with alike,
    where ids are local to a session (kv-cache-tester assumes 0.5 to 0.75). Sub-agents share among
    themselves. seed: of poisson.
    """

    arrivals: str = "recorded"
    rate: float = 1.0
    concurrency: int = 8
    think: str | float = "recorded"
    loop: str = "open"
    context_tokens: int | None = None
    over_context: str = "cut"
    shared_heads: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                quoted = " or ".join(repr(choice) for choice in known)
                raise BadInput(f"sessions.{name}", getattr(self, name), f"must be {quoted}")
        for name, fine in self._limits():
            if not fine:
                raise BadInput(f"sessions.{name}", getattr(self, name), "is out of range")
        if self.think != "recorded" and not _is_pause(self.think):
            remedy = "must be 'recorded' or seconds of at least 0"
            raise BadInput("sessions.think", self.think, remedy)

    def _limits(self) -> Iterator[tuple[str, bool]]:
        yield "rate", self.rate > 0
        yield "concurrency", self.concurrency >= 1
        yield "context_tokens", self.context_tokens is None or self.context_tokens >= 1
        yield "shared_heads", 0 <= self.shared_heads <= 1

    def params(self) -> dict:
        """What was chosen, for the parameters of a row; a number that plays no part is left out."""
        told = {f"sessions_{name}": value for name, value in asdict(self).items()}
        idle = {
            "rate": self.arrivals != "poisson", "seed": self.arrivals != "poisson",
            "concurrency": self.arrivals != "concurrency",
            "over_context": self.context_tokens is None,
        }  # fmt: skip
        return {k: v for k, v in told.items() if not idle.get(k.removeprefix("sessions_"))}

    def apply(self, trace: Trace) -> Trace:
        """The trace with these choices made. Of a closed loop, as if answers took no time; the
        columns `number`, `follows` and `pause_ms` let a replay with service times know better."""
        if self.shared_heads:
            trace = with_shared_heads(trace, self.shared_heads)
        if self.context_tokens is not None:
            trace = within_context(trace, self.context_tokens, self.over_context)
        if (self.arrivals, self.think, self.loop) == ("recorded", "recorded", "open"):
            return trace
        return self._scheduled(trace)

    def _scheduled(self, trace: Trace) -> Trace:
        sessions = _sessions(trace)
        root = trace.columns.get("root", sessions)
        root = np.where(root < 0, sessions, root)
        follows = predecessors(sessions, root)
        since = _since_first(trace, root)
        pause = self._pauses(trace, follows, since)
        after = self._since_start(follows, pause, since)
        begin = self._begins(trace, root, after)
        order = np.argsort(begin + after, kind="stable")
        place = {"number": np.arange(len(trace)), "follows": follows, "pause_ms": pause}
        made = replace(trace, arrival_ms=begin + after, columns={**trace.columns, **place})
        return made.select(order)

    def _pauses(self, trace: Trace, follows: np.ndarray, since: np.ndarray) -> np.ndarray:
        """ms between the end of the answer that a request follows and the request; of one that
        follows none, since its session began."""
        if self.think != "recorded":
            return np.where(follows >= 0, 1e3 * self.think, since)
        gap = trace.arrival_ms - trace.arrival_ms[follows]
        known = trace.columns.get("think_ms", np.full(len(trace), np.nan))
        own = ~np.isnan(known) & (self.loop == "closed")
        return np.where(follows < 0, since, np.where(own, known, gap))

    def _since_start(self, follows, pause, since) -> np.ndarray:
        """ms of each request since its session began, answers taking no time."""
        if self.loop == "open" and self.think == "recorded":
            return since
        after = pause.copy()
        for at, before in enumerate(follows.tolist()):
            if before >= 0:
                after[at] += after[before]
        return after

    def _begins(self, trace, root, after) -> np.ndarray:
        """ms at which the session of each request begins."""
        names, at, of = np.unique(root, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(at))  # sessions in the order of the trace
        begins = np.zeros(len(names))
        if self.arrivals == "recorded":
            begins = trace.arrival_ms[at][np.argsort(rank)]
        elif self.arrivals == "poisson":
            gaps = np.random.default_rng(self.seed).exponential(1e3 / self.rate, len(names))
            begins = np.cumsum(gaps) - gaps[0]
        elif self.arrivals == "concurrency":
            lasts = np.zeros(len(names))
            np.maximum.at(lasts, rank[of], after)
            begins = _slots(lasts.tolist(), self.concurrency)
        return begins[rank[of]]


def _is_pause(think: object) -> bool:
    return isinstance(think, int | float) and think >= 0


def _since_first(trace: Trace, root: np.ndarray) -> np.ndarray:
    """ms of each request since the first one of its session, as recorded."""
    first = np.full(root.max(initial=-1) + 1, np.inf)
    np.minimum.at(first, root, trace.arrival_ms)
    return trace.arrival_ms - first[root]


def _slots(lasts: list[float], count: int) -> np.ndarray:
    """Begin of each session in ms where `count` run at a time, one after the other."""
    free = [0.0] * count
    heapify(free)
    begins = []
    for last in lasts:
        begins.append(free[0])
        heapreplace(free, begins[-1] + last)
    return np.array(begins)


def _sessions(trace: Trace) -> np.ndarray:
    """Session of each request; one without is its own."""
    if "session" not in trace.columns:
        remedy = f"trace {trace.name} does not say which requests are a session"
        raise BadInput("sessions", trace.name, remedy)
    session = trace.columns["session"]
    alone = np.flatnonzero(session < 0)
    session = session.copy()
    session[alone] = session.max(initial=-1) + 1 + np.arange(len(alone))
    return session


def predecessors(session: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Index of the request whose answer each request follows, -1 for the first of a session.

    Of the same session, else (a sub-agent's first) the last one so far of the session it is of.
    """
    follows, last = np.full(len(session), -1), {}
    for at, (own, above) in enumerate(zip(session.tolist(), root.tolist())):
        follows[at] = last.get(own, last.get(above, -1))
        last[own] = at
    return follows


def within_context(trace: Trace, tokens: int, how: str) -> Trace:
    """The trace as an engine takes it whose prompts may have so many tokens."""
    over = trace.input_tokens > tokens
    if how == "cut":
        if tokens % trace.block_size:
            remedy = f"must be whole blocks of {trace.block_size} tokens where prompts are cut"
            raise BadInput("sessions.context_tokens", tokens, remedy)
        kept = np.minimum(np.diff(trace.first), tokens // trace.block_size)
        ids = trace.ids[trace.depth < kept[trace.request_of]]
        first = np.concatenate([[0], np.cumsum(kept)])
        inputs = np.minimum(trace.input_tokens, tokens)
        return replace(trace, ids=ids, first=first, input_tokens=inputs)
    if how == "end":
        session = _sessions(trace)
        ended = np.full(session.max(initial=-1) + 1, len(trace))
        np.minimum.at(ended, session[over], np.flatnonzero(over))
        over = np.arange(len(trace)) >= ended[session]
    if over.all():
        remedy = f"no request of {trace.name} is left"
        raise BadInput("sessions.context_tokens", tokens, remedy)
    return trace.select(~over)


def with_shared_heads(trace: Trace, share: float) -> Trace:
    """Sessions begin with the same blocks as far as `share` of their tools and system prompt goes.

    Blocks that ids chain together get the same part of their heads shared: the least of theirs.
    """
    if "shared_tokens" not in trace.columns:
        remedy = f"trace {trace.name} does not say how long tools and system prompts are"
        raise BadInput("sessions.shared_heads", share, remedy)
    if not trace.accesses:
        return trace
    length = np.diff(trace.first)
    head = np.maximum(trace.columns["shared_tokens"], 0) * share // trace.block_size
    head = np.minimum(head.astype(np.int64), length)
    begins = trace.ids[np.minimum(trace.first[:-1], trace.accesses - 1)]
    _, tree = np.unique(np.where(length > 0, begins, -1), return_inverse=True)
    least = np.full(len(trace) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, tree, head)
    alike = trace.depth < least[tree][trace.request_of]
    scope = trace.columns.get("scope", np.zeros(len(trace), dtype=np.int64))
    session = trace.columns.get("session", scope)
    inner = trace.columns.get("root", session) != session  # sub-agents have prompts of their own
    kind = (2 * np.maximum(scope, 0) + inner)[trace.request_of]
    deepest = int(head.max(initial=0)) + 1
    fresh = int(trace.ids.max(initial=-1)) + 1 + kind * deepest + trace.depth
    return replace(trace, ids=np.where(alike, fresh, trace.ids))
