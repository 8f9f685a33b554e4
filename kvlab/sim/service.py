"""Requests one by one, or in flight together: they arrive, hold their blocks, and let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvlab.policy import Moment
from kvlab.sim.arrivals import arrivals_of, refuse_unsorted
from kvlab.sim.costs import CostModel
from kvlab.sim.moments import Moments
from kvlab.sim.outcome import DEEP_HIT, HIT, HOST_HIT, REFUSED, Outcome
from kvlab.sim.pace import Work, pace_of
from kvlab.sim.prompts import Flight, Prompts
from kvlab.sim.queueing import Books, Link
from kvlab.sim.sessions import Sessions
from kvlab.sim.sizes import ModelShape
from kvlab.sim.trace import Trace


def recompute_cost(shape: ModelShape, block_size: int) -> Callable[[int], float]:
    """depth -> prefill FLOPs of a whole block there, in tokens' worth of the first block."""
    first = float(shape.prefill_flops(block_size))
    second = float(shape.prefill_flops(2 * block_size)) - first
    start, step = float(block_size), block_size * (second / first - 1)
    return lambda depth: start + step * depth


class OneByOne:
    """Accounting without service times: a request is over before the next one comes."""

    def __init__(self, prompts: Prompts):
        self.prompts, self.moments = prompts, Moments()

    def run(self, piece: Trace) -> Outcome:
        prompts, log = self.prompts, _Log()
        for (contents, partial, _), moment in zip(_requests(piece), self.moments.of(piece)):
            log.expired(prompts.hear(moment))
            flight = prompts.serve(contents, partial)
            if flight is None:
                log.refuse(contents)
                prompts.ledger.tick()
            else:
                log.add(flight)
        return log.outcome()

    def more(self) -> dict:
        return self.prompts.more()


class Of(NamedTuple):
    """What a request in service is: its flight, and its index in the piece."""

    flight: Flight
    at: int


