"""A model of lm-evaluation-harness over any composed cache (pip extra `lm-eval`).

    from kvlab.eval.harness import KvlabLM
    lm_eval.simple_evaluate(KvlabLM(loaded, CacheSpec(format="int4")), tasks=["arc_easy"])

`job=lm_eval` does so for every variant of a run. Requests are read, truncated and encoded by the
harness's own Hugging Face class, which this one is; what differs is where keys and values lie. A
context goes through the cache in prefill chunks, so that all that the axes do to it happens; then
come the tokens to be judged, or those that are generated. The question is part of the context, as
the harness gives it: a policy that looks at the last queries sees it (`query_aware`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.model import (
    LoadedModel,
    PagedCache,
    cache_parameter,
    forward_chunk,
    model_geometry,
)

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise BadInput("job", "lm_eval", f"needs lm-evaluation-harness, which cannot be imported "
                   f"({error}): pip install 'kvlab[lm-eval]'") from error


class KvlabLM(HFLM):
    """spec: of the caches, one for each batch. chunk_tokens: of a prefill chunk.

    batch_size: requests at a time; one where the cache has a budget, which rows of a batch would
    share. Raises `BadInput` for a cache that does not fit the model.
    """

    def __init__(
        self, loaded: LoadedModel, spec: CacheSpec | None = None, chunk_tokens: int = 512,
        batch_size: int = 8, max_length: int | None = None,
    ):
        if chunk_tokens < 1 or batch_size < 1:
            raise BadInput("batch_size", min(chunk_tokens, batch_size), "must be at least 1")
        self.spec, self.chunk_tokens, self.loaded = spec or CacheSpec(), chunk_tokens, loaded
        self.spec.checked_for(model_geometry(loaded.model, self.spec))
        super().__init__(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=max_length,
            batch_size=1 if self.spec.bounded else batch_size,
        )

    # -- what the harness calls

    def _loglikelihood_tokens(
        self, requests: Sequence, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation behind its context, and whether it is the likeliest one;
        requests: (texts, context ids, continuation ids)."""
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1] + requests[n][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            pairs = [requests[n][1:] for n in batch]
            for n, told in zip(batch, self._judged(pairs)):
                found[n] = told
                if requests[n][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], told)
        return [found[n] for n in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **given):
        """The library's own `generate()`, behind a context that the cache holds but for a token."""
        cache, mask = self._cache(), given["attention_mask"]
        for ids, seen in self._chunks(context[:, :-1], mask[:, :-1]):
            forward_chunk(self.model, ids, cache, mask=seen, last=True)
        try:
            given[cache_parameter(self.model)] = cache
            return super()._model_generate(context, max_length, stop, **given)
        finally:
            cache.reset()

    def _model_call(self, inps, *args, **kwargs):
        raise BadInput("lm_eval", "_model_call", "is not how KvlabLM computes: it would go past "
                       "the cache")

    # -- a batch

    @torch.inference_mode()
    def _judged(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As the harness cuts: the last `max_length` + 1 tokens, of which the last one only is a
        target. Contexts are padded on the left, continuations on the right."""
        rows = [((a + b)[-(self.max_length + 1) :][:-1], b) for a, b in pairs]
        counts = [min(len(ids), len(target)) for ids, target in rows]  # inputs that predict
        cache = self._cache()
        contexts = [ids[: len(ids) - n] for (ids, _), n in zip(rows, counts)]
        for ids, mask in self._chunks(*padded(contexts, left=True)):
            forward_chunk(self.model, ids, cache, mask=mask, last=True)
        tails = padded([ids[len(ids) - n :] for (ids, _), n in zip(rows, counts)], left=False)
        targets = padded([target[-n:] for (_, target), n in zip(rows, counts)], left=False)
        nats, right = torch.zeros(len(rows)), torch.ones(len(rows), dtype=torch.bool)
        for (ids, mask), (wanted, _) in zip(self._chunks(*tails), self._chunks(*targets)):
            told = forward_chunk(self.model, ids, cache, mask=mask).float().log_softmax(-1)
            own = told.gather(-1, wanted[..., None])[..., 0].where(mask.bool(), 0)
            nats += own.sum(1).cpu()
            right &= ((told.argmax(-1) == wanted) | ~mask.bool()).all(1).cpu()
        cache.reset()
        return list(zip(nats.tolist(), right.tolist()))

    def _chunks(self, ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of [B, T] each; columns in which all rows have padding come with the first token."""
        for start in range(0, ids.shape[1], self.chunk_tokens):
            span = slice(start, start + self.chunk_tokens)
            yield ids[:, span].to(self.device), mask[:, span].to(self.device)

    def _cache(self) -> PagedCache:
        return PagedCache.for_model(self.model, self.spec, tokenizer=self.tokenizer)


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], 0 where a row has no token."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for n, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, place], mask[n, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask.long()
