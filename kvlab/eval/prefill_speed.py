"""How fast prompts are computed into each cache, beside the library's own, and with what memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.core import BadInput, Measurement, Variant
from kvlab.model import model_geometry
from kvlab.model.adapter import PagedCache
from kvlab.model.device import prepare_device
from kvlab.model.fuse import fused
from kvlab.model.peers import dynamic_prefill
from kvlab.model.prefill import prefill
from kvlab.model.room import activation_bytes, standing_bytes, weight_bytes

PEERS = {"dynamic whole": None, "dynamic chunked": True}  # whether in chunks


class PrefillSpeed:
    """Seconds and peak bytes of one random prompt per context, through every cache in turn.

    model: a loader; weights may be random.
    contexts: tokens of the prompts. chunk_tokens: of a chunk, for the variants and peers alike.
    peers: `dynamic whole` and `dynamic chunked`, transformers' DynamicCache with its SDPA.
    device, cap_gb, seed: as in `Evaluate`.

    RMSNorms are fused for all of them alike. The account names what the peak consists of: weights,
    what stood before (`standing_bytes`), the cache where it was largest, workspace and one chunk's
    activations (`activation_bytes`).
    """

    wants_specs = True

    def __init__(
        self, model, contexts: list[int], chunk_tokens: int = 4096, peers: list[str] = (),
        device: str = "auto", cap_gb: float | None = None, seed: int = 0,
    ):
        if not contexts or min(contexts) < 1:
            raise BadInput("contexts", contexts, "must name positive numbers of tokens")
        if chunk_tokens < 1:
            raise BadInput("chunk_tokens", chunk_tokens, "must be at least 1")
        for peer in peers:
            if peer not in PEERS:
                raise BadInput("peers", peer, f"known: {', '.join(PEERS)}")
        self.model, self.contexts, self.chunk_tokens = model, contexts, chunk_tokens
        self.peers, self.device, self.cap_gb, self.seed = list(peers), device, cap_gb, seed

    @torch.inference_mode()
    def run(self, folder, variants: list[Variant]) -> None:
        """Measure whatever `folder` does not hold yet."""
        device = prepare_device(self.device, self.cap_gb)
        loaded = self.model.load(device)
        for variant in variants:
            variant.spec.checked_for(model_geometry(loaded.model, variant.spec))
        source = torch.Generator(device).manual_seed(self.seed)
        vocabulary = len(loaded.tokenizer)
        ids = torch.randint(vocabulary, (1, max(self.contexts)), generator=source, device=device)
        shared = {**loaded.about(), "chunk_tokens": self.chunk_tokens}
        with fused(loaded.model):
            for variant in variants:
                params = shared | variant.params | {"block_size": variant.spec.block_size}
                call = partial(self._ours, loaded.model, variant.spec)
                self._measure(folder, variant.name, params, call, loaded.model, ids)
            for name in self.peers:
                chunk = self.chunk_tokens if PEERS[name] else None
                call = partial(dynamic_prefill, loaded.model, chunk)
                params = shared | {"peer": name, "format": "bf16"}
                self._measure(folder, name, params, call, loaded.model, ids)

    def _ours(self, model, spec, ids: Tensor) -> PagedCache:
        cache = PagedCache.for_model(model, spec)
        prefill(model, ids, cache, chunk_tokens=self.chunk_tokens)
        return cache

    def _measure(self, folder, name, params, call: Callable, model, ids: Tensor) -> None:
        todo = [n for n in self.contexts if not folder.done(name, params | {"tokens": n})]
        warm = False
        for tokens in todo:
            with folder.surviving(name, params | {"tokens": tokens}):
                if not warm:  # compiles kernels, plans attention
                    call(ids[:, : 2 * self.chunk_tokens + 100])
                    warm = True
                try:
                    rows = list(self._rows(call, model, ids[:, :tokens]))
                except torch.cuda.OutOfMemoryError:
                    print(f"{name}, {tokens} tokens: does not fit, left out", flush=True)
                    continue
                folder.add(name, params | {"tokens": tokens}, rows)

    def _rows(self, call: Callable, model, ids: Tensor) -> Iterator[Measurement]:
        cuda, tokens = ids.is_cuda, ids.shape[1]
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        standing = standing_bytes(model, ids.device)
        started = time.perf_counter()
        cache = call(ids)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        yield Measurement("prefill_seconds", seconds, "s", "lower", count=tokens)
        yield Measurement("prefill_tokens_per_second", tokens / seconds, "tokens/s", "higher",
                          count=tokens)
        if isinstance(cache, PagedCache):
            yield from account(cache, model, standing, min(self.chunk_tokens, tokens))
        if cuda:
            yield Measurement("peak_device_bytes", torch.cuda.max_memory_allocated(), "B", "lower")


def account(
    cache: PagedCache, model, standing: int, chunk_tokens: int
) -> Iterator[Measurement]:
    """What the device holds at the peak, line by line, and the sum of the lines.

    standing: `standing_bytes` before there was the cache.
    """
    stats = cache.stats()
    yield Measurement("cache_allocated_bytes", stats.allocated_bytes, "B", "lower")
    lines = {
        "weights_bytes": weight_bytes(model),
        "standing_bytes": standing,
        "cache_peak_bytes": stats.peak_allocated_bytes,
        "workspace_bytes": stats.workspace_bytes,
        "activation_bytes": activation_bytes(model.config) * chunk_tokens,
    }
    for name, value in lines.items():
        yield Measurement(name, value, "B", "lower")
    yield Measurement("accounted_bytes", sum(lines.values()), "B")