@dataclass
class InFlight:
    """Arrival times and service times: blocks are found once the prompt is computed, and pinned
    until the output is. Output blocks are taken at the start and freed at the end. A request that
    finds too little unpinned room waits, and all behind it: a stall. One that can never fit is
    refused. sessions: in their closed loop a request comes after the answer that it follows."""

    prompts: Prompts
    cost: CostModel
    link: Link
    sessions: Sessions | None = None
    now: float = 0.0
    peak_in_flight: int = 0
    peak_pinned: int = 0
    _number: int = 0
    _running: int = 0
    _moments: Moments = field(default_factory=Moments)

    def __post_init__(self):
        self.books, self.pace = Books(self.cost), pace_of(self.cost)

    def run(self, piece: Trace) -> Outcome:
        log, self.arrivals = _Log(), arrivals_of(piece, self.sessions)
        requests, moments = list(piece.requests()), list(self._moments.of(piece))
        partial, ran = piece.partial.tolist(), []
        while (coming := self._coming()) is not None:
            ms, at = coming
            ran.append(coming)
            self.now = max(self.now, ms)
            moment = moments[at]._replace(ms=self.now, number=self._number)
            self._number += 1
            self._request(log, piece, requests[at], partial[at], at, moment, ms)
        return log.outcome(self.arrivals.as_ran(piece, ran))

    def _coming(self) -> tuple[float, int] | None:
        """(ms, index) of the next request, after everything that happens before it."""
        arrivals = self.arrivals
        while True:
            ms = arrivals.next_ms()
            if ms is None and not arrivals.left:
                return None
            if not self._happens(None if ms is None else max(self.now, ms)):
                self.now = max(self.now, self.pace.now)  # a step that began before it came
                return arrivals.pop()

    def _request(self, log, piece, contents, partial, at, moment: Moment, arrival: float) -> None:
        prompt, output = int(piece.input_tokens[at]), int(piece.output_tokens[at])
        extra = -(-(prompt + output) // piece.block_size) - len(contents)
        if len(set(contents)) + extra > self.prompts.ledger.capacity:
            log.refuse(contents)
            self.arrivals.done(at, self.now)
            return
        flight = self._start(contents, partial, extra, moment, log)
        log.add(flight)
        hit = min(sum(code >= HIT for code in flight.code) * piece.block_size, prompt - 1)
        copy_ms = self.link.ms(flight.code.count(HOST_HIT), flight.code.count(DEEP_HIT))
        tokens = prompt - hit, hit, prompt, output
        self.pace.enter(Work(*tokens, arrival, self.now, copy_ms, Of(flight, at)))
        self._running += 1
        ledger = self.prompts.ledger
        self.peak_in_flight = max(self.peak_in_flight, self._running)
        self.peak_pinned = max(self.peak_pinned, ledger.held_count - ledger.evictable_count)

    def _start(self, contents, partial, extra, moment: Moment, log: _Log) -> Flight:
        limit = self.cost.running
        while limit is not None and self._running >= limit:
            self._happens(None)
        log.expired(self.prompts.hear(moment._replace(ms=self.now)))
        while (flight := self.prompts.admit(contents, partial, extra)) is None:
            self._happens(None)
        return flight

    def _happens(self, until: float | None) -> bool:
        """The next prompt is computed or the next answer done, if not later than `until`."""
        event = self.pace.next(until)
        if event is None:
            return False
        self.now = max(self.now, event.ms)
        self.books.hear(event)
        flight, at = event.work.of
        if event.done:
            self.prompts.finish(flight)
            self._running -= 1
            self.arrivals.done(at, event.ms)
        else:
            self.prompts.compute(flight)
        return True

    def more(self) -> dict:
        """Let the last requests finish, then report."""
        while self._happens(None):
            pass
        peaks = {
            "peak_in_flight_requests": self.peak_in_flight,
            "peak_pinned_blocks": self.peak_pinned,
        }
        return self.prompts.more() | {"service": self.books.summary() | peaks}


class OnlyTimes:
    """Times of requests whose hits are known from a replay one by one: nothing is held meanwhile,
    so that what would not fit beside those in flight does not wait."""

    def __init__(self, cost: CostModel, link: Link):
        self.cost, self.link = cost, link
        self.books, self.pace = Books(cost), pace_of(cost)
        self.now, self._running, self._most = 0.0, 0, 0

    def run(self, piece: Trace, outcome: Outcome) -> None:
        refuse_unsorted(piece)
        code, begin = outcome.code, piece.first[:-1]
        served = np.diff(piece.first) == 0
        served[~served] = code[begin[~served]] != REFUSED
        of, count = piece.request_of, len(piece)
        sums = [np.bincount(of[mask], minlength=count).tolist()
                for mask in (code >= HIT, code == HOST_HIT, code == DEEP_HIT)]  # fmt: skip
        columns = piece.arrival_ms, piece.input_tokens, piece.output_tokens, served
        rows = zip(*(column.tolist() for column in columns), *sums)
        for arrival, prompt, output, fits, hits, host, deep in rows:
            while self._happens(max(self.now, arrival)):
                pass
            self.now = max(self.now, arrival, self.pace.now)
            while self.cost.running is not None and self._running >= self.cost.running:
                self._happens(None)
            if fits:
                hit = min(hits * piece.block_size, prompt - 1)
                tokens = prompt - hit, hit, prompt, output
                copy_ms = self.link.ms(host, deep)
                self.pace.enter(Work(*tokens, arrival, self.now, copy_ms, None))
                self._running += 1
                self._most = max(self._most, self._running)

    def _happens(self, until: float | None) -> bool:
        event = self.pace.next(until)
        if event is None:
            return False
        self.now = max(self.now, event.ms)
        self.books.hear(event)
        self._running -= event.done
        return True

    def summary(self) -> dict:
        while self._happens(None):
            pass
        return self.books.summary() | {"peak_in_flight_requests": self._most}


def _requests(piece: Trace) -> Iterator[tuple[list[int], bool, int]]:
    """(block ids, whether the last block is partial, index) of each request."""
    return zip(piece.requests(), piece.partial.tolist(), range(len(piece)))


class _Log:
    """Outcomes of requests, gathered into the arrays of a piece."""

    def __init__(self):
        self.code: list[int] = []
        self.evicted: list[int] = []
        self.evicted_at: list[int] = []

    def add(self, flight: Flight) -> None:
        self.evicted += flight.evicted
        self.evicted_at += [len(self.code)] * len(flight.evicted)
        self.code += flight.code

    def expired(self, contents: list[int]) -> None:
        self.evicted += contents
        self.evicted_at += [len(self.code)] * len(contents)

    def refuse(self, contents: list[int]) -> None:
        self.code += [REFUSED] * len(contents)

    def outcome(self, ran: Trace | None = None) -> Outcome:
        evicted, at = (np.array(x, dtype=np.int64) for x in (self.evicted, self.evicted_at))
        return Outcome(np.array(self.code, dtype=np.uint8), evicted, at, ran)
