"""Time to the first token behind a known prefix, from each tier, against a cold prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.core import BadInput, Measurement, Variant
from kvlab.eval.clock import seconds
from kvlab.eval.sweep import Point, Sweep, at_least, check_variants
from kvlab.model import LoadedModel, PagedCache, prefill
from kvlab.model.fuse import fused


@dataclass
class PrefixTTFT(Sweep):
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

    model: object
    prefix_tokens: int = 200_000
    new_tokens: int = 512
    repeats: int = 6
    chunk_tokens: int | str = 8192
    device: str = "auto"
    cap_gb: float | None = None
    seed: int = 0

    wants_specs = True

    def __post_init__(self):
        at_least(1, prefix_tokens=self.prefix_tokens, new_tokens=self.new_tokens,
                 repeats=self.repeats)

    def points(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[Point]:
        for variant in variants:
            if not variant.spec.prefix.shares:
                raise BadInput("prefix", variant.spec.prefix.name, "shares nothing; prefix=hash")
        loaded = self.model.load(device)
        check_variants(loaded, variants)
        for name, params, spec in variants:
            about = params | {
                **loaded.about(), "device": str(device), "prefix_tokens": self.prefix_tokens,
                "new_tokens": self.new_tokens, "chunk_tokens": self.chunk_tokens,
                "block_size": spec.block_size,
            }
            requests = Requests(self, loaded, spec)
            tiers = ("device", "host", "cold") if spec.offload.keeps else ("device", "cold")
            for tier in tiers:
                yield Point(name, about | {"tier": tier}, partial(requests.rows, tier))


class Requests:
    """One cache and what is asked of it: the cold request when the first rows are wanted."""

    def __init__(self, job: PrefixTTFT, loaded: LoadedModel, spec):
        self.job, self.loaded, self.spec = job, loaded, spec
        self.rate: float | None = None  # FLOPs a second of the cold request

    def rows(self, tier: str) -> Iterator[Measurement]:
        with fused(self.loaded.model):  # few queries: what a kernel costs to launch counts
            if self.rate is None:
                self.cache = PagedCache.for_model(self.loaded.model, self.spec)
                self.prompts = self._prompts()
                self.cold, self.logits = self._ask(next(self.prompts), 0)
                self.rate = self.cache.audit()[-1]["flops"] / self.cold
            if tier == "cold":
                yield Measurement("ttft_cold_ms", 1e3 * self.cold, "ms", "lower", count=1)
                self.cache.reset()
            else:
                yield from self._warm(tier)

    def _prompts(self) -> Iterator[Tensor]:
        """The same prefix, then tokens that no other request has; [1, T] on the host."""
        random = torch.Generator().manual_seed(self.job.seed)
        draw = partial(torch.randint, self.loaded.model.config.vocab_size, generator=random)
        prefix = draw((1, self.job.prefix_tokens))
        self.first = torch.cat([prefix, draw((1, self.job.new_tokens))], 1)
        yield self.first
        while True:
            yield torch.cat([prefix, draw((1, self.job.new_tokens))], 1)

    def _ask(self, ids: Tensor, cached: int) -> tuple[float, Tensor]:
        """Seconds to the first token, and the logits [V] that it came from."""
        cache, model = self.cache, self.loaded.model

        def ask():
            result = prefill(model, ids.to(model.device), cache,
                             chunk_tokens=self.job.chunk_tokens)
            result.logits.argmax(-1).item()
            return result

        took, result = seconds(model.device, ask)
        if result.cached < cached:
            raise BadInput("cache.budget_blocks", self.spec.budget_blocks, f"only {result.cached} "
                           f"of {cached} tokens of the prefix were kept; give more room")
        cache.finish()
        return took, result.logits[0].float()

    def _warm(self, tier: str) -> Iterator[Measurement]:
        cache, size = self.cache, self.cache.geometry.block_size
        whole = self.job.prefix_tokens // size * size
        prepare = cache.spill_prefixes if tier == "host" else lambda: None
        prepare()
        again = self._ask(self.first, whole)[1]  # the cold one's own prompt
        ms = []
        for _ in range(self.job.repeats):
            prepare()
            ms.append(1e3 * self._ask(next(self.prompts), whole)[0])
        audit, count = cache.audits[max(cache.audits)].row(flops_per_second=self.rate), len(ms)
        yield Measurement("ttft_ms", median(ms), "ms", "lower", min(ms), max(ms), count)
        speedup = 1e3 * self.cold / median(ms)
        yield Measurement("ttft_speedup", speedup, "x", "higher", count=count)
        for name, unit, better in (("flops_saved_percent", "%", "higher"),
                                   ("ms_saved", "ms", "higher"), ("bytes_loaded", "B", None),
                                   ("host_bytes_loaded", "B", None)):
            yield Measurement(name, audit[name], unit, better)
        kl = F.kl_div(again.log_softmax(-1), self.logits.log_softmax(-1), log_target=True,
                      reduction="sum")
        yield Measurement("kl_mean_nats", float(kl), "nats", "lower", count=1)
