"""Requests one by one, or in flight together: they arrive, hold their blocks, and let go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

import numpy as np

from kvlab.core import BadInput
from kvlab.policy import Moment
from kvlab.sim.moments import Moments
from kvlab.sim.outcome import HIT, REFUSED, Outcome
from kvlab.sim.prompts import Flight, Prompts
from kvlab.sim.sizes import ModelShape
from kvlab.sim.trace import Trace


@dataclass(frozen=True)
class CostModel:
    """How long a request holds its blocks: prompt tokens that did not hit at one rate, then output
    tokens at another, both of one request. Requests do not slow each other down.

    The defaults are round numbers of an 8B model on one H100-class device; take measured ones from
    a run with `measured`.
    """

    prefill_tokens_per_second: float = 20_000.0
    decode_tokens_per_second: float = 50.0

    def __post_init__(self):
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            if not getattr(self, name) > 0:
                raise BadInput(f"service.{name}", getattr(self, name), "must be more than 0")

    @classmethod
    def measured(cls, run: str | Path) -> CostModel:
        """The mean rates that a run folder (or its measurements.jsonl) holds."""
        path = Path(run)
        path = path / "measurements.jsonl" if path.is_dir() else path
        names = ("prefill_tokens_per_second", "decode_tokens_per_second")
        found: dict[str, list[float]] = {name: [] for name in names}
        for row in map(json.loads, path.read_text().splitlines()):
            if row["name"] in found:
                found[row["name"]].append(row["value"])
        missing = [name for name in names if not found[name]]
        if missing:
            raise BadInput("service", path, f"the run has no measurement {' or '.join(missing)}")
        return cls(*(float(np.mean(found[name])) for name in names))

    def prefill_ms(self, tokens: int) -> float:
        return 1e3 * tokens / self.prefill_tokens_per_second

    def decode_ms(self, tokens: int) -> float:
        return 1e3 * tokens / self.decode_tokens_per_second


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
            flight = prompts.admit(contents, partial)
            if flight is None:
                log.refuse(contents)
                prompts.ledger.tick()
                continue
            prompts.compute(flight, publish=False)
            prompts.finish(flight)
            log.add(flight)
        return log.outcome(piece)

    def more(self) -> dict:
        return self.prompts.more()


@dataclass
class InFlight:
    """Arrival times and service times: blocks are found once the prompt is computed, and pinned
    until the output is. Output blocks are taken at the start and freed at the end. A request that
    finds too little unpinned room waits, and all behind it: a stall. One that can never fit is
    refused."""

    prompts: Prompts
    cost: CostModel
    now: float = 0.0
    waits_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    peak_in_flight: int = 0
    peak_pinned: int = 0
    _due: list[tuple] = field(default_factory=list)  # heap of (ms, order, flight or decode ms, ...)
    _order: int = 0
    _running: int = 0
    _moments: Moments = field(default_factory=Moments)

    def run(self, piece: Trace) -> Outcome:
        log = _Log()
        ledger, size = self.prompts.ledger, piece.block_size
        arrivals, inputs = piece.arrival_ms.tolist(), piece.input_tokens.tolist()
        outputs = piece.output_tokens.tolist()
        for (contents, partial, at), moment in zip(_requests(piece), self._moments.of(piece)):
            if arrivals[at] < (arrivals[at - 1] if at else 0.0):
                raise BadInput("trace", piece.name, f"request {at} arrives before the one ahead")
            extra = -(-(inputs[at] + outputs[at]) // size) - len(contents)
            if len(set(contents)) + extra > ledger.capacity:
                log.refuse(contents)
                continue
            flight = self._start(contents, partial, extra, moment, log)
            log.add(flight)
            hit = min(sum(code >= HIT for code in flight.code) * size, inputs[at] - 1)
            self._serve(flight, arrivals[at], inputs[at] - hit, outputs[at])
        return log.outcome(piece)

    def _start(self, contents, partial, extra, moment: Moment, log: _Log) -> Flight:
        self.now = max(self.now, moment.ms)
        while self._due and self._due[0][0] <= self.now:
            self._next()
        log.expired(self.prompts.hear(moment._replace(ms=self.now)))
        while (flight := self.prompts.admit(contents, partial, extra)) is None:
            self._next()
        return flight

    def _serve(self, flight: Flight, arrival: float, compute: int, output: int) -> None:
        """Enter the end of the prefill, and keep the books of waiting and room."""
        first_token = self.now + self.cost.prefill_ms(compute)
        self._push(first_token, flight, self.cost.decode_ms(output))
        self.waits_ms.append(self.now - arrival)
        self.first_token_ms.append(first_token - arrival)
        ledger = self.prompts.ledger
        self._running += 1
        self.peak_in_flight = max(self.peak_in_flight, self._running)
        self.peak_pinned = max(self.peak_pinned, ledger.held_count - ledger.evictable_count)

    def _push(self, at: float, flight: Flight, decode_ms: float | None) -> None:
        self._order += 1
        heappush(self._due, (at, self._order, flight, decode_ms))

    def _next(self) -> None:
        """The next prompt is computed (its decode follows) or the next output is done."""
        at, _, flight, decode_ms = heappop(self._due)
        self.now = max(self.now, at)
        if decode_ms is None:
            self.prompts.finish(flight)
            self._running -= 1
        else:
            self.prompts.compute(flight)
            self._push(at + decode_ms, flight, None)

    def more(self) -> dict:
        """Let the last requests finish, then report."""
        while self._due:
            self._next()
        waits = np.array(self.waits_ms or [0.0])
        service = {
            "stalled_requests": int(np.count_nonzero(waits)),
            "stall_mean_ms": float(waits.mean()),
            "stall_max_ms": float(waits.max()),
            "ttft_ms": float(np.mean(self.first_token_ms or [0.0])),
            "peak_in_flight_requests": self.peak_in_flight,
            "peak_pinned_blocks": self.peak_pinned,
        }
        return self.prompts.more() | {"service": service}


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

    def outcome(self, piece: Trace) -> Outcome:
        evicted, at = (np.array(x, dtype=np.int64) for x in (self.evicted, self.evicted_at))
        return Outcome(np.array(self.code, dtype=np.uint8), evicted, at)
