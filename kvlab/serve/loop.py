"""Many sequences over one cache: admit, prefill in chunks, decode as a ragged batch, preempt.

The host runs ahead: it launches a step before it has seen the tokens of the one before.

A workload driver for measurements, not a server: it takes a list of requests and returns what
became of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from kvlab.core import KvlabError, OutOfBlocks
from kvlab.model import Driver, LoadedModel, PagedCache, vocabulary
from kvlab.serve.clock import WallClock
from kvlab.serve.engine import engine
from kvlab.serve.job import Job, Limits, Served
from kvlab.serve.requests import Request, check_requests

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)


class Loop:
    """Runs requests through `cache`, several at a time.

    clock: `WallClock()`, or `StepClock(ms)` for runs that repeat exactly.
    driver: how steps run, see `engine`; `why_eager` says why they are not captured.
    note: called with (event, request number) at "admit", "first", "preempt" and "end".

    Each step: take in who has arrived, let go who has left, admit while there is room, compute
    one chunk of prompts where it is time for one (`Limits.decode_steps`), then one token of every
    sequence whose prompt is computed, then look at the tokens of the step before. When
    blocks or memory run out, the sequence admitted last gives its blocks back and waits to be
    resumed; nobody is admitted again until another sequence has ended.
    """

    def __init__(
        self, loaded: LoadedModel, cache: PagedCache, limits: Limits | None = None, clock=None,
        note: Callable[[str, int], None] = lambda event, number: None, driver: Driver = "auto",
    ):
        self.cache, self.note = cache, note
        self.limits = limits or Limits()
        self.known = vocabulary(loaded.model)
        self.engine = engine(loaded, cache, self.limits.running, driver)
        self.clock = clock or WallClock()
        self.coming: deque[Request] = deque()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.served: list[Served] = []
        self.crowded = False  # somebody was preempted and nobody has ended since
        self.most_running = 0
        self.flights: deque[tuple] = deque()  # step, jobs, tokens on their way
        self.steps, self.since_chunk = 0, self.limits.decode_steps  # decode steps since then

    @property
    def why_eager(self) -> str | None:
        return self.engine.why_eager

    def run(self, requests: Sequence[Request]) -> list[Served]:
        """Serve all of them; the results are in the order of `requests`."""
        check_requests(requests)
        self.coming = deque(sorted(requests, key=lambda r: r.arrival_ms))
        self._warm_up(requests)
        self.clock.start()
        self.cache.moments.clock = self.clock
        with self.cache.lineage.trusting():
            try:
                while self.coming or self.waiting or self.running:
                    self._step()
            finally:
                self.cache.abort()
                for job in self.running:
                    job.close(self.cache)
                self.cache.rows, self.running = [], []
                self.flights.clear()
        found = {s.number: s for s in self.served}
        return [found[r.number] for r in requests]

    def _warm_up(self, requests: Sequence[Request]) -> None:
        """What can be made before the clock starts; what memory is short for is made when needed.
        """
        try:
            self.engine.warm_up(max((Job(r).most_tokens for r in requests), default=0))
        except MEMORY_ERRORS:
            self.cache.abort()

    # ---- one step

    def _step(self) -> None:
        if self.limits.seconds is not None and self.clock.now_ms > 1e3 * self.limits.seconds:
            self._turn_away()
        self._arrive()
        self._let_go()
        self._admit()
        self.clock.step()
        self.steps += 1
        due = self.since_chunk >= self.limits.decode_steps
        chunk = due and self._prefill()
        if not chunk or self.limits.decode_steps:
            self._decode()
        self.since_chunk = min(1, self.limits.decode_steps) if chunk else self.since_chunk + 1
        self._collect(self.steps - self.engine.lag)

    def _turn_away(self) -> None:
        """Time is over: only who is running is served."""
        reason = f"{self.limits.seconds:g} seconds are over, the limit is that"
        for job in [*self.waiting, *map(Job, self.coming)]:
            self._end(job, "refused", f"request {job.request.number}: {reason}")
        self.waiting.clear()
        self.coming.clear()

    def _arrive(self) -> None:
        if not self.waiting and not self.running and self.coming:
            self.clock.wait_until(self.coming[0].arrival_ms)
        while self.coming and self.coming[0].arrival_ms <= self.clock.now_ms:
            job = Job(self.coming.popleft())
            reason = (self.limits.refusal(job.request, len(self.waiting)) or self._too_large(job)
                      or self._unknown(job))  # fmt: skip
            if reason:
                self._end(job, "refused", reason)
            else:
                self.waiting.append(job)

    def _too_large(self, job: Job) -> str:
        """Whether a request could not be served even alone, by a cache that gives nothing up."""
        size, groups = self.cache.geometry.block_size, self.cache.groups
        group = min(groups, key=lambda g: g.ledger.capacity or 0)  # with a budget, all have one
        needs, capacity = -(-job.most_tokens // size), group.ledger.capacity
        if capacity is None or needs <= capacity or not group.held.sharing.hold:
            return ""
        return f"request {job.request.number}: needs {needs} blocks, the budget is {capacity}"

    def _unknown(self, job: Job) -> str:
        """Whether the model has no such tokens; on a GPU one would end the process."""
        for id in (min(job.tokens), max(job.tokens)):
            if not 0 <= id < self.known:
                return (f"request {job.request.number}: {id} is no token of this model, whose ids "
                        f"are 0 to {self.known - 1}")
        return ""

    def _let_go(self) -> None:
        """Who has left: while waiting, during the prefill, or in the middle of the output."""
        for job in [j for j in self.waiting if j.left]:
            self.waiting.remove(job)
            self._end(job, "cancelled")
        for job in [j for j in self.running if j.left and not j.coming]:
            self._stop(job)
            self._end(job, "cancelled")

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.running:
            if self.crowded and self.running:
                return
            job = self.waiting[0]
            try:
                job.open(self.cache, self.limits.reserve, self.clock.now_ms)
            except (OutOfBlocks, *MEMORY_ERRORS) as error:
                if self.running:
                    return
                self._give_up(self.waiting.popleft(), error)
                continue
            self.running.append(self.waiting.popleft())
            self.most_running = max(self.most_running, len(self.running))
            self.note("admit", job.request.number)

    def _prefill(self) -> bool:
        """One chunk of prompts; whether there was any."""
        jobs, parts = self._next_chunk()
        if not jobs:
            return False
        arriving = self._launch(self.engine.prefill, jobs, parts)
        if arriving is not None:
            ends = [job.ends_with(len(new)) for job, new in zip(jobs, parts)]
            for job, new, ended in zip(jobs, parts, ends):
                if ended:
                    job.choose(len(new))
                else:
                    job.computed += len(new)
            self._send([job if ended else None for job, ended in zip(jobs, ends)], arriving)
        return True

    def _next_chunk(self) -> tuple[list[Job], list[list[int]]]:
        """Whose tokens are computed next, and which: of the first prompt as many as fit, and behind
        it whole prompts that still do. What is cut is read again by its second half."""
        jobs, parts, room = [], [], self.limits.chunk_tokens
        for job in self.running:
            left = len(job.tokens) - job.computed
            if not job.prefilling or job.left or (jobs and left > room):
                continue
            jobs.append(job)
            parts.append(job.tokens[job.computed : job.computed + room])
            room -= len(parts[-1])
            if not room or not self.engine.packs:
                break
        return jobs, parts

    def _decode(self) -> None:
        jobs = [j for j in self.running if j.ready and j.wanted and not j.left]
        arriving = self._launch(self.engine.decode, jobs) if jobs else None
        if arriving is not None:
            for job in jobs:
                job.choose(1)
            self._send(jobs, arriving)

    def _launch(self, forward: Callable, jobs: list[Job], *more):
        """What `forward` gives; None if there was no room, which has been made."""
        try:
            return forward(jobs, *more)
        except (OutOfBlocks, *MEMORY_ERRORS) as error:
            self.cache.abort()
            self._make_way(error)
            return None

    # ---- tokens arrive

    def _send(self, jobs: Sequence[Job | None], arriving) -> None:
        self.flights.append((self.steps, jobs, arriving))
        if not self.engine.lag:
            self._collect(self.steps)

    def _collect(self, steps: int) -> None:
        """Take what is there, and wait for what was launched in the first `steps` steps."""
        while self.flights and (self.flights[0][0] <= steps or self._there()):
            _, jobs, arriving = self.flights.popleft()
            for job, token in zip(jobs, arriving.tokens()):
                if job is not None:
                    self._take_token(job, token)

    def _there(self) -> bool:
        return self.engine.lag and self.flights[0][2].there

    # ---- what becomes of a sequence

    def _take_token(self, job: Job, token: int) -> None:
        if job.first_ms is None:
            job.first_ms = self.clock.now_ms
            self.note("first", job.request.number)
        job.take(token, self.clock.now_ms)
        if self.engine.lag:  # else it is told with the step that computes it
            self.cache.tell(job.seq, [token], len(job.tokens) - 1)
        if not job.wanted and not job.coming:
            self._stop(job)
            self._end(job, "done")

    def _make_way(self, error: Exception) -> None:
        """Blocks or memory ran out: the sequence admitted last makes way, or cannot be served."""
        running = len(self.running)
        self._collect(self.steps)  # what was chosen is computed again, so it has to be known
        if len(self.running) < running:  # there is room now
            return
        job = self.running[-1]
        self._stop(job)
        job.failures += isinstance(error, MEMORY_ERRORS)
        alone = not self.running and isinstance(error, OutOfBlocks)
        if alone or job.failures > self.limits.failures:
            self._give_up(job, error)
            return
        job.preemptions += 1
        self.crowded = True
        self.waiting.appendleft(job)
        self.note("preempt", job.request.number)

    def _give_up(self, job: Job, error: Exception) -> None:
        text = str(error) if isinstance(error, KvlabError) else f"out of memory: {error}"
        self._end(job, "refused", f"request {job.request.number}: {text}")

    def _stop(self, job: Job) -> None:
        self.running.remove(job)
        self.engine.leave(job)
        job.close(self.cache)
        self.crowded = False

    def _end(self, job: Job, state: str, reason: str = "") -> None:
        self.served.append(job.served(state, reason, self.clock.now_ms))
        self.note("end", job.request.number)
