"""One forward over prompts of unlike lengths, their tokens one behind the other: no padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvlab.core import SeqId
from kvlab.model.adapter import PagedCache
from kvlab.model.fuse import Fusing
from kvlab.model.library import cache_parameter
from kvlab.model.step import StepCache
from kvlab.model.visibility import KeyColumns
from kvlab.source import sent


class Packing(StepCache):
    """The model's view of a `PagedCache` in a forward of one row that holds many sequences."""

    def get_mask_sizes(self, query_length: int, *args) -> tuple[int, int]:
        return KeyColumns(query_length), 0  # nothing is built: each sequence sees its own past

    def past(self, scale: float) -> None:
        """No launch over all layers reads this."""


class Packed:
    """Feeds chunks of several prompts to `model` at a time, into sequences of `cache`."""

    def __init__(self, model, cache: PagedCache):
        self.model, self.core, self.cache = model, cache.core, Packing(cache)
        self.fusing = Fusing(model)

    @torch.inference_mode()
    def forward(self, seqs: list[SeqId], ids: list[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the last of `ids[i]`, which continue sequence `seqs[i]`.

        Raises `OutOfBlocks` before anything has changed, but for evictions.
        """
        core = self.core
        core.lineage.glance()
        order = sorted(range(len(seqs)), key=lambda i: not core.requests.length(seqs[i]))
        seqs, ids = [seqs[i] for i in order], [ids[i] for i in order]  # without a past: last
        counts, past = [len(new) for new in ids], [core.requests.length(seq) for seq in seqs]
        if core.spec.prefix.shares:
            for seq, new in zip(seqs, ids):
                core.requests.tell(seq, new)
        running = core.begin(seqs, counts)
        running.packed = True
        try:
            logits = self._forward(ids, past, counts)
        except BaseException:
            core.abort()
            raise
        core.commit()
        return logits if order == sorted(order) else logits[torch.from_numpy(np.argsort(order))]

    def _forward(self, ids: list[Sequence[int]], past: list[int], counts: list[int]) -> Tensor:
        positions = [np.arange(at, at + n) for at, n in zip(past, counts)]
        host = np.concatenate([*ids, *positions, np.cumsum(counts) - 1]).astype(np.int64)
        told = sent(host, self.model.device)
        tokens, places, last = told.split([sum(counts), sum(counts), len(counts)])
        given = {cache_parameter(self.model): self.cache}
        with self.fusing.on():
            logits = self.model(
                input_ids=tokens[None], position_ids=places[None], use_cache=True,
                logits_to_keep=last, **given,
            ).logits[0]
        self.cache.check_served()
        return logits
