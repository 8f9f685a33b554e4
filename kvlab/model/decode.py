"""The fast decode driver: one step of the model's own forward, captured in a CUDA graph.

Between two replays the host does what a graph cannot: find a block for the next token, evict,
refresh the device tables in place, seal full blocks. Kernels read lengths and block ids from those
tables, so a graph stays valid while sequences grow, until a table needs more columns: then the
step is captured again, which compiles nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kvlab.core import BadInput, KvlabError, check_number
from kvlab.model.adapter import PagedCache
from kvlab.model.columns import Plan
from kvlab.model.ends import EndTokens, check_new_tokens, end_tokens
from kvlab.model.forward import check_window, padded_span
from kvlab.model.prefill import forward_chunk, prefill
from kvlab.model.shape import rope_types
from kvlab.model.step import DRIVERS, Driver, Step, StepCache

GLANCE_STEPS = 64  # between looks whether the model is the same; each request ends with a full one
log = logging.getLogger(__name__)


class Decoder:
    """Feeds one token per row of `cache` to `model` at a time.

    cache: filled before, by `prefill` or the model; its rows make the batch.
    driver: "graph" captures, and raises `BadInput` where that is impossible; "auto" captures where
        it can and says in the log why not; "eager" is the library's forward; "static" is the step
        that would be captured, run as it is (on the CPU too).

    `why_eager` is the sentence that "auto" logged, None while there was none.
    """

    def __init__(self, model, cache: PagedCache, *, driver: Driver = "auto"):
        check_driver(driver)
        if not cache.rows:
            raise BadInput("cache", "empty", "needs at least one token of each row before decoding")
        self.model, self.cache, self.driver = model, cache, driver
        self.why_eager: str | None = None
        self._step: Step | None = None
        self._steps = 0
        self._windows = {shape.window for shape in cache.geometry.shapes}
        self._tables: list | None = None  # of the capture; kept alive as long as the graph is
        self._scratch: list[Tensor] = []  # the same of what its kernels write in between
        self._masses: list[Tensor | None] = []  # where it leaves what the policies observe
        if driver in ("auto", "graph"):
            self._give_up(obstacle(model, cache))

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a graph."""
        return self._step is not None and self._step.graph is not None

    @property
    def steady(self) -> bool:
        """Whether its step serves other sequences of the same cache as well: it is fixed already.
        """
        return self._step is not None and self.why_eager is None

    def timed(self, clock: Callable[[Callable[[], None]], float]) -> float:
        """`clock` of replays of the captured step that leave the cache as it is."""
        cache = self.cache
        cache.begin(cache.rows, [1] * len(cache.rows))
        try:
            return clock(self._step.replay)
        finally:
            cache.abort()
            self._step.forget()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` [B]; logits [B, V] of what follows, overwritten by the next step.

        Raises `OutOfBlocks` before anything has changed where the budget is too small.
        """
        cache, core, rows = self.cache, self.cache.core, self.cache.rows
        tokens = tokens.reshape(-1, 1)
        if len(tokens) != len(rows):
            raise KvlabError(f"the cache holds {len(rows)} rows, {len(tokens)} tokens came")
        if self.driver == "eager" or self.why_eager is not None:
            return self._plain(tokens)
        core.abort()
        if self._steps % GLANCE_STEPS == 0:
            core.lineage.glance()
        self._steps += 1
        plan = Plan(1, [1] * len(rows))
        for window in self._windows:
            check_window(padded_span(cache.columns, plan), window)
        positions = cache.columns.next_positions()
        core.begin(rows, plan.counts)
        try:
            logits = self._run(tokens, positions)
        except BaseException:
            core.abort()
            raise
        if logits is None:
            core.abort()
            return self._plain(tokens)
        core.commit()
        cache.columns.advance(plan)
        cache.tell_later(tokens[:, 0], positions)
        return logits

    def _plain(self, tokens: Tensor) -> Tensor:
        return forward_chunk(self.model, tokens, self.cache, last=True)[:, -1]

    def _run(self, tokens: Tensor, positions: list[int]) -> Tensor | None:
        """Logits of one step between `begin` and `commit`; None where it cannot be captured, or is
        none of the captured kind: one that a policy looks at is read piece by piece."""
        if self.driver != "static" and not self.cache.core.running.decodes:
            return None
        if self._step is None or len(self._step.ids) != len(tokens):
            self._step = Step(self.model, StepCache(self.cache), len(tokens))
        step = self._step
        step.ids.copy_(tokens)
        step.at(positions)
        if self.driver == "static":
            step.run()
            return step.logits
        tables = [table for group in self.cache.core.groups for table in group.sources.in_place()]
        stale = self._tables is None or any(a is not b for a, b in zip(tables, self._tables))
        if (stale or not self.captured) and not self._capture(tables):
            return None
        step.replay()
        for group, mass in zip(self.cache.core.groups, self._masses):
            group.watch.replayed(group.sources.sealed.decoding, mass)
        return step.logits

    def _capture(self, tables: list) -> bool:
        """Compile, then record; False, with the reason noted, where that fails."""
        watches = [group.watch for group in self.cache.groups]
        try:
            self._step.warm_up()
            for watch in watches:
                watch.abort()
            self._step.capture()
        except (BadInput, RuntimeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self._step = None
            self._give_up(f"a CUDA graph cannot be captured here: {str(error).splitlines()[0]}")
            return False
        self._masses = [watch.captured() for watch in watches]
        self._tables, self._scratch = tables, self.cache.workspace.scratch.tensors
        return True

    def _give_up(self, reason: str | None) -> None:
        if reason is None:
            return
        if self.driver == "graph":
            raise BadInput("eval.driver", "graph", f"{reason}; eval.driver=auto runs eagerly then")
        self.why_eager = reason
        _say(reason)


@lru_cache
def _say(reason: str) -> None:
    """Once for each reason: a study makes many decoders."""
    log.warning("decoding eagerly: %s", reason)


def check_driver(driver: str, device: torch.device | None = None) -> None:
    """Raises `BadInput` for a driver that is unknown, or impossible on `device`."""
    if driver not in DRIVERS:
        raise BadInput("eval.driver", driver, f"must be one of {', '.join(DRIVERS)}")
    if driver == "graph" and device is not None and device.type != "cuda":
        raise BadInput("eval.driver", driver, "needs a CUDA device; auto runs eagerly without one")


def obstacle(model, cache: PagedCache) -> str | None:
    """Why a decode step of `model` over `cache` cannot be captured, or None."""
    if cache.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the cache lives on {cache.device}"
    if not cache.can_decode([1] * len(cache.rows)):
        return "this cache has axes that the decode kernel does not read"
    reasons = [group.sources.obstacle for group in cache.groups if not group.sources.capturable]
    if reasons:
        return reasons[0]
    windows = {shape.window for shape in cache.geometry.shapes} - {None}
    if windows:
        return f"the model's own sliding window of {abs(windows.pop())} tokens needs masks"
    moving = rope_types(model) & {"dynamic", "longrope"}
    if moving:
        return f"rotary positions of type {moving.pop()} look at lengths on the host"
    return None


@torch.inference_mode()
def generate(
    model, ids: Tensor, cache: PagedCache, max_new_tokens: int, *,
    attention_mask: Tensor | None = None, eos: EndTokens = None,
    choose: Callable[[Tensor], Tensor] | None = None, chunk_tokens: int | str = 2048,
    driver: Driver = "auto",
) -> Tensor:
    """Continue `ids` [B, T] by `max_new_tokens`: prefill in chunks, then decode, [B, new].

    attention_mask: [B, T], 0 for padding, which is not stored; the last column must be tokens.
    eos: a token id or several; rows that have produced one repeat it, and all having done so ends
        the loop. Asking costs a look at the device at every token; without it the host runs ahead.
    choose: logits [B, V] -> tokens [B]; the most likely token by default, see `sampled`.
    """
    check_new_tokens(max_new_tokens)
    ends = end_tokens(eos, ids.device)
    choose = choose or (lambda logits: logits.argmax(-1))
    logits = _padded(model, ids, attention_mask, cache, chunk_tokens)
    tokens = choose(logits)
    out, ended = [tokens], torch.zeros_like(tokens, dtype=torch.bool)
    decoder = Decoder(model, cache, driver=driver)
    for _ in range(max_new_tokens - 1):
        if ends is not None:
            ended |= torch.isin(tokens, ends)
            if bool(ended.all()):
                break
        fresh = choose(decoder.step(tokens))
        tokens = fresh if ends is None else torch.where(ended, tokens, fresh)
        out.append(tokens)
    return torch.stack(out, 1)


def _padded(
    model, ids: Tensor, mask: Tensor | None, cache: PagedCache, chunk_tokens: int | str = 2048
) -> Tensor:
    """Logits [B, V] after the prompts."""
    if mask is not None and not bool(mask[:, -1:].all()):
        raise BadInput("attention_mask", "0 in the last column",
                       "every row is continued from its last column: pad on the left")
    result = prefill(model, ids, cache, attention_mask=mask, chunk_tokens=chunk_tokens)
    if result.stopped:  # by Ctrl-C: there is nothing to go on from
        raise KeyboardInterrupt
    return result.logits


def sampled(
    temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """A `choose` for `generate` that draws from the softmax at `temperature`, of `top_k` tokens."""
    check_number("temperature", temperature, 0, whole=False, above=True)
    check_number("top_k", top_k, null=True)

    def choose(logits: Tensor) -> Tensor:
        logits = logits.float() / temperature
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    return choose
