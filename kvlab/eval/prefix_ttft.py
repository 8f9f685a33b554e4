"""Time to the first token behind a known prefix, from each tier, against a cold prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.core import BadInput, Measurement, Variant
from kvlab.model import model_geometry
from kvlab.model.adapter import PagedCache
from kvlab.model.device import prepare_device
from kvlab.model.fuse import fused
from kvlab.model.load import LoadedModel
from kvlab.model.prefill import prefill


class PrefixTTFT:
    """A long shared prefix, then requests with a few tokens of their own.

    model: a loader; weights may be random, so may the tokens be: they are.
    prefix_tokens, new_tokens: of the shared beginning, and of each request behind it.
    repeats: requests from each tier after one that warms up; the median counts, and from six on
        the fastest and the slowest bound it at 95 %.
    chunk_tokens: of a prefill chunk, as in `prefill`.
    device, cap_gb, seed: as in `Evaluate`.

    The clock runs from the prompt's ids to its first token on the host: finding the prefix, moving
    it where it lies in host memory, computing the rest. Tier `host` needs a variant with an
    offload. Variants must share prefixes.
    """

    wants_specs = True

    def __init__(
        self, model, prefix_tokens: int = 200_000, new_tokens: int = 512, repeats: int = 6,
        chunk_tokens: int | str = 8192, device: str = "auto", cap_gb: float | None = None,
        seed: int = 0,
    ):
        for name, value in (("prefix_tokens", prefix_tokens), ("new_tokens", new_tokens),
                            ("repeats", repeats)):
            if value < 1:
                raise BadInput(name, value, "must be at least 1")
        self.model, self.prefix_tokens, self.new_tokens = model, prefix_tokens, new_tokens
        self.repeats, self.chunk_tokens = repeats, chunk_tokens
        self.device, self.cap_gb, self.seed = device, cap_gb, seed

    def run(self, folder, variants: list[Variant]) -> None:
        """Measure whatever `folder` does not hold yet."""
        for variant in variants:
            if not variant.spec.prefix.shares:
                raise BadInput("prefix", variant.spec.prefix.name, "shares nothing; prefix=hash")
        device = prepare_device(self.device, self.cap_gb)
        loaded = self.model.load(device)
        for variant in variants:
            variant.spec.checked_for(model_geometry(loaded.model, variant.spec))
        for variant in variants:
            params = variant.params | {
                **loaded.about(), "device": str(device),
                "prefix_tokens": self.prefix_tokens, "new_tokens": self.new_tokens,
                "chunk_tokens": self.chunk_tokens, "block_size": variant.spec.block_size,
            }
            last = params | {"tier": "cold"}
            if not folder.done(variant.name, last):
                # few queries: what a kernel costs to launch counts
                with folder.surviving(variant.name, last), fused(loaded.model):
                    self._variant(folder, variant, params, loaded)

    def _variant(self, folder, variant: Variant, params: dict, loaded: LoadedModel) -> None:
        cache = PagedCache.for_model(loaded.model, variant.spec)
        prompts = self._prompts(loaded)
        cold = self._request(loaded, cache, next(prompts), 0)
        rate = cache.audit()[-1]["flops"] / cold[0]
        tiers = {"device": lambda: None}
        if variant.spec.offload.keeps:
            tiers["host"] = cache.spill_prefixes
        for tier, prepare in tiers.items():
            rows = list(self._warm(loaded, cache, prompts, prepare, cold, rate))
            folder.add(variant.name, params | {"tier": tier}, rows)
        first = Measurement("ttft_cold_ms", 1e3 * cold[0], "ms", "lower", count=1)
        folder.add(variant.name, params | {"tier": "cold"}, [first])
        cache.reset()

    def _prompts(self, loaded: LoadedModel) -> Iterator[Tensor]:
        """The same prefix, then tokens that no other request has; [1, T] on the host."""
        random = torch.Generator().manual_seed(self.seed)
        vocabulary = loaded.model.config.vocab_size
        prefix = torch.randint(vocabulary, (1, self.prefix_tokens), generator=random)
        self._first = torch.cat(
            [prefix, torch.randint(vocabulary, (1, self.new_tokens), generator=random)], 1)
        yield self._first
        while True:
            own = torch.randint(vocabulary, (1, self.new_tokens), generator=random)
            yield torch.cat([prefix, own], 1)

    def _request(
        self, loaded: LoadedModel, cache: PagedCache, ids: Tensor, cached: int
    ) -> tuple[float, Tensor]:
        """Seconds to the first token, and the logits [V] that it came from."""
        device = loaded.model.device
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = prefill(loaded.model, ids.to(device), cache, chunk_tokens=self.chunk_tokens)
        result.logits.argmax(-1).item()
        seconds = time.perf_counter() - started
        if result.cached < cached:
            raise BadInput("cache.budget_blocks", cache.spec.budget_blocks, f"only {result.cached} "
                           f"of {cached} tokens of the prefix were kept; give more room")
        cache.finish()
        return seconds, result.logits[0].float()

    def _warm(self, loaded, cache, prompts, prepare, cold, rate) -> Iterator[Measurement]:
        whole = self.prefix_tokens // cache.geometry.block_size * cache.geometry.block_size
        prepare()
        again = self._request(loaded, cache, self._first, whole)  # the cold one's own prompt
        seconds = []
        for _ in range(self.repeats):
            prepare()
            seconds.append(self._request(loaded, cache, next(prompts), whole)[0])
        audit = cache.audits[max(cache.audits)].row(flops_per_second=rate)
        count, ms = self.repeats, [1e3 * s for s in seconds]
        yield Measurement("ttft_ms", median(ms), "ms", "lower", min(ms), max(ms), count)
        yield Measurement("ttft_speedup", cold[0] / median(seconds), "x", "higher", count=count)
        for name, unit in (("flops_saved_percent", "%"), ("ms_saved", "ms")):
            yield Measurement(name, audit[name], unit, "higher")
        for name in ("bytes_loaded", "host_bytes_loaded"):
            yield Measurement(name, audit[name], "B")
        kl = F.kl_div(again[1].log_softmax(-1), cold[1].log_softmax(-1), log_target=True,
                      reduction="sum")
        yield Measurement("kl_mean_nats", float(kl), "nats", "lower", count=1)
