"""What stays constant while a model generates without end: bytes, speed, loss on the way."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.core import Measurement, Variant
from kvlab.eval.clock import seconds
from kvlab.eval.sweep import Batch, Point, Sweep, at_least, check_variants
from kvlab.model import Decoder, Driver, PagedCache, check_driver, prefill


@dataclass
class Endless(Sweep):
    """One document decoded token by token through each variant.

    The tokens are the document's: each step is a step of generation, and what the model would have
    said can be scored. Rows come every `every` tokens, with `done` among their settings.
    model, data: a loader and a source of documents; driver: see `Decoder`.
    """

    model: object
    data: object
    tokens: int = 100_000
    every: int = 1000
    driver: Driver = "auto"
    device: str = "auto"
    cap_gb: float | None = None

    wants_specs = True
    holds_nothing = True

    def __post_init__(self):
        check_driver(self.driver)
        at_least(2, tokens=self.tokens)
        at_least(1, every=self.every)

    def points(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[Point]:
        check_driver(self.driver, device)
        loaded = self.model.load(device)
        check_variants(loaded, variants)
        [document] = self.data.documents(loaded.tokenizer, 1, self.tokens + 2)
        ids = torch.from_numpy(document.ids).long().to(device)
        last = self.tokens // self.every * self.every
        for name, params, spec in variants:
            about = params | {**loaded.about(), "document": document.id, "tokens": self.tokens,
                              "block_size": spec.block_size, "done": last}  # fmt: skip
            yield Point(name, about, partial(self._decode, loaded.model, spec, ids))

    def _decode(self, model, spec, ids: Tensor) -> Iterator[Batch]:
        cache = PagedCache.for_model(model, spec)
        prefill(model, ids[None, :1], cache)
        decoder = Decoder(model, cache, driver=self.driver)

        def some(start: int) -> Tensor:
            steps = range(start, start + self.every)
            losses = [F.cross_entropy(decoder.step(ids[at : at + 1]).float(), ids[at + 1 : at + 2])
                      for at in steps]
            return torch.stack(losses).mean()

        for start in range(1, self.tokens - self.every + 2, self.every):
            took, loss = seconds(ids.device, partial(some, start))
            rate = self.every / took
            yield Batch({"done": start + self.every - 1}, list(held(cache, rate, float(loss))))
        cache.check()


def held(cache: PagedCache, rate: float, loss: float) -> Iterator[Measurement]:
    stats = cache.stats()
    yield Measurement("decode_tokens_per_second", rate, "tokens/s", "higher")
    yield Measurement("nll_mean", loss, "nats", "lower")
    for name, value in (("cache_allocated_bytes", stats.allocated_bytes),
                        ("cache_peak_bytes", stats.peak_allocated_bytes),
                        ("process_peak_bytes", resident_bytes())):
        yield Measurement(name, value, "B", "lower")
    yield Measurement("resident_tokens", stats.resident_tokens, "tokens")
    yield Measurement("evictions", stats.evictions, "blocks")


def resident_bytes() -> int:
    """The most that this process has held in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
