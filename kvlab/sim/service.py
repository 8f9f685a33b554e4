"""Requests one by one, or in flight together: they arrive, hold their blocks, and let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from kvlab.policy import Moment
from kvlab.sim.arrivals import arrivals_of
from kvlab.sim.costs import CostModel
from kvlab.sim.moments import Moments
from kvlab.sim.outcome import DEEP_HIT, HIT, HOST_HIT, REFUSED, Outcome
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


class Served(NamedTuple):
    """A request in service: its flight, its index in the piece, its tokens, when it got room."""

    flight: Flight
    at: int
    prompt: int
    output: int
    began: float


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
    _due: list[tuple] = field(default_factory=list)  # heap of (ms, order, served, decode ms)
    _order: int = 0
    _running: int = 0
    _moments: Moments = field(default_factory=Moments)

    def __post_init__(self):
        self.books = Books(self.cost)

    def run(self, piece: Trace) -> Outcome:
        log, self.arrivals = _Log(), arrivals_of(piece, self.sessions)
        requests, moments = list(piece.requests()), list(self._moments.of(piece))
        partial, ran = piece.partial.tolist(), []
        while (coming := self._coming()) is not None:
            ms, at = coming
            ran.append(coming)
            moment = moments[at]._replace(ms=max(self.now, ms), number=self._order)
            self._order += 1
            self._request(log, piece, requests[at], partial[at], at, moment, ms)
        return log.outcome(self.arrivals.as_ran(piece, ran))

    def _coming(self) -> tuple[float, int] | None:
        """(ms, index) of the next request, after everything that happens before it."""
        arrivals = self.arrivals
        while True:
            ms = arrivals.next_ms()
            if ms is None and not arrivals.left:
                return None
            if self._due and (ms is None or self._due[0][0] <= max(self.now, ms)):
                self._next()
            else:
                return arrivals.pop()

    def _request(self, log, piece, contents, partial, at, moment: Moment, arrival: float) -> None:
        prompt, output = int(piece.input_tokens[at]), int(piece.output_tokens[at])
        extra = -(-(prompt + output) // piece.block_size) - len(contents)
        self.now = moment.ms
        if len(set(contents)) + extra > self.prompts.ledger.capacity:
            log.refuse(contents)
            self.arrivals.done(at, self.now)
            return
        flight = self._start(contents, partial, extra, moment, log)
        log.add(flight)
        hit = min(sum(code >= HIT for code in flight.code) * piece.block_size, prompt - 1)
        self._serve(Served(flight, at, prompt, output, self.now), arrival, hit)

    def _start(self, contents, partial, extra, moment: Moment, log: _Log) -> Flight:
        limit = self.cost.running
        while limit is not None and self._running >= limit:
            self._next()
        log.expired(self.prompts.hear(moment._replace(ms=self.now)))
        while (flight := self.prompts.admit(contents, partial, extra)) is None:
            self._next()
        return flight

    def _serve(self, served: Served, arrival: float, hit: int) -> None:
        """Enter the end of the prefill, and keep the books of waiting and room."""
        code, ledger = served.flight.code, self.prompts.ledger
        self._running += 1
        copy_ms = self.link.ms(code.count(HOST_HIT), code.count(DEEP_HIT))
        compute_ms = self.cost.prefill_ms(served.prompt - hit, hit)
        first_token = self.books.prefill(self.now, arrival, copy_ms, compute_ms)
        decode_ms = self.cost.decode_ms(served.output, served.prompt, self._running)
        self._push(first_token, served, decode_ms)
        self.peak_in_flight = max(self.peak_in_flight, self._running)
        self.peak_pinned = max(self.peak_pinned, ledger.held_count - ledger.evictable_count)

    def _push(self, at: float, served: Served, decode_ms: float | None) -> None:
        self._order += 1
        heappush(self._due, (at, self._order, served, decode_ms))

    def _next(self) -> None:
        """The next prompt is computed (its decode follows) or the next output is done."""
        ms, _, served, decode_ms = heappop(self._due)
        self.now = max(self.now, ms)
        if decode_ms is None:
            self.prompts.finish(served.flight)
            self._running -= 1
            self.books.served(served.prompt, served.output, served.began, ms)
            self.arrivals.done(served.at, ms)
        else:
            self.prompts.compute(served.flight)
            self._push(ms + decode_ms, served, None)

    def more(self) -> dict:
        """Let the last requests finish, then report."""
        while self._due:
            self._next()
        peaks = {
            "peak_in_flight_requests": self.peak_in_flight,
            "peak_pinned_blocks": self.peak_pinned,
        }
        return self.prompts.more() | {"service": self.books.summary() | peaks}


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
