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
from kvlab.model.progress import shown

SMALLEST, LARGEST = 512, 16384  # tokens: what `adaptive` chooses between


class PrefillResult(NamedTuple):
    """`logits` [B, V] of the last token computed (None if there was none), and how far it went.

    tokens: of `input_ids`, those that are in the cache now; cached: of them, those that were there
    before (a known prefix).
    """

    logits: Tensor | None
    tokens: int
    seconds: float
    stopped: bool
    cached: int = 0


def prefill(
    model, input_ids: Tensor, cache: PagedCache, *, chunk_tokens: int | str = 2048,
    progress: bool | Callable[[int, int], None] = False,
    should_stop: Callable[[], bool] | None = None,
) -> PrefillResult:
    """Run `input_ids` [B, T] (no padding) through `model` into `cache`, chunk by chunk.

    chunk_tokens: tokens of a chunk, or "adaptive": as many as the free device memory carries.
        With a lossy format the chunk is part of the method: its tokens see each other exactly.
    An empty cache with prefix=hash begins with the prefix it knows; only the rest is computed.
    progress: True shows a bar on a terminal and a line now and then in a log; a function gets
        (tokens done, tokens in all) after every chunk.
    should_stop: asked between chunks. It and Ctrl-C leave a cache that can go on.
    Raises `BadInput` for an impossible chunk, `OutOfBlocks` where the budget is too small.
    """
    total, logits = input_ids.shape[1], None
    size = chunk_size(chunk_tokens, model, cache)
    started, stopped = time.perf_counter(), False
    done = cached = cache.start(input_ids) if cache.spec.prefix.shares else 0
    with _interrupts() as interrupted, shown(progress, total) as show:
        while done < total:
            if interrupted.is_set() or (should_stop is not None and should_stop()):
                stopped = True
                break
            chunk = input_ids[:, done : done + size()]
            logits = forward_chunk(model, chunk, cache, last=True)[:, -1]
            done += chunk.shape[1]
            show(done)
    if logits is not None and logits.is_cuda:
        torch.cuda.synchronize()
    return PrefillResult(logits, done, time.perf_counter() - started, stopped, cached)


@torch.inference_mode()
def forward_chunk(model, ids: Tensor, cache: PagedCache, *, last: bool = False) -> Tensor:
    """Logits [B, T, V] of `ids` [B, T] after what `cache` holds; `last`: of the last token only."""
    if cache.teller is not None:
        cache.teller.before(ids)
    first = cache.get_seq_length()
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    keep = {"logits_to_keep": 1} if last else {}
    return model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **keep
    ).logits


def chunk_size(chunk_tokens: int | str, model, cache: PagedCache) -> Callable[[], int]:
    """How many tokens the next chunk has; asked anew before each. Raises `BadInput`."""
    if chunk_tokens == "adaptive":
        return lambda: adaptive_chunk(model, cache)
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise BadInput("chunk_tokens", chunk_tokens, 'must be at least 1, or "adaptive"')
    return lambda: chunk_tokens


def adaptive_chunk(model, cache: PagedCache) -> int:
    """The largest power of two that fits in three quarters of the memory that is free now.

    With its activations and, where none leave for them, its blocks. The last quarter is for the
    workspace and the allocator's fragments. On the CPU, where a larger chunk wins nothing, it is
    the smallest.
    """
    device, spec = cache.device, cache.spec
    if device.type != "cuda":
        return SMALLEST
    free = torch.cuda.mem_get_info(device)[0]
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = torch.cuda.get_per_process_memory_fraction(device)
    capped = limit * torch.cuda.get_device_properties(device).total_memory
    free = min(free + reserve, int(capped) - torch.cuda.memory_allocated(device))
    stored = spec.format.block_bytes(cache.geometry) // spec.block_size
    tokens, size = free * 3 // 4 // (activation_bytes(model.config) + stored), SMALLEST
    while size * 2 <= min(tokens, LARGEST):
        size *= 2
    return size


def activation_bytes(config) -> int:
    """Bytes that one token of a chunk needs at the widest point of a layer, in bf16 on CUDA.

    Counted from the code that runs. All along there are the embedded prompt, which the model keeps,
    the layer's input and the same normed; the position, cos and sin. Attention is widest where a
    piece is folded into the running sum (`cache/sum.py`): queries, keys, values, the place of the
    result, the piece's result, the sum in fp32, and the lse of both. The MLP is widest where its
    two inner products are multiplied, with a residual of its own.
    Rotating the queries takes less than attention. What does not grow with the chunk is not in
    here: see `standing_bytes`.
    """
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    wide, narrow = heads * dim, config.num_key_value_heads * dim
    along = 2 * 3 * config.hidden_size + 8 + 2 * 2 * dim
    attention = 2 * (3 * wide + 2 * narrow) + 4 * wide + 2 * 4 * heads
    mlp = 2 * (config.hidden_size + 3 * config.intermediate_size)
    return along + max(attention, mlp)


def standing_bytes(model, device: torch.device) -> int:
    """Bytes on `device` besides the weights, asked before there is a cache; 0 without CUDA.

    The prompt's ids, and what libraries keep once they have run: cuBLAS 32 MiB for each stream that
    has multiplied matrices (on Hopper), so three where steps were captured. Anything else in here
    was left behind by what ran before.
    """
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_allocated(device) - weight_bytes(model)


def weight_bytes(model) -> int:
    """Bytes of the parameters; what layers share counts once."""
    return sum(p.nbytes for p in model.parameters())


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
