"""The adaptive chooser on arrays: shadows see requests only, so that they run ahead of the cache.

Each shadow is a replay of the followed contents under one member; of its misses comes who leads
when, and the cache runs under one member's loop from one change of leader to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvlab.core import BadInput
from kvlab.policy import SHIFT, SPREAD, Adaptive, share_of, thinned
from kvlab.sim.compiled import catalog
from kvlab.sim.compiled.bind import cached
from kvlab.sim.compiled.moments import Said, heard_since
from kvlab.sim.compiled.runner import Requests, Runner
from kvlab.sim.compiled.state import FREE, FRESH, HELD, MARKS, NOW, WHERE, with_contents
from kvlab.sim.outcome import HIT, REFUSED
from kvlab.sim.trace import Trace

CARRIED = [HELD, FRESH, FREE, NOW]  # of the books of a cache, whoever leads


class Notes(NamedTuple):
    """What a new leader is told, by content: touches of a block since it came, -1 where there is
    none, the step of the last; and where the running request first names it. int64 [C]."""

    hits: np.ndarray
    last: np.ndarray
    named: np.ndarray

    def longer(self, count: int) -> Notes:
        more = np.full(max(0, count - len(self.hits)), -1)
        return Notes(*(np.concatenate([old, more]) for old in self))


class Chooser(Runner):
    """The cache is this `Runner`, and so is each shadow. members: what is made of each member."""

    def __init__(self, policy: Adaptive, members, capacity, tiers, partial_misses, cost, whole):
        super().__init__(members[0], capacity, tiers, True, partial_misses, cost, whole)
        self.members, self.capacity = members, capacity
        self.share = share_of(capacity, policy.floor)
        room = max(1, capacity // self.share)
        thin = [m._replace(policy=thinned(m.policy, self.share)) for m in members]
        self.shadows = [Runner(m, room, (), True, False, cost, False) for m in thin]
        self.rules = policy.patience * capacity, policy.memory * capacity
        self.misses = np.zeros(len(members))
        self.books = np.zeros(2, dtype=np.int64)  # who leads, accesses since misses were halved
        self.leader, self.step = 0, 0
        self.notes = Notes(*np.full((3, 0), -1))
        self.depth = np.zeros(0, dtype=np.int32)  # of followed contents by number; -1: not yet seen
        asks = policy.asks or any(made.policy.asks for made in self.made)
        self.said = Said() if asks else None
        self.served = self.since = 0  # requests, and those before the present leader

    def replay(self, piece: Trace, numbers: np.ndarray, ids: np.ndarray):
        whole = self.requests_of(piece, numbers)
        out = self.room_for(piece.accesses)
        left = begin = told = 0
        for end, leader in self._leads(whole, ids):
            mine = whole.part(begin, end)
            if self.said:  # a leader that begins afresh has heard of no request before
                mine = mine._replace(moments=heard_since(mine.moments, self.since))
            left += self.serve(mine, len(ids), out, left)
            if end < len(piece) or not self.whole:  # else nothing comes that a leader could lead
                self._note(whole.part(told, end), out, left, len(ids))
                told = end
                if leader != self.leader:
                    self._follow(leader)
                    self.since = self.served + end
            begin = end
        self.served += len(piece)
        return out.code, out.gone[:left], out.gone_at[:left]

    def _leads(self, requests: Requests, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """(first request that is not under the present leader, who leads then), to the end."""
        sample, lengths = self._followed(requests, ids)
        missed = np.empty((len(self.members), len(lengths)), dtype=np.int64)
        for shadow, row in zip(self.shadows, missed):
            out = shadow.room_for(len(sample.numbers))
            shadow.serve(sample, len(ids), out, 0)
            _count(out.code, sample.first, row)
        leads = np.empty(len(lengths), dtype=np.int64)
        _decide(missed, lengths, self.misses, self.books, *self.rules, self.share, leads)
        before = np.concatenate([[self.leader], leads[:-1]]) if len(leads) else leads
        for at in np.flatnonzero(leads != before).tolist():
            yield at + 1, int(leads[at])
        yield len(lengths), int(leads[-1]) if len(leads) else self.leader

    def _followed(self, requests: Requests, ids: np.ndarray) -> tuple[Requests, np.ndarray]:
        """The followed contents of each request, each once, and how many there are in all."""
        spread = (ids.astype(np.uint64) * np.uint64(SPREAD)) >> np.uint64(SHIFT)
        mine = (spread & np.uint64(self.share - 1)) == 0
        count, accesses = len(requests.first) - 1, len(requests.numbers)
        numbers, depths = np.empty(accesses, np.int32), np.empty(accesses, np.int32)
        first, lengths = np.zeros((2, count + 1), dtype=np.int64)
        seen = np.full((2, len(ids)), -1)
        more = np.full(max(0, len(ids) - len(self.depth)), -1, dtype=np.int32)
        self.depth = np.concatenate([self.depth, more])
        moved = _follow(
            requests.numbers, requests.first, mine, self.capacity, *seen, numbers, depths, first,
            lengths, self.depth,
        )  # fmt: skip
        if moved:
            remedy = f"has the adaptive chooser where ids keep their depth; {ids[moved]} does not"
            raise BadInput("compiled", True, remedy)
        stop, none = int(first[-1]), np.zeros(count, dtype=bool)
        sample = Requests(numbers[:stop], first, none, requests.moments, depths[:stop])
        return sample, lengths[:count]

    def _note(self, requests: Requests, out, left: int, count: int) -> None:
        self.notes = self.notes.longer(count)
        begin, end = int(requests.first[0]), int(requests.first[-1])
        low, high = np.searchsorted(out.gone_at[:left], [begin, max(end, begin + 1)])
        self.step = _note(
            requests.numbers, requests.first, out.code, out.gone[low:high],
            out.gone_at[low:high], *self.notes, self.step,
        )  # fmt: skip

    def _follow(self, leader: int) -> None:
        """The leader begins afresh, and is told of all blocks."""
        self.leader, made, old = leader, self.members[leader], self.tiers[0]
        new = with_contents(made.state(self.capacity), len(old.content))._replace(costs=old.costs)
        new.meta[:], new.free[:], new.book[CARRIED] = old.meta, old.free, old.book[CARRIED]
        new.meta[:, MARKS], new.content[:, WHERE] = 0, old.content[:, WHERE]
        self.tiers[0], self.made[0], self.draws[0] = new, made, made.draws()
        self.loop = catalog.requests(made.verbs, *self.behind)
        contents = np.flatnonzero(old.content[:, WHERE])
        last = self.notes.last[contents]
        order = np.argsort(last)
        contents, last = contents[order], last[order]
        blocks = old.content[contents, WHERE].astype(np.int32)
        catalog.refill(made.verbs)(new, blocks, self.notes.hits[contents], last)


@cached
def _follow(numbers, first, mine, capacity, stamp, slot, out, depths, out_first, lengths, depth):
    """Write the followed contents, where in their requests they are named last, and how many
    different ones each request has; none of a request that is too large. Returns a content whose
    depth is not that of an earlier request: its shadow would need what the cache knew; or 0."""
    end = moved = 0
    for request in range(len(first) - 1):
        begin, unique = end, 0
        for access in range(first[request], first[request + 1]):
            content = numbers[access]
            if stamp[content] != request:
                stamp[content] = request
                unique += 1
                if mine[content]:
                    slot[content], out[end] = end, content
                    end += 1
            if mine[content]:
                depths[slot[content]] = access - first[request]
        if unique > capacity:
            end, unique = begin, 0
        for at in range(begin, end):
            if depth[out[at]] < 0:
                depth[out[at]] = depths[at]
            elif depth[out[at]] != depths[at]:
                moved = out[at]
        lengths[request], out_first[request + 1] = unique, end
    return moved


@cached
def _count(code, first, missed):
    for request in range(len(first) - 1):
        misses = 0
        for access in range(first[request], first[request + 1]):
            misses += code[access] < HIT
        missed[request] = misses


@cached
def _decide(missed, lengths, misses, books, patience, memory, share, leads):
    """`policy.adaptive.Choice` for all requests."""
    for request in range(len(lengths)):
        books[1] += lengths[request]
        best = 0
        for member in range(len(misses)):
            misses[member] += missed[member, request]
            if misses[member] < misses[best]:
                best = member
        if (misses[books[0]] - misses[best]) * share > patience:
            books[0] = best
        if books[1] >= memory:
            books[1] = 0
            for member in range(len(misses)):
                misses[member] /= 2
        leads[request] = books[0]


@cached
def _note(numbers, first, code, gone, gone_at, hits, last, named, step):
    """Hear of requests that ran, `Notes`; the step behind them."""
    left = 0
    for request in range(len(first) - 1):
        begin, end = first[request], first[request + 1]
        while left < len(gone) and gone_at[left] <= begin:
            hits[gone[left]] = -1
            left += 1
        if begin < end and code[begin] == REFUSED:
            step += 1
            continue
        for access in range(end - 1, begin - 1, -1):
            named[numbers[access]] = access
        for access in range(end - 1, begin - 1, -1):
            if named[numbers[access]] == access:
                step += 1
                hits[numbers[access]] += 1
                last[numbers[access]] = step
        step += 1
    return step
