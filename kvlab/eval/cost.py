"""What a cache costs: seconds of prefill, decoded tokens a second, peak bytes of the device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from kvlab.core import Measurement
from kvlab.eval.base import Runner
from kvlab.model.decode import Decoder, Driver
from kvlab.model.load import LoadedModel
from kvlab.model.prefill import prefill


def cost(
    loaded: LoadedModel, ids: torch.Tensor, runner: Runner, chunk_tokens: int, decode_tokens: int,
    driver: Driver = "auto",
) -> Iterator[Measurement]:
    """One document, `ids` [T], through this cache alone: chunked prefill, then decode.

    The last `decode_tokens` tokens are fed one at a time through the decode driver; the first of
    them, which compiles and captures, is not timed if there is another. Wall time with the device
    synchronized.
    """
    device = ids.device
    split = max(1, len(ids) - decode_tokens)
    runner.start(loaded)
    _sync(device, reset=True)
    done = prefill(loaded.model, ids[None, :split], runner.cache, chunk_tokens=chunk_tokens)
    _sync(device)
    yield Measurement("prefill_seconds", done.seconds, "s", "lower", count=split)
    rate = split / done.seconds
    yield Measurement("prefill_tokens_per_second", rate, "tokens/s", "higher", count=split)
    if decode_tokens:
        rate, count = decode_rate(loaded, ids[split:], runner, driver)
        yield Measurement("decode_tokens_per_second", rate, "tokens/s", "higher", count=count)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        yield Measurement("peak_device_bytes", peak, "B", "lower", count=len(ids))
    runner.finish()


def decode_rate(
    loaded: LoadedModel, ids: torch.Tensor, runner: Runner, driver: Driver
) -> tuple[float, int]:
    """Tokens a second over the `ids` [T] that were timed, and their number."""
    decoder = Decoder(loaded.model, runner.cache, driver=driver)
    timed = ids[1:] if len(ids) > 1 else ids
    if len(timed) < len(ids):
        decoder.step(ids[:1])
    _sync(ids.device)
    started = time.perf_counter()
    for token in timed:
        decoder.step(token[None])
    _sync(ids.device)
    return len(timed) / (time.perf_counter() - started), len(timed)


def _sync(device: torch.device, reset: bool = False) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
