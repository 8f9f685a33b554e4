"""Greedy decode steps of sequences that come and go, captured once for each bucket of rows.

A lane is a row of the step's tensors. Sequences take the first lanes, whatever their lengths; a
step runs in the smallest bucket that holds them, and what the rows behind them compute is of
nobody: in the tables they have no block and no token, so kernels read and write nothing there. So
nothing is captured anew when sequences join, grow or leave, until a table has to grow, which it
does by doubling. Tokens stay on the device: each step reads what the one before chose, and the host
hears of them later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.core import BadInput, SeqId
from kvlab.model.adapter import PagedCache
from kvlab.model.decode import GLANCE_STEPS, Driver, check_driver
from kvlab.model.fuse import Fusing
from kvlab.model.shape import rope_types
from kvlab.model.step import Step, StepCache

log = logging.getLogger(__name__)


class Graph(NamedTuple):
    """A captured step, and what has to stay where it was as long as it is replayed.

    tables: what it reads. masses: where it leaves what the policies observe. scratch: what its
    kernels write in between.
    """

    step: Step
    tables: list
    masses: list[Tensor | None]
    scratch: list[Tensor]


class Fetched:
    """Tokens [n] on their way to the host, behind all that was launched before."""

    def __init__(self, tokens: Tensor):
        self._host, self._arrived = tokens.detach().clone(), None
        if tokens.is_cuda:
            self._host = self._host.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def there(self) -> bool:
        """Whether a device says that `tokens` would not wait."""
        return self._arrived is not None and self._arrived.query()

    def tokens(self) -> list[int]:
        """Waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class Lanes:
    """Feeds each of its sequences in `cache` the token that `model` finds likeliest, step by step.

    most: sequences at a time.
    driver: "graph" captures, and raises `BadInput` where that is impossible; "auto" captures where
        it can; "static" runs the step that would be captured as it is (on the CPU too); "eager"
        runs it with just as many rows as there are sequences.

    `why_eager` says why "auto" does not capture, None where it does. captures: graphs made so far.
    """

    def __init__(
        self, model, cache: PagedCache, most: int, *, driver: Driver = "auto",
        fusing: Fusing | None = None,
    ):
        check_driver(driver)
        self.model, self.core, self.view = model, cache.core, StepCache(cache)
        self.fusing, self.driver = fusing or Fusing(model), driver
        self.buckets = buckets(most)
        self.seqs: list[SeqId] = []
        self.why_eager = None if driver in ("static", "eager") else obstacle(model, cache)
        if driver == "graph" and self.why_eager:
            raise BadInput("driver", driver, f"{self.why_eager}; auto runs eagerly then")
        if self.why_eager:
            _say(self.why_eager)
        self.captures = 0
        with torch.inference_mode(False):
            self.ids, self.positions = (
                torch.zeros(self.buckets[-1], 1, dtype=torch.long, device=model.device)
                for _ in range(2)
            )
        self._graphs: dict[int, Graph] = {}
        self._steps: dict[int, Step] = {}
        self._pool = None
        self._expected: list[int] = []  # positions, as the last step left them
        self._count = 0

    @property
    def exact(self) -> bool:
        """Whether a step has as many rows as there are sequences."""
        return self.driver == "eager" or self.why_eager is not None

    @property
    def replays(self) -> bool:
        """Whether steps are replays of graphs."""
        return not self.exact and self.driver != "static"

    # ---- who is decoded

    @torch.inference_mode()
    def join(self, seqs: Sequence[SeqId], tokens: Tensor) -> None:
        """Sequences whose past is in the cache take lanes; `tokens` [n], on the device, follow."""
        first = len(self.seqs)
        self.seqs += seqs
        self.ids[first : len(self.seqs), 0] = tokens

    @torch.inference_mode()
    def leave(self, seq: SeqId) -> None:
        """A sequence gives up its lane; the last one moves there."""
        lane, last = self.seqs.index(seq), self.seqs.pop()
        if last != seq:
            self.seqs[lane] = last
            self.ids[lane] = self.ids[len(self.seqs)]

    # ---- a step

    @torch.inference_mode()
    def step(self) -> Fetched:
        """One more token of every sequence, in the order of `seqs`.

        Raises `OutOfBlocks`, or what the allocator raises, before anything has changed but for
        evictions.
        """
        core, seqs = self.core, list(self.seqs)
        core.abort()
        if self._count % GLANCE_STEPS == 0:
            core.lineage.glance()
        self._count += 1
        positions = [core.requests.length(seq) for seq in seqs]
        rows = len(seqs) if self.exact else bucket(self.buckets, len(seqs))
        core.begin(seqs, [1] * len(seqs), rows)
        try:
            if positions != self._expected[: len(seqs)]:
                placed = torch.tensor(positions)[:, None]
                self.positions[: len(seqs)].copy_(placed, non_blocking=True)
            self._expected = [p + 1 for p in positions]
            self._run(rows)
        except BaseException:
            self._expected = []
            core.abort()
            raise
        core.commit()
        return Fetched(self.ids[: len(seqs), 0])

    def _run(self, rows: int) -> None:
        if not self.replays:
            self._step(rows).run()
            return
        tables = self._tables()
        held = self._graphs.get(rows)
        if held is None or any(a is not b for a, b in zip(tables, held.tables)):
            held = self._capture(rows, tables)
        held.step.replay()
        for group, mass in zip(self.core.groups, held.masses):
            group.watch.replayed(group.sources.sealed.decoding, mass)

    def _step(self, rows: int) -> Step:
        if rows not in self._steps:
            inputs = self.ids[:rows], self.positions[:rows]
            self._steps[rows] = Step(self.model, self.view, rows, inputs, True, self.fusing)
        return self._steps[rows]

    def _tables(self) -> list:
        return [table for group in self.core.groups for table in group.sources.in_place()]

    def _capture(self, rows: int, tables: list) -> Graph:
        self._graphs.pop(rows, None)
        step, watches = self._step(rows), [group.watch for group in self.core.groups]
        step.warm_up()
        for watch in watches:
            watch.abort()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        step.capture(self._pool)
        self.captures += 1
        masses = [watch.captured() for watch in watches]
        held = Graph(step, tables, masses, self.core.workspace.scratch.tensors)
        self._graphs[rows] = held
        return held

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """Capture all buckets ahead, for sequences of up to so many tokens, over empty rows.

        Only one row has a sequence, which goes again: the kernel over all layers wants a token.
        """
        core, size = self.core, self.core.geometry.block_size
        if self.exact:
            return
        for group in core.groups:
            group.sources.widen(self.buckets[-1], -(-tokens // size))
        for rows in reversed(self.buckets if self.replays else ()):
            seqs = [core.sequences.open()[0]] if rows == 1 else []
            try:
                core.begin(seqs, [1] * len(seqs), rows)
                self._capture(rows, self._tables())
            finally:
                core.abort()
                core.sequences.close(seqs)
        self._expected = []


def buckets(most: int) -> list[int]:
    """Rows of steps for up to `most` sequences: powers of two, and beyond 64 multiples of 64."""
    small = [1 << i for i in range(7) if 1 << i < 2 * most]
    return small + list(range(128, most + 64, 64))


def bucket(sizes: list[int], rows: int) -> int:
    """The smallest of `sizes` that holds `rows`."""
    return next(size for size in sizes if size >= rows)


def obstacle(model, cache: PagedCache) -> str | None:
    """Why steps of any number of sequences over `cache` cannot be captured, or None."""
    if cache.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the cache lives on {cache.device}"
    if not cache.can_decode([1]):
        return "this cache has axes that the decode kernel does not read"
    for group in cache.groups:
        sources = group.sources
        if not sources.capturable:
            return sources.obstacle
        if sources.past is not sources.sealed or group.pool.by_head:
            return "what heads choose to read is kept for the rows of one batch"
    windows = {shape.window for shape in cache.geometry.shapes} - {None}
    if windows:
        return f"the model's own sliding window of {abs(windows.pop())} tokens needs masks"
    moving = rope_types(model) & {"dynamic", "longrope"}
    if moving:
        return f"rotary positions of type {moving.pop()} look at lengths on the host"
    return None


@lru_cache
def _say(reason: str) -> None:
    """Once for each reason."""
    log.warning("serving without captured steps: %s", reason)
