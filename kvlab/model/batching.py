"""The library's own continuous batching on the same requests, to measure beside."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig

from kvlab.core import KvlabError

try:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints
except ImportError:
    ContinuousBatchingConfig = WorkloadHints = None


class Batched(NamedTuple):
    """What the library made of requests that all came at once.

    token_ms: of each request, when each of its tokens was there, counted from the call that added
    all of them. seconds: until the last one. ready_seconds: before, for its cache and its graphs.
    """

    outputs: list[list[int]]
    token_ms: list[tuple[float, ...]]
    seconds: float
    ready_seconds: float


def continuous_batching(
    model, prompts: Sequence[Sequence[int]], output_tokens: int, running: int, attention: str,
    most_seconds: float = 600.0, **settings,
) -> Batched:
    """`model.generate_batch` taken apart, so that what it does before its first step is not timed.

    attention: "sdpa", "flash_attention_2", ...: its paged form. running: requests at a time.
    most_seconds: then it is stopped, which is an error.
    settings: further ones of the library's `ContinuousBatchingConfig`. Raises ImportError where
    this version, or the attention, is missing, and `KvlabError` where it gives up.
    """
    if ContinuousBatchingConfig is None:
        raise ImportError("this version of transformers has no continuous batching of this kind")
    before = model.config._attn_implementation
    model.set_attn_implementation(f"paged|{attention}")
    began = time.perf_counter()
    how = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1,
                           pad_token_id=0)  # fmt: skip
    batching = model.continuous_batching_context_manager
    config = ContinuousBatchingConfig(max_requests_per_batch=running, **settings)
    try:
        # its buffers are written to from a thread of its own, outside of this mode
        with torch.inference_mode(False), torch.no_grad(), batching(
            generation_config=how, continuous_batching_config=config, timeout=5,
            workload_hints=WorkloadHints(max(map(len, prompts)), output_tokens, len(prompts)),
        ) as manager:
            ready = time.perf_counter()
            ids = manager.add_requests(inputs=[list(map(int, p)) for p in prompts],
                                       max_new_tokens=output_tokens, record_timestamps=True)
            found = _results(manager, len(ids), ready + most_seconds)
    finally:
        model.set_attn_implementation(before)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    done = [found[i] for i in ids]
    times = [tuple(1e3 * (t - ready) for t in one.timestamps) for one in done]
    last = max(t[-1] for t in times) / 1e3
    return Batched([list(one.generated_tokens) for one in done], times, last, ready - began)


def _results(manager, count: int, until: float) -> dict:
    found: dict = {}
    while len(found) < count:
        if time.perf_counter() > until:
            manager.stop(block=True, timeout=5, hard_stop=True)
            raise KvlabError(f"the library had done {len(found)} of {count} requests in time")
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise KvlabError(f"the library's loop ended after {len(found)} of {count} requests")
        elif result.is_finished():
            if result.error is not None:
                raise KvlabError(f"the library gave a request up: {result.error}")
            found[result.request_id] = result
    return found
