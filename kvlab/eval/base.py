"""What the evaluators share: who is run, over which windows of tokens, and what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Measurement, RunFailed
from kvlab.model import PagedCache
from kvlab.model.load import LoadedModel
from kvlab.model.prefill import forward_chunk
from kvlab.track.failure import Failure


@dataclass
class Runner:
    """One cache design on its way through the documents.

    pieces: into how many parts it cuts each chunk; 2 makes the noise floor.
    failure: what it raised; it is left out from there on.
    """

    name: str
    params: dict
    spec: CacheSpec
    pieces: int = 1
    nll: list[np.ndarray] = field(default_factory=list)  # one array per document, nats
    kl: list[np.ndarray] = field(default_factory=list)
    same: list[np.ndarray] = field(default_factory=list)  # top-1 equals the full cache's
    stats: list = field(default_factory=list)
    peak_bytes: int = 0
    cache: PagedCache | None = None
    failure: Failure | None = None

    @property
    def columns(self) -> dict[str, list[np.ndarray]]:
        return {"nll": self.nll, "kl": self.kl, "same": self.same}

    def start(self, loaded: LoadedModel) -> None:
        self.cache = PagedCache.for_model(
            loaded.model, self.spec, tokenizer=loaded.tokenizer
        )

    def forward(self, loaded: LoadedModel, ids: Tensor) -> Tensor:
        """Logits [T, V] of `ids` [T], through this runner's cache."""
        parts = ids[None].tensor_split(min(self.pieces, len(ids)), dim=1)
        logits = [forward_chunk(loaded.model, part, self.cache)[0] for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def finish(self) -> None:
        self.stats.append(self.cache.stats())
        self.release()

    def release(self) -> None:
        """Give all bytes back; what was held at most is noted."""
        self.peak_bytes = max(self.peak_bytes, self.cache.stats().peak_allocated_bytes)
        self.cache.check()
        self.cache.reset()

    @contextmanager
    def surviving(self, where: str) -> Iterator[None]:
        """What raises inside is this runner's failure, not the run's; its cache is given up."""
        try:
            yield
        except Exception as error:
            self.failure = Failure.of(error, where)
            self.abandon()

    @contextmanager
    def leading(self, where: str) -> Iterator[None]:
        """What raises inside ends the run: everything is compared with this runner."""
        with self.surviving(where):
            yield
        if self.failure is not None:
            raise RunFailed(f"{self.name}, the full cache that all variants are compared with, "
                            f"failed: {self.failure.reason}")

    def abandon(self) -> None:
        """Give the bytes back of a cache that may be in any state."""
        cache, self.cache = self.cache, None
        with suppress(Exception):
            cache.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def alive(runners: Iterable[Runner]) -> list[Runner]:
    """Those that have not failed, as they are at this moment."""
    return [runner for runner in runners if runner.failure is None]


def windows(tokens: int, chunk_tokens: int, decode_tokens: int) -> Iterator[tuple[int, int]]:
    """Prefill chunks up to the last `decode_tokens` tokens, then those one at a time."""
    stop = tokens - decode_tokens
    for start in range(0, stop, chunk_tokens):
        yield start, min(start + chunk_tokens, stop)
    for start in range(stop, tokens):
        yield start, start + 1


def check_lengths(tokens: int, decode_tokens: int, chunk_tokens: int | str) -> None:
    """Raises `BadInput` for lengths that leave nothing to prefill."""
    check_chunk(chunk_tokens)
    if tokens < 2:
        raise BadInput("eval.tokens", tokens, "must be at least 2 to predict anything")
    if not 0 <= decode_tokens < tokens:
        raise BadInput(
            "eval.decode_tokens", decode_tokens,
            f"must lie between 0 and eval.tokens - 1 = {tokens - 1}",
        )


def check_chunk(chunk_tokens: int | str) -> None:
    """Raises `BadInput` for a chunk of no tokens."""
    if chunk_tokens != "adaptive" and (isinstance(chunk_tokens, str) or chunk_tokens < 1):
        raise BadInput("chunk_tokens", chunk_tokens, "must be at least 1, or adaptive")


def done(folder, runner: Runner, name: str) -> bool:
    """Whether a killed run got as far as `name` for this runner."""
    return folder.done(runner.name, runner.params, [name])


@contextmanager
def failing(folder, awaited: str, *runners: Runner) -> Iterator[None]:
    """Notes in `folder` which of `runners` fail inside; `awaited`: what they so do not measure."""
    before = alive(runners)
    try:
        yield
    finally:
        for runner in before:
            if runner.failure is not None:
                folder.fail(runner.name, runner.params, runner.failure, missing=awaited)


def awaited_last(rows: list[Measurement], awaited: str) -> list[Measurement]:
    """`rows` for one writing: a kill may tear it, and then `awaited` must not be there yet."""
    return sorted(rows, key=lambda row: row.name == awaited)
