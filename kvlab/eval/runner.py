"""Who is measured: one cache design on its way through the items of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvlab.cache import CacheSpec
from kvlab.core import KvlabError, RunFailed
from kvlab.model import Decoder, Driver, LoadedModel, PagedCache, forward_chunk
from kvlab.track import Failure


@dataclass(eq=False)
class Runner:
    """A task's `run` sends tokens through it: `start`, then `fill` or `read`, then `decode`.

    pieces: into how many parts it cuts each chunk; 2 makes the noise floor. driver: of `decode`.
    reads: whether it gets the context of a question; who does not is a control.
    raws: item number -> what the task measured. stats, peak_bytes: the account of the cache at the
    end of each context, and the most that it held on the way.
    failure: what it raised; it is left out from there on.
    told: hears which kind of work, `read` or `answer`, the time up to now went into.
    """

    name: str
    params: dict
    spec: CacheSpec
    pieces: int = 1
    loaded: LoadedModel | None = None
    chunk_tokens: int = 512
    driver: Driver = "eager"
    reads: bool = True
    raws: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    stats: list = field(default_factory=list)
    peak_bytes: int = 0
    cache: PagedCache | None = None
    failure: Failure | None = None
    told: Callable[[str], None] = lambda kind: None
    place: str = ""  # where in the item it is, for messages
    _decoder: Decoder | None = None
    _held: tuple[np.ndarray, Tensor] | None = None

    def column(self, name: str) -> list[np.ndarray]:
        """What was measured under `name`, an array for each item; empty where it never is."""
        return [raw[name] for _, raw in sorted(self.raws.items()) if name in raw]

    @property
    def is_control(self) -> bool:
        return bool(self.params.get("control"))

    @property
    def lasting(self) -> bool:
        """Whether its cache may be used again when it is empty, see `PagedCache.renew`."""
        spec = self.spec
        stays = spec.prefix.shares or spec.summary.makes or spec.retrieval.selects
        return not stays and not spec.offload.keeps and (spec.by_token or not spec.member.evicts)

    # -- tokens

    def start(self) -> None:
        """An empty cache; one that was held is given back.

        It is the same object where a decode step over it was captured and nothing else outlives its
        sequences: to capture takes as long as tens of decoded tokens.
        """
        if self.cache is not None:
            self.release()
        self.place = "at its start"
        if self._decoder is not None:
            self.cache.renew()
            return
        self.cache = PagedCache.for_model(
            self.loaded.model, self.spec, tokenizer=self.loaded.tokenizer
        )

    def open(self, ids) -> int:
        """A request of tokens [T] in all: how many of them the cache knows already, at most T - 1.
        Only a cache that shares prefixes knows any."""
        self.place = "at its start"
        return self.cache.start(self.on_device(ids)[None]) if self.spec.prefix.shares else 0

    def next_request(self) -> None:
        """The end of a request; a cache that shares prefixes keeps what it may, any other is empty
        again."""
        if not self.spec.prefix.shares:
            self.start()
            return
        self.peak_bytes = max(self.peak_bytes, self.cache.stats().peak_allocated_bytes)
        self.cache.finish()
        self._decoder = None

    def fill(self, ids) -> None:
        """A context, tokens [T], in prefill chunks; then the account is taken."""
        self.told("answer")  # of a question before
        with self.cache.context():
            for start in range(0, len(ids), self.chunk_tokens):
                self.read(ids[start : start + self.chunk_tokens], last=True)
            self.cache.end_context()
        self.account()
        self.told("read")

    def forward(self, ids: Tensor, last: bool = False) -> Tensor:
        """Logits [T, V] of a chunk, `ids` [T] on the device; `last`: of the last token only."""
        held = self.cache.get_seq_length()
        self.place = f"tokens {held} to {held + len(ids)}"
        parts = ids[None].tensor_split(min(self.pieces, len(ids)), dim=1)
        model = self.loaded.model
        logits = [forward_chunk(model, part, self.cache, last=last)[0] for part in parts]
        return logits[-1] if last or len(logits) == 1 else torch.cat(logits)

    def read(self, ids, last: bool = False) -> Tensor:
        """As `forward`, of tokens [T] wherever they lie."""
        return self.forward(self.on_device(ids), last)

    def decode(self, ids) -> Tensor:
        """Logits [T, V] of `ids` [T], one token at a time through the decode path.

        The one door to it: `driver` says whether steps are eager, captured or static.
        """
        ids = self.on_device(ids)
        return torch.cat([self._step(ids[i : i + 1]) for i in range(len(ids))])

    def _step(self, token: Tensor) -> Tensor:
        if self.driver == "eager" or (self.driver == "auto" and not token.is_cuda):
            return self.forward(token)
        self.place = f"token {self.cache.get_seq_length()}"
        if self._decoder is None or self._decoder.cache is not self.cache:
            self._decoder = Decoder(self.loaded.model, self.cache, driver=self.driver)
        return self._decoder.step(token).clone()  # the next step writes over it

    def generate(
        self, logits: Tensor, count: int, ended: Callable[[list[int]], bool] = lambda out: False
    ) -> list[int]:
        """The likeliest tokens from `logits` [V] on: `count`, or until the answer has `ended`."""
        out = [int(logits.argmax(-1))]
        while len(out) < count and not ended(out):
            out.append(int(self.decode(out[-1:])[-1].argmax(-1)))
        return out

    def back_to(self, length: int) -> bool:
        """Forget what came behind `length` tokens; False where what shares a block is gone."""
        try:
            self.cache.crop(length - self.cache.get_seq_length())
        except KvlabError:
            return False
        return True

    def held(self, ids: np.ndarray) -> Tensor:
        """As `on_device`, of an item's whole context, which is copied there once: each copy waits
        for all that the device still has to do."""
        if self._held is None or self._held[0] is not ids:
            self._held = ids, self.on_device(ids)
        return self._held[1]

    def on_device(self, ids) -> Tensor:
        return torch.as_tensor(np.asarray(ids) if not torch.is_tensor(ids) else ids).to(
            self.loaded.model.device, torch.long)

    # -- the account

    def account(self) -> None:
        self.stats.append(self.cache.stats())

    def finish(self) -> None:
        """The end of an item that nobody asks about any more."""
        self.place = "at its end"
        self.account()
        self.release()

    def release(self) -> None:
        """Give all bytes back; what was held at most is noted."""
        self.peak_bytes = max(self.peak_bytes, self.cache.stats().peak_allocated_bytes)
        self.cache.check()
        self.cache.reset()
        if not (self.lasting and self._decoder is not None and self._decoder.steady):
            self._decoder = None

    def leave(self) -> None:
        """The end of its turn: cache and captured step are given up."""
        self.cache = self._decoder = None

    # -- failure

    @contextmanager
    def surviving(self, where: str) -> Iterator[None]:
        """What raises inside is this runner's failure, not the run's; its cache is given up."""
        try:
            yield
        except Exception as error:
            self.failure = Failure.of(error, ", ".join(filter(None, (where, self.place))))
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
        cache, self.cache, self._decoder = self.cache, None, None
        with suppress(Exception):
            cache.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def alive(runners: Iterable[Runner]) -> list[Runner]:
    """Those that have not failed, as they are at this moment."""
    return [runner for runner in runners if runner.failure is None]


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
