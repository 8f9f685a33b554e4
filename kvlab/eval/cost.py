"""What a cache costs: seconds of prefill, decoded tokens a second, peak bytes of the device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from kvlab.core import Measurement
from kvlab.eval.base import Runner
from kvlab.model.load import LoadedModel
from kvlab.model.prefill import forward_chunk, prefill


def cost(
    loaded: LoadedModel, ids: torch.Tensor, runner: Runner, chunk_tokens: int, decode_tokens: int
) -> Iterator[Measurement]:
    """One document, `ids` [T], through this cache alone: chunked prefill, then greedy decode.

    The last `decode_tokens` tokens are fed one at a time. Wall time with the device synchronized;
    through the model's eager forward, the same for every variant.
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
        started = time.perf_counter()
        for token in ids[split:]:
            forward_chunk(loaded.model, token[None, None], runner.cache, last=True)
        _sync(device)
        rate = decode_tokens / (time.perf_counter() - started)
        yield Measurement(
            "decode_tokens_per_second", rate, "tokens/s", "higher", count=decode_tokens
        )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        yield Measurement("peak_device_bytes", peak, "B", "lower", count=len(ids))
    runner.finish()


def _sync(device: torch.device, reset: bool = False) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
