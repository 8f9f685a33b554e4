"""Many sequences over one cache: admit, prefill in chunks, decode as a ragged batch, preempt.

A workload driver for measurements, not a server: it takes a list of requests and returns what
became of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from kvlab.core import KvlabError, OutOfBlocks
from kvlab.model import LoadedModel, PagedCache
from kvlab.serve.clock import WallClock
from kvlab.serve.job import Job, Limits, Served
from kvlab.serve.requests import Request
from kvlab.serve.rows import forward_rows

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)


class Loop:
    """Runs requests through `cache`, several at a time.

    clock: `WallClock()`, or `StepClock(ms)` for runs that repeat exactly.
    note: called with (event, request number) at "admit", "first", "preempt" and "end".

    Each step: take in who has arrived, let go who has left, admit while there is room, compute
    one chunk of one prompt, then one token of every sequence whose prompt is computed. When
    blocks or memory run out, the sequence admitted last gives its blocks back and waits to be
    resumed; nobody is admitted again until another sequence has ended.
    """

    def __init__(
        self, loaded: LoadedModel, cache: PagedCache, limits: Limits | None = None, clock=None,
        note: Callable[[str, int], None] = lambda event, number: None,
    ):
        self.model, self.cache, self.note = loaded.model, cache, note
        self.limits = limits or Limits()
        self.clock = clock or WallClock()
        self.coming: deque[Request] = deque()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.served: list[Served] = []
        self.crowded = False  # somebody was preempted and nobody has ended since
        self.most_running = 0

    def run(self, requests: Sequence[Request]) -> list[Served]:
        """Serve all of them; the results are in the order of `requests`."""
        self.coming = deque(sorted(requests, key=lambda r: r.arrival_ms))
        self.clock.start()
        self.cache.moments.clock = self.clock
        try:
            while self.coming or self.waiting or self.running:
                self._step()
        finally:
            self.cache.abort()
            for job in self.running:
                self.cache.close(job.seq)
            self.cache.rows, self.running = [], []
        found = {s.number: s for s in self.served}
        return [found[r.number] for r in requests]

    # ---- one step

    def _step(self) -> None:
        self._arrive()
        self._let_go()
        self._admit()
        self.clock.step()
        self._prefill()
        self._decode()

    def _arrive(self) -> None:
        if not self.waiting and not self.running and self.coming:
            self.clock.wait_until(self.coming[0].arrival_ms)
        while self.coming and self.coming[0].arrival_ms <= self.clock.now_ms:
            job = Job(self.coming.popleft())
            reason = self.limits.refusal(job.request, len(self.waiting)) or self._too_large(job)
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

    def _let_go(self) -> None:
        """Who has left: while waiting, during the prefill, or in the middle of the output."""
        for job in [j for j in self.waiting if j.left]:
            self.waiting.remove(job)
            self._end(job, "cancelled")
        for job in [j for j in self.running if j.left]:
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

    def _prefill(self) -> None:
        job = next((j for j in self.running if j.prefilling), None)
        if job is None:
            return
        ids = job.tokens[job.computed : job.computed + self.limits.chunk_tokens]
        logits = self._forward([job], [ids])
        if logits is not None:
            job.computed += len(ids)
            if not job.prefilling:
                self._take_token(job, int(logits[0].argmax()))

    def _decode(self) -> None:
        rows = [j for j in self.running if not j.prefilling and not self._finish_if_done(j)]
        logits = self._forward(rows, [j.tokens[-1:] for j in rows]) if rows else None
        if logits is not None:
            for job, token in zip(rows, logits.argmax(-1).tolist()):
                job.computed += 1
                self._take_token(job, token)
                self._finish_if_done(job)

    def _forward(self, jobs: list[Job], ids: list[list[int]]) -> torch.Tensor | None:
        """Logits [B, V] of the last tokens; None if there was no room, which has been made."""
        for job, new in zip(jobs, ids):
            self.cache.tell(job.seq, new)
        try:
            return forward_rows(self.model, self.cache, [j.seq for j in jobs], ids)
        except (OutOfBlocks, *MEMORY_ERRORS) as error:
            self.cache.abort()
            self._make_way(error)
            return None

    # ---- what becomes of a sequence

    def _take_token(self, job: Job, token: int) -> None:
        if job.first_ms is None:
            job.first_ms = self.clock.now_ms
            self.note("first", job.request.number)
        job.take(token)

    def _finish_if_done(self, job: Job) -> bool:
        if job.wanted:
            return False
        self._stop(job)
        self._end(job, "done")
        return True

    def _make_way(self, error: Exception) -> None:
        """Blocks or memory ran out: the sequence admitted last makes way, or cannot be served."""
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
        job.close(self.cache)
        self.crowded = False

    def _end(self, job: Job, state: str, reason: str = "") -> None:
        self.served.append(job.served(state, reason, self.clock.now_ms))
        self.note("end", job.request.number)
