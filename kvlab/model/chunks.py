"""Prefill chunks of one shape, captured in a CUDA graph: one launch for a chunk's whole forward.

A short chunk of a small model is over before the host has launched it: some twenty kernels a layer.
Here the host begins the step, tells the device where the past lies (`cache/fixed.py`), replays,
and does behind it what no graph can: choosing among tokens, eviction, the tables. The first chunk
is run as it is, which compiles; the next is recorded. A past that outgrows its table is run and
recorded anew.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from kvlab.cache import Parts, fixed_chunk, standing_bytes
from kvlab.cache import obstacle as layer_obstacle
from kvlab.core import BadInput
from kvlab.kernel.attend_sdpa import ONE_CALL
from kvlab.model.adapter import PagedCache
from kvlab.model.columns import Plan
from kvlab.model.forward import admitted, take
from kvlab.model.packed import Packing
from kvlab.model.room import captured_bytes, free_bytes
from kvlab.model.shape import rope_types
from kvlab.model.step import DRIVERS, Driver, Step

MOST_TOKENS = 2048  # of a chunk: more keep the device busy for longer than the host takes
# Up to `ONE_CALL` queries eager attention is the same kernel; beyond it cuDNN's is faster (a fifth
# of a chunk's device time on an H200), which counts where products keep the device busy, too.
WORK = 1 << 40  # parameters times tokens of a longer chunk
WORTH = 3  # chunks of a prompt, at least: to run one and record another takes as long as two
log = logging.getLogger(__name__)


class Chunks:
    """Feeds chunks of `tokens` tokens of each of `rows` rows of one cache to `model`.

    driver: "graph" captures, and raises `BadInput` where that is impossible; "auto" captures where
        it can and where it pays, and says in the log why not; "static" is the chunk that would be
        captured, run as it is (on the CPU too).

    `why_eager` is the sentence that "auto" logged, None while there was none. steps: chunks that
    went this way; replayed: those of them that were one launch.
    """

    def __init__(self, model, cache: PagedCache, rows: int, tokens: int, driver: Driver = "auto"):
        self.shape, self.driver, self.model = (rows, tokens), driver, model
        self.steps = self.replayed = 0
        self._warm, self._captured = False, None
        self.why_eager = obstacle(model, cache, rows, tokens, driver)
        if self.why_eager is not None:
            self._give_up(self.why_eager)
            return
        self.parts = [fixed_chunk(group, rows, tokens) for group in cache.groups]
        with torch.inference_mode(False):
            inputs = tuple(torch.zeros(rows, tokens, dtype=torch.long, device=model.device)
                           for _ in range(2))
        self._step = Step(model, Packing(cache), rows, inputs)
        self._addresses = addresses(model)
        cache.workspace.shared("chunks", Parts).parts = self.parts

    def __deepcopy__(self, memo: dict) -> None:
        """A copied cache lies elsewhere, and captures anew."""

    def serves(self, model, rows: int, tokens: int, driver: Driver) -> bool:
        """Whether it was made for just this, and all weights lie where they did."""
        same = self.model is model and (*self.shape, self.driver) == (rows, tokens, driver)
        return same and (self.why_eager is not None or self._addresses == addresses(model))

    def reserve(self, tokens: int) -> None:
        """A prompt of so many tokens comes: have tables for its past, if nothing of it leaves."""
        for part in () if self.why_eager else self.parts:
            part.reserve(part.foreseen(tokens))

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, cache: PagedCache, left: int = 1, told: Tensor | None = None
    ) -> Tensor | None:
        """Logits [B, V] after the last of `ids` [B, T] behind what `cache` holds; None, and nothing
        has happened but for evictions, where this chunk has to go another way.

        left: chunks of this shape that are still to come, this one included; told: the same ids on
        the host, for a cache that wants to know them. Raises as `PagedCache.begin`.
        """
        rows, tokens = self.shape
        if self.why_eager is not None or tuple(ids.shape) != self.shape or not self._pays(left):
            return None
        if cache.columns.real is not None or any(n % part.size for part in self.parts
                                                 for n in map(cache.length, cache.rows)):
            return None
        cache.lineage.glance()
        columns, plan = admitted(cache, rows), Plan(tokens, [tokens] * rows)
        cache.coming = None if told is None else (told, None)
        running = take(cache, columns, plan, None)
        try:
            logits = self._run(ids, columns.next_positions(), running)
        except BaseException:
            self._abort(cache)
            raise
        if logits is None:
            self._abort(cache)
            return None
        cache.close_chunk(plan)
        self.steps += 1
        return logits

    def _pays(self, left: int) -> bool:
        if self.driver != "auto" or self._step.graph is not None:
            return True
        return left >= WORTH - self._warm

    def _abort(self, cache: PagedCache) -> None:
        cache.core.abort()
        if self.why_eager is None:
            self._step.forget()
            self._step.cache.abort()

    def _run(self, ids: Tensor, positions: list[int], running) -> Tensor | None:
        by_group = list(zip(*running.rows))
        if not all(part.fits(extents) for part, extents in zip(self.parts, by_group)):
            return None
        for part, extents in zip(self.parts, by_group):
            part.prepare(extents)
        running.fixed, step = self.parts, self._step
        step.ids.copy_(ids)
        step.at(positions)
        if not self._attended(step):
            return None
        for part, extents in zip(self.parts, by_group):
            part.after(extents)
        return step.logits.clone()

    def _attended(self, step: Step) -> bool:
        """Whether all layers have, by themselves or replayed."""
        held = [x for part in self.parts for x in part.in_place()]
        if held != self._captured:
            step.graph, self._warm, self._captured = None, False, held
        try:
            if self.driver == "static" or not self._warm:
                step.run()
                self._warm = True
                return True
            if step.graph is None:
                step.capture()
        except (BadInput, RuntimeError) as error:
            if self.driver == "static" or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self._give_up(f"a CUDA graph cannot be captured here: {str(error).splitlines()[0]}")
            return False
        step.replay()
        self.replayed += 1
        return True

    def _give_up(self, reason: str) -> None:
        if self.driver != "auto":
            raise BadInput("prefill.driver", self.driver,
                           f"{reason}; prefill.driver=auto runs eagerly then")
        self.why_eager = reason
        self.parts, self._step = [], None
        _say(reason)


@lru_cache
def _say(reason: str) -> None:
    """Once for each reason: a study fills many caches."""
    log.info("prefill runs eagerly: %s", reason)


def addresses(model) -> list[int]:
    """Where the weights lie: what a captured chunk reads."""
    return [p.data_ptr() for p in model.parameters()]


def check_driver(driver: str) -> None:
    """Raises `BadInput` for a driver that is unknown."""
    if driver not in DRIVERS:
        raise BadInput("prefill.driver", driver, f"must be one of {', '.join(DRIVERS)}")


def obstacle(
    model, cache: PagedCache, rows: int, tokens: int, driver: Driver = "auto"
) -> str | None:
    """Why chunks of so many tokens of `model` over `cache` cannot be captured, or None."""
    if driver != "static" and cache.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the cache lives on {cache.device}"
    if cache.teller is not None:
        return f"policy={cache.spec.member.name} or summary={cache.spec.summary.name} hears tokens"
    work = rows * tokens * sum(p.numel() for p in model.parameters())
    if not 1 < tokens <= MOST_TOKENS or (tokens > ONE_CALL and work > WORK):
        return f"chunks of {tokens} tokens take the device longer than the host"
    needs = captured_bytes(model.config, rows, tokens) + sum(map(standing_bytes, cache.groups))
    if driver != "static" and needs > free_bytes(cache.device) // 2:
        return f"a captured chunk holds {needs} bytes, which is more than half of what is free"
    moving = rope_types(model) & {"dynamic", "longrope"}
    if moving:
        return f"rotary positions of type {moving.pop()} look at lengths on the host"
    return next(filter(None, (layer_obstacle(group, tokens) for group in cache.groups)), None)


def chunks_for(
    model, cache: PagedCache, rows: int, tokens: int, driver: Driver
) -> Chunks | None:
    """Those of `cache`, made where there are none for such chunks; None: all goes eagerly."""
    check_driver(driver)
    if driver == "eager" or (driver == "auto" and cache.device.type != "cuda"):
        return None
    if cache.chunks is None or not cache.chunks.serves(model, rows, tokens, driver):
        cache.chunks = None  # its memory first
        cache.chunks = Chunks(model, cache, rows, tokens, driver)
    return cache.chunks
