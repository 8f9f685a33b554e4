"""R-KV: what is looked at and said nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.cache.keys import Whole
from kvlab.cache.scores import logits
from kvlab.core import BadInput, check_number

ROWS = 512  # of the similarities that are made at a time


class RKV(Whole):
    """Attention of the last queries, less how much a key repeats others.

    R-KV (Cai et al. 2025, https://arxiv.org/abs/2505.24133), for long reasoning: importance is the
    attention of the last 8 queries (the largest of a head's group, pooled over 7 tokens by their
    maximum), redundancy the softmax of a key's mean cosine to the others; of the keys that one is
    alike (above `alike`), the newest is spared. Score: mix x importance - (1 - mix) x redundancy.
    Differs: while decoding, the 8 queries are looked at one by one, and the mean of their scores
    stands.
    """

    name = "rkv"
    queries = looks = 8
    decodes = True
    caps = False

    def __init__(self, mix: float = 0.1, alike: float = 0.5, pool: int = 7):
        if not 0 <= mix <= 1 or pool < 1 or pool % 2 == 0:
            raise BadInput("mix", (mix, pool), "must be from 0 to 1, with an odd pool of tokens")
        check_number("observes.alike", alike, -1, 1, whole=False)
        self.mix, self.alike, self.pool = mix, alike, pool

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        last = min(self.queries, q.shape[1])
        at = torch.arange(len(k), device=k.device)
        seen = at <= at[len(k) - last :, None]
        x = logits(q, k, scale, seen, last) - lse[:, -last:, None]
        looked = x.exp().mean(1).unflatten(0, (k.shape[1], -1)).amax(1)
        looked = F.max_pool1d(looked, self.pool, 1, self.pool // 2)
        return self.mix * looked - (1 - self.mix) * self.redundancy(k)

    def redundancy(self, k: Tensor) -> Tensor:
        """How much each of the keys [n, H, D] repeats others: fp32 [H, n], a softmax."""
        x = F.normalize(k.float(), dim=-1).transpose(0, 1)
        at, total = torch.arange(len(k), device=k.device), x.new_zeros(x.shape[:2])
        for first in range(0, len(k), ROWS):
            rows = at[first : first + ROWS]
            alike = x[:, rows] @ x.transpose(1, 2)
            alike = alike.masked_fill(rows[:, None] == at, 0.0)
            newest = torch.where(alike > self.alike, at, 0).amax(-1, keepdim=True)
            total += alike.scatter(-1, newest, 0.0).sum(1)
        return (total / len(k)).softmax(-1)
