"""One forward of the model over sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import SeqId
from kvlab.model import PagedCache


@torch.inference_mode()
def forward_rows(
    model, cache: PagedCache, seqs: list[SeqId], ids: list[list[int]]
) -> Tensor:
    """Logits [B, V] after the last of `ids[i]`, which continue sequence `seqs[i]`.

    All rows get equally many tokens; their pasts may differ in length. Raises `OutOfBlocks` before
    anything has changed.
    """
    lengths = [cache.length(seq) for seq in seqs]
    tokens = torch.tensor(ids, device=model.device)
    positions = torch.tensor(lengths, device=model.device)[:, None]
    positions = positions + torch.arange(tokens.shape[1], device=model.device)
    cache.rows, cache.seen = list(seqs), max(lengths)
    return model(
        input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
