"""Chunked prefill: a prompt of any length in bounded memory, with progress and a way to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.model.adapter import PagedCache
from kvlab.model.chunk import run_chunk
from kvlab.model.chunks import Chunks, check_driver, chunks_for
from kvlab.model.progress import shown
from kvlab.model.refusals import refuse_ids
from kvlab.model.room import adaptive_chunk
from kvlab.model.step import Driver

DRIVER: Driver = "auto"


class PrefillResult(NamedTuple):
    """`logits` [B, V] of the last token computed (None if there was none), and how far it went.

    tokens: of `input_ids`, those that are in the cache now; cached: of them, those that were there
    before (a known prefix). replayed: chunks that were one launch each; why_eager: why none can be,
    None where they can or nobody asked.
    """

    logits: Tensor | None
    tokens: int
    seconds: float
    stopped: bool
    cached: int = 0
    replayed: int = 0
    why_eager: str | None = None


def prefill(
    model, input_ids: Tensor, cache: PagedCache, *, attention_mask: Tensor | None = None,
    chunk_tokens: int | str = 2048,
    progress: bool | Callable[[int, int], None] = False,
    should_stop: Callable[[], bool] | None = None, driver: Driver = DRIVER,
) -> PrefillResult:
    """Run `input_ids` [B, T] through `model` into `cache`, chunk by chunk.

    attention_mask: [B, T], 0 for padding, which is not stored; None: there is none. Rows of a
        filled cache go on at their own positions, whatever padding they have behind them.
    chunk_tokens: tokens of a chunk, or "adaptive": as many as the free device memory carries.
        With a lossy format the chunk is part of the method: its tokens see each other exactly.
    An empty cache with prefix=hash begins with the prefix it knows; only the rest is computed.
    progress: True shows a bar on a terminal and a line now and then in a log; a function gets
        (tokens done, tokens in all) after every chunk.
    should_stop: asked between chunks. It and Ctrl-C leave a cache that can go on.
    driver: "auto" captures chunks on CUDA where that can be and pays (`model/chunks.py`), "graph"
        insists on it, "static" runs what would be captured, "eager" is the library's forward.
    Raises `BadInput` for an impossible chunk, `OutOfBlocks` where the budget is too small.
    """
    refuse_ids(model, input_ids, attention_mask)
    total, logits = input_ids.shape[1], None
    size = chunk_size(chunk_tokens, model, cache)
    started, stopped = time.perf_counter(), False
    shares = cache.spec.prefix.shares
    done = cached = cache.start(input_ids, attention_mask) if shares else 0
    fast = Fast(model, input_ids[:, done:], attention_mask, cache, chunk_tokens, driver)
    with _interrupts() as interrupted, shown(progress, total) as show, cache.context():
        while done < total:
            if interrupted.is_set() or (should_stop is not None and should_stop()):
                stopped = True
                break
            span = slice(done, done + size())
            chunk, mask = input_ids[:, span], attention_mask
            mask = None if mask is None else mask[:, span]
            try:
                logits = fast.forward(chunk, done - cached)
                if logits is None:
                    logits = forward_chunk(model, chunk, cache, mask=mask, last=True)[:, -1]
            except BaseException:
                cache.undo_forward()
                raise
            done += chunk.shape[1]
            show(done)
        if not stopped:
            cache.end_context()
    if logits is not None and logits.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return PrefillResult(logits, done, seconds, stopped, cached, fast.replayed, fast.why_eager)


class Fast:
    """The chunks of one prompt, `ids` [B, T], that may go as steps of a fixed shape."""

    def __init__(
        self, model, ids: Tensor, mask: Tensor | None, cache: PagedCache, tokens: int | str,
        driver: Driver,
    ):
        self.cache, self.tokens, self.total = cache, tokens, ids.shape[1]
        self.chunks: Chunks | None = None
        check_driver(driver)
        least = tokens if driver != "auto" or cache.chunks is not None else 2 * tokens
        if mask is None and isinstance(tokens, int) and least <= self.total:
            self.chunks = chunks_for(model, cache, len(ids), tokens, driver)
        self._before = self.chunks.replayed if self.chunks else 0
        self._told = ids.cpu() if self.chunks and cache.spec.prefix.shares else None
        if self.chunks is not None:
            self.chunks.reserve(cache.seen + self.total)

    @property
    def replayed(self) -> int:
        return self.chunks.replayed - self._before if self.chunks else 0

    @property
    def why_eager(self) -> str | None:
        return self.chunks.why_eager if self.chunks else None

    def forward(self, chunk: Tensor, done: int) -> Tensor | None:
        """Logits [B, V] of `chunk`, behind `done` of the ids; None where it goes eagerly."""
        if self.chunks is None:
            return None
        told = None if self._told is None else self._told[:, done : done + self.tokens]
        return self.chunks.forward(chunk, self.cache, (self.total - done) // self.tokens, told)


@torch.inference_mode()
def forward_chunk(
    model, ids: Tensor, cache: PagedCache, *, mask: Tensor | None = None, last: bool = False
) -> Tensor:
    """Logits [B, T, V] of `ids` [B, T] after what `cache` holds; `last`: of the last column only.

    mask: [B, T], 0 for padding; None: there is none.
    """
    if cache.teller is not None:
        cache.teller.before(ids, cache)
    return run_chunk(model, ids, cache, mask=mask, last=last)


def chunk_size(chunk_tokens: int | str, model, cache: PagedCache) -> Callable[[], int]:
    """How many tokens the next chunk has; asked anew before each. Raises `BadInput`."""
    if chunk_tokens == "adaptive":
        return lambda: adaptive_chunk(model, cache)
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise BadInput("chunk_tokens", chunk_tokens, 'must be at least 1, or "adaptive"')
    return lambda: chunk_tokens


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a flag that is read between chunks; a second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        if flag.is_set() and callable(previous):
            previous(number, frame)
        flag.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
