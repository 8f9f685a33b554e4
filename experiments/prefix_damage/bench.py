"""What a lossy cache made for request A costs request B, with the sharing rule and without:
`job=prefix_damage`.

Request A reads a document while somebody else holds most blocks, so half of it is evicted.
Then there is room, and request B reads two thirds of the same document and 64 tokens of its own:
alone, it would lose nothing. A CPU is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch

from kvlab.blocks import HashSharing, Shared
from kvlab.core import Measurement
from kvlab.eval.sweep import Point, Sweep
from kvlab.model import PagedCache, prefill
from kvlab.model.prefill import forward_chunk
from kvlab.window import SinkWindow

SIZE, NEW, CHUNK = 16, 64, 256


class PrefixDamage(Sweep):
    """Policies x documents, each with the rule that only blocks without a hole before them are
    shared, and without.

    model, data: a loader, a source of documents. tokens: of request A.
    """

    own_list = "prefix_damage takes its policies from job.policies"

    def __init__(
        self, model, data, tokens: int = 3072, documents: int = 3,
        policies: Sequence[str] = ("fifo", "lru"), device: str = "auto",
    ):
        self.model, self.data, self.tokens = model, data, tokens
        self.documents, self.policies, self.device = documents, list(policies), device

    def points(self, device: torch.device, variants) -> Iterator[Point]:
        loaded = self.model.load(device)
        found = self.data.documents(loaded.tokenizer, self.documents, self.tokens)
        for policy in self.policies:
            for index, document in enumerate(found):
                a, b = requests(found, index, self.tokens)
                for rule in (True, False):
                    params = {"policy": policy, "document": document.id, "tokens": self.tokens,
                              "rule": rule, **loaded.about()}  # fmt: skip
                    yield Point(f"{policy} {'with' if rule else 'without'} the rule", params,
                                partial(self._judged, loaded.model, a, b, policy, rule))

    def _judged(self, model, a, b, policy: str, rule: bool) -> Iterator[Measurement]:
        off = mock.patch.object(Shared, "_note_clean", careless)
        with nullcontext() if rule else off:
            yield from measure(model, a.to(model.device), b.to(model.device), policy)


def careless(self, claim, e) -> None:
    """No rule: whatever was computed may be shared."""
    claim.clean = e.past + e.count


def answer(model, cache, ids) -> torch.Tensor:
    """Log-probabilities [NEW, V] of B's own tokens."""
    prefill(model, ids[None, :-NEW], cache, chunk_tokens=CHUNK)
    logits = forward_chunk(model, ids[None, -NEW:], cache)[0]
    cache.finish()
    return logits.float().log_softmax(-1)


def requests(documents, index: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A: a whole document; B: two thirds of it, then the beginning of another."""
    texts = [torch.as_tensor(d.ids).long() for d in documents]
    head = texts[index][: 2 * tokens // 3 // SIZE * SIZE]
    return texts[index], torch.cat([head, texts[(index + 1) % len(texts)][:NEW]])


def measure(model, a, b, policy: str) -> Iterator[Measurement]:
    """KL of the own tokens of B, and what B found."""
    axes = {"format": "fp32", "block_size": SIZE}
    full = answer(model, PagedCache.for_model(model, **axes), b)
    blocks = len(a) // SIZE
    cache = PagedCache.for_model(
        model, **axes, policy=policy, budget_blocks=2 * blocks, window=SinkWindow(SIZE, 4 * SIZE),
        prefix=HashSharing(hold=False),
    )
    shape = 1, 3 * blocks // 2 * SIZE
    other = torch.randint(model.config.vocab_size, shape, device=model.device)
    prefill(model, other, cache, chunk_tokens=CHUNK)
    handle = cache.cache_prefix(other[0].tolist())  # somebody else: half of a document is left
    cache.finish()
    prefill(model, a[None], cache, chunk_tokens=CHUNK)
    cache.finish()
    cache.release_prefix(handle)
    got = answer(model, cache, b)
    kl = (full.exp() * (full - got)).sum(-1)
    found, stats = cache.audit()[-1], cache.stats()
    yield Measurement("kl_mean_nats", float(kl.mean()), "nats", "lower", count=NEW)
    yield Measurement("kl_max_nats", float(kl.max()), "nats", "lower", count=NEW)
    for name, value in (("prompt_blocks", len(found["codes"])), ("blocks_hit", found["hit"]),
                        ("blocks_behind_gap", found["behind_gap"]),
                        ("evictions", stats.evictions)):  # fmt: skip
        yield Measurement(name, value, "blocks")
