"""What a hit rate is a rate of: the choices in which published simulators differ.

A trace is changed before it is replayed, so that every way to replay it (objects, compiled, curves)
follows the same definitions. docs/TRACES.md says who uses which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from kvlab.core import BadInput
from kvlab.kinds import members
from kvlab.sim.trace import Trace

_CHOICES = {
    "partial_blocks": ("hit", "miss", "drop"),
    "outputs": ("dropped", "kept"),
    "first_requests": ("counted", "skipped"),
    "common_head": ("counted", "skipped"),
}


@members("definitions")
@dataclass(frozen=True)
class Definitions:
    """What counts. The rates themselves (by block, by token, by request) are always all given.

    partial_blocks: a partial last block may "hit", takes its place and counts but must "miss", or
    is not there: "drop" (engines that hash whole blocks only).
    measured: the part of the requests that rates are of, as two shares of their number; what comes
    before warms the cache up.
    outputs: "kept" leaves the blocks that an answer fills in the cache, where the next request of
    its session may find them; they count in no rate. Needs sessions and whole blocks.
    first_requests: "skipped" leaves the first request of each session out of the rates.
    common_head: "skipped" leaves out the blocks that all requests begin with, which hit in any
    cache and add the same points at each capacity.
    """

    partial_blocks: str = "hit"
    measured: Sequence[float] = (0.0, 1.0)
    outputs: str = "dropped"
    first_requests: str = "counted"
    common_head: str = "counted"

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                quoted = " or ".join(repr(choice) for choice in known)
                raise BadInput(name, getattr(self, name), f"must be {quoted}")
        shares = tuple(map(float, self.measured))
        if len(shares) != 2 or not 0 <= shares[0] < shares[1] <= 1:
            remedy = "must be two shares of the requests, as [0.5, 1] for the second half"
            raise BadInput("measured", list(self.measured), remedy)
        object.__setattr__(self, "measured", shares)

    @property
    def replayed(self) -> str:
        """`partial_blocks` of `simulate`, once `apply` has done its part."""
        return "miss" if self.partial_blocks == "miss" else "hit"

    @property
    def counts_all(self) -> bool:
        choices = self.first_requests, self.common_head
        return self.measured == (0.0, 1.0) and choices == ("counted", "counted")

    def params(self) -> dict:
        """All of them, for the parameters of a row."""
        return asdict(self) | {"measured": list(self.measured)}

    def apply(self, trace: Trace) -> Trace:
        """The trace by these definitions."""
        if self.partial_blocks == "drop":
            trace = without_partial_blocks(trace)
        if self.outputs == "kept":
            trace = with_outputs(trace)
        if self.counts_all:
            return trace
        counted = np.zeros(len(trace), dtype=bool)
        begin, end = (round(share * len(trace)) for share in self.measured)
        counted[begin:end] = True
        if self.first_requests == "skipped":
            counted &= ~first_of_session(trace)
        if not counted.any():
            raise BadInput("measured", list(self.measured), f"no request of {trace.name} is left")
        columns = {**trace.columns, "counted": counted}
        if self.common_head == "skipped":
            columns["skipped_blocks"] = np.full(len(trace), common_head(trace))
        return replace(trace, columns=columns)


def without_partial_blocks(trace: Trace) -> Trace:
    """The trace with ids of whole blocks only."""
    length = np.diff(trace.first)
    last = trace.depth == length[trace.request_of] - 1
    kept = ~(last & trace.partial[trace.request_of])
    first = np.concatenate([[0], np.cumsum(length - trace.partial)])
    return replace(trace, ids=trace.ids[kept], first=first, whole_blocks=True)


def common_head(trace: Trace) -> int:
    """How many blocks all requests begin with."""
    if len(trace) < 2:
        return 0
    first, shortest = trace.first[:-1], int(np.diff(trace.first).min())
    alike = (len(np.unique(trace.ids[first + depth])) == 1 for depth in range(shortest))
    return next((depth for depth, same in enumerate(alike) if not same), shortest)


def first_of_session(trace: Trace) -> np.ndarray:
    """Mask [R] of the requests that begin a session; one without a session is its own."""
    session = _sessions(trace, "first_requests", "skipped")
    first = session < 0
    first[np.unique(session, return_index=True)[1]] = True
    return first


def with_outputs(trace: Trace) -> Trace:
    """Each request followed by the blocks that its answer fills.

    They are those of the session's next prompt where that goes on from all of prompt and answer;
    else (the last of its session, thinking taken out, another way taken) nobody asks for them.
    """
    if not trace.whole_blocks:
        remedy = "needs whole blocks, which an answer fills up; add partial_blocks=drop"
        raise BadInput("outputs", "kept", remedy)
    session = _sessions(trace, "outputs", "kept")
    following = _next_of_session(session)
    requests = list(trace.requests())
    fresh, rows = int(trace.ids.max(initial=-1)) + 1, []
    full = (trace.input_tokens + trace.output_tokens).tolist()
    inputs = trace.input_tokens.tolist()
    for at, ids in enumerate(requests):
        want, after = full[at] // trace.block_size, following[at]
        goes_on = after >= 0 and inputs[after] >= full[at] and requests[after][: len(ids)] == ids
        made = requests[after][len(ids) : want] if goes_on else []
        if not goes_on:
            made = list(range(fresh, fresh + want - len(ids)))
            fresh += len(made)
        rows.append(ids + made)
    prompt = np.diff(trace.first)
    first = np.concatenate([[0], np.cumsum(list(map(len, rows)))]).astype(np.int64)
    flat = np.fromiter((i for row in rows for i in row), dtype=np.int64, count=first[-1])
    columns = {**trace.columns, "prompt_blocks": prompt}
    return replace(trace, ids=flat, first=first, columns=columns)


def _next_of_session(session: np.ndarray) -> list[int]:
    """Index of the next request of the same session, -1 where there is none."""
    following, last = [-1] * len(session), {}
    for at, name in enumerate(session.tolist()):
        if name >= 0 and name in last:
            following[last[name]] = at
        last[name] = at
    return following


def _sessions(trace: Trace, key: str, value: str) -> np.ndarray:
    if "session" not in trace.columns:
        raise BadInput(key, value, f"trace {trace.name} does not say which requests are a session")
    return trace.columns["session"]
