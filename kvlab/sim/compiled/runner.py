"""Runs pieces of a trace through the compiled loops; state stays between them."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from kvlab.policy import Learned
from kvlab.sim.compiled import belady, catalog, odds
from kvlab.sim.compiled.moments import SILENCE, Said
from kvlab.sim.compiled.numbering import Numbering
from kvlab.sim.compiled.state import (
    CAPACITY,
    DROPPED,
    HELD,
    MINE,
    WRITTEN,
    new_state,
    stacked,
    with_contents,
)  # fmt: skip
from kvlab.sim.outcome import Outcome
from kvlab.sim.trace import Trace

NO_DEPTHS = np.zeros(0, dtype=np.int32)
_numbered: WeakKeyDictionary[Trace, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()


def numbered(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """The contents of a whole trace by number, int32 [A], and the ids by number; made once."""
    if trace not in _numbered:
        numbering = Numbering()
        numbers = numbering.number(trace.ids)
        _numbered[trace] = numbers, numbering.ids[: numbering.count]
    return _numbered[trace]


class Requests(NamedTuple):
    """What a loop is given: numbers int32 [A]; first int64 [R + 1]; partial bool [R], whose last
    block must not hit; moments [R, 6] and depths int32 [A], or none of them."""

    numbers: np.ndarray
    first: np.ndarray
    partial: np.ndarray
    moments: np.ndarray
    depths: np.ndarray

    def part(self, begin: int, end: int) -> Requests:
        """Those from `begin` to before `end`; accesses keep their places."""
        return self._replace(
            first=self.first[begin : end + 1], partial=self.partial[begin:end],
            moments=self.moments[begin:end],
        )  # fmt: skip


class Out(NamedTuple):
    """What it writes: code uint8 [A]; gone int32, contents that left, and gone_at int64, when."""

    code: np.ndarray
    gone: np.ndarray
    gone_at: np.ndarray


class Runner:
    """One policy at one capacity, tiers behind it (policy, capacity, mode): none, one or two.

    last: contents by number of the latest piece, and those that left; contents: how many there are.
    cost: of computing a block, by depth. whole: the only piece is a loaded trace, whose numbers are
    kept for the next run.
    """

    def __init__(self, device, capacity, tiers, prefix, partial_misses, cost, whole):
        self.prefix, self.partial_misses, self.whole = prefix, partial_misses, whole
        self.cost, self.numbering = cost, Numbering()
        self.made = [device, *(made for made, _, _ in tiers)]
        rooms = [capacity, *(room for _, room, _ in tiers)]
        self.tiers = [made.state(room) for made, room in zip(self.made, rooms)]
        self.draws = [made.draws() for made in self.made]
        self.said = Said() if any(made.policy.asks for made in self.made) else None
        self.behind = [(made.verbs, mode) for made, _, mode in tiers]
        if prefix:
            self.loop = catalog.requests(device.verbs, *self.behind)
        else:
            self.loop = catalog.accesses(device.verbs)

    def run(self, piece: Trace) -> Outcome:
        if self.whole:
            numbers, ids = numbered(piece)
        else:
            numbers = self.numbering.number(piece.ids)
            ids = self.numbering.ids[: self.numbering.count]
        code, gone, gone_at = self.replay(piece, numbers, ids)
        self.last, self.contents = (numbers, gone), len(ids)
        return Outcome(code, ids[gone], gone_at)

    def replay(self, piece: Trace, numbers: np.ndarray, ids: np.ndarray):
        """Codes uint8 [A]; contents that left int32 [E], and when, int64 [E]."""
        out = self.room_for(piece.accesses)
        if self.prefix:
            left = self.serve(self.requests_of(piece, numbers), len(ids), out, 0)
        else:
            self._prepare(len(ids), piece.accesses, 1)
            left = self.loop(self.tiers[0], numbers, *out)
        return out.code, out.gone[:left], out.gone_at[:left]

    def room_for(self, accesses: int) -> Out:
        most = accesses + int(self.tiers[0].book[HELD])  # which may all expire
        kinds = (accesses, np.uint8), (most, np.int32), (most, np.int64)
        return Out(*(np.empty(size, dtype=kind) for size, kind in kinds))

    def requests_of(self, piece: Trace, numbers: np.ndarray) -> Requests:
        partial = self.partial_misses & piece.partial
        moments = self.said.of(piece) if self.said else SILENCE
        return Requests(numbers, piece.first, partial, moments, NO_DEPTHS)

    def serve(self, requests: Requests, contents: int, out: Out, left: int) -> int:
        """Run requests; how many blocks left, which are written behind the `left` that had."""
        longest = int(np.diff(requests.first).max(initial=0))
        deepest = int(requests.depths.max(initial=-1)) + 1
        accesses = int(requests.first[-1] - requests.first[0])
        self._prepare(contents, accesses, max(longest, deepest))
        room = [np.empty(longest, dtype=kind) for kind in (np.int32, np.int64, np.int32)]
        return self.loop(
            self.tiers[0], self._behind(), *requests, out.code, out.gone[left:],
            out.gone_at[left:], *room,
        )  # fmt: skip

    def _behind(self):
        """The state of the tiers behind, as the loop takes it."""
        if len(self.tiers) == 1:
            return new_state(1, 1)
        return self.tiers[1] if len(self.tiers) == 2 else stacked(*self.tiers[1:])

    def _prepare(self, contents: int, accesses: int, depths: int) -> None:
        """Room for contents, costs by depth, draws for as many victims as there can be."""
        for tier, draws in enumerate(self.draws):
            state = with_contents(self.tiers[tier], contents)
            if depths > len(state.costs):
                costs = np.array([self.cost(depth) for depth in range(depths)], dtype=float)
                state = state._replace(costs=costs)
            if draws is not None:
                rest = state.draws[state.book[MINE] :]
                more = draws.random(max(0, accesses - len(rest)))
                state = state._replace(draws=np.concatenate([rest, more]))
                state.book[MINE] = 0
            self.tiers[tier] = state

    def more(self) -> dict:
        """What left the last tier, and the traffic of each where there is one."""
        tiers, dropped = {}, 0
        for name, state in zip(("host", "third"), self.tiers[1:]):
            written, dropped = (int(state.book[at]) for at in (WRITTEN, DROPPED))
            tiers |= {f"{name}_written_blocks": written, f"{name}_dropped_blocks": dropped}
        return {"host_evictions": dropped} | ({"tiers": tiers} if tiers else {})

    def foresee(self, trace: Trace, keep: np.ndarray | None) -> None:
        """Tell the policy the future: a loaded trace, of each request the first `keep` [R]
        accesses; None: each access on its own."""
        numbers, ids = numbered(trace)
        state = self.tiers[0]
        if isinstance(self.made[0].policy, Learned):
            made = odds.fitted(numbers, trace.first, keep, len(ids), int(state.book[CAPACITY]))
            self.tiers[0] = state._replace(draws=made[0], notes=made[1])
            return
        if keep is None:
            time, depth = np.arange(trace.accesses), np.zeros(trace.accesses, dtype=np.int64)
            counts = np.ones(trace.accesses, dtype=bool)
        else:
            time, depth = trace.request_of, trace.depth
            counts = depth < keep[time]
        end = int(time[-1]) + 1 if len(time) else 0
        found, following = np.empty(len(numbers), dtype=np.int64), np.full(len(ids), end)
        belady.buckets(numbers, time, depth, counts, following, end, found)
        self.tiers[0] = belady.foresee(state, found)
