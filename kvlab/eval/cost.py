"""Task: what a cache costs: seconds of prefill, decoded tokens a second, bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvlab.core import Measurement
from kvlab.eval.clock import fresh_peak, seconds
from kvlab.eval.rows import memory
from kvlab.eval.runner import Runner
from kvlab.eval.task import Item, TimedTask
from kvlab.eval.text_loss import check_lengths, with_decode_tokens
from kvlab.model import Decoder, Driver, check_driver, check_prefill_driver, prefill


class TextCost(TimedTask):
    """One document through each cache alone: chunked prefill, then decode.

    tokens: of the document. decode_tokens: of them, the last ones are fed one at a time through the
        decode driver (null: 256 on a GPU, 32 elsewhere); the first of them, which compiles and
        captures, is not timed if there is another. Wall time with the device synchronized.
    driver: see `model.decode.Decoder`.
    prefill_driver: of the chunks, see `model.prefill.prefill`; a row says how many of them
        were replays of a captured one, where any was.
    account: also rows of the cache's bytes, which tasks of quality have already.
    """

    name = "text_cost"
    awaited = "prefill_seconds"

    def __init__(
        self, tokens: int = 4096, decode_tokens: int | None = None, driver: Driver = "auto",
        account: bool = True, prefill_driver: Driver = "auto",
    ):
        check_lengths(tokens, decode_tokens)
        check_driver(driver)
        check_prefill_driver(prefill_driver)
        self.prefill_driver = prefill_driver
        self.tokens, self.decode_tokens = tokens, decode_tokens
        self.driver, self.account = driver, account

    def params(self) -> dict:
        return {"tokens": self.tokens, "decode_tokens": self.decode_tokens}

    def parts(self, model) -> list[TextCost]:
        return [with_decode_tokens(self, model)]

    def amounts(self, item: Item, chunk_tokens: int) -> dict[str, float]:
        return {"read": len(item.context) - self.decode_tokens, "decode": self.decode_tokens}

    def items(self, model, data, seed: int) -> list[Item]:
        check_driver(self.driver, model.model.device)
        [document] = data.documents(model.tokenizer, 1, self.tokens)
        return [Item(document.id, np.asarray(document.ids))]

    def measure(self, runner: Runner, item: Item) -> Iterator[Measurement]:
        ids = runner.on_device(item.context)
        device, split = ids.device, max(1, len(ids) - self.decode_tokens)
        runner.start()
        fresh_peak(device)
        done = prefill(runner.loaded.model, ids[None, :split], runner.cache,
                       chunk_tokens=runner.chunk_tokens, driver=self.prefill_driver)
        took = done.seconds
        if done.replayed:
            yield Measurement("prefill_replayed_chunks", done.replayed, "chunks", "higher")
        yield Measurement("prefill_seconds", took, "s", "lower", count=split)
        yield Measurement("prefill_tokens_per_second", split / took, "tokens/s", "higher",
                          count=split)
        if self.decode_tokens:
            rate, count = decode_rate(runner, ids[split:], self.driver)
            yield Measurement("decode_tokens_per_second", rate, "tokens/s", "higher", count=count)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            yield Measurement("peak_device_bytes", peak, "B", "lower", count=len(ids))
        runner.finish()
        if self.account:
            yield from memory(runner)


def decode_rate(runner: Runner, ids: torch.Tensor, driver: Driver) -> tuple[float, int]:
    """Tokens a second over the `ids` [T] that were timed, and their number."""
    decoder = Decoder(runner.loaded.model, runner.cache, driver=driver)
    timed = ids[1:] if len(ids) > 1 else ids
    if len(timed) < len(ids):
        decoder.step(ids[:1])
    took, _ = seconds(ids.device, lambda: [decoder.step(token[None]) for token in timed])
    return len(timed) / took, len(timed)
