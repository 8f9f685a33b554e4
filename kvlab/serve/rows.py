"""One forward of the model over sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import SeqId
from kvlab.model import PagedCache, run_chunk


@torch.inference_mode()
def forward_rows(
    model, cache: PagedCache, seqs: list[SeqId], ids: list[list[int]]
) -> Tensor:
    """Logits [B, V] after the last of `ids[i]`, which continue sequence `seqs[i]`.

    All rows get equally many tokens; their pasts may differ in length. Raises `OutOfBlocks` before
    anything has changed.
    """
    cache.rows = seqs
    tokens = torch.tensor(ids, device=model.device)
    return run_chunk(model, tokens, cache, last=True)[:, -1]
