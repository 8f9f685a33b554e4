"""Attention that tokens got from all queries that saw them: a mean, or H2O's sum."""

from __future__ import annotations

import sys

import torch

from kvlab.cache.keys import Whole
from kvlab.cache.scores import by_kv_head, logits, over_layers
from kvlab.core import BadInput

ROWS = 256  # queries whose capped logits are made at a time


class Observed(Whole):
    """Attention that a token got from a query, the mean of all queries that saw it.

    What H2O (https://arxiv.org/abs/2306.14048) sums, divided by the number of queries that could
    see the token, as NVIDIA's kvpress has it (ObservedAttentionPress): a sum favours what came
    early, whoever looked. Reads the attention of each chunk a second time. While decoding, a token
    is looked at before each choice and stands for those since the last look.
    half_life: queries after which what was seen counts half; None: every query counts alike.
    """

    name = "observed"
    decodes = True
    joins = torch.float32

    def __init__(self, half_life: float | None = None):
        if half_life is not None and not half_life > 0:
            raise BadInput("half_life", half_life, "must be a positive number of tokens, or null")
        self.half_life = half_life

    @property
    def layered(self):
        return self.softcap is None and super().layered

    @over_layers()
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        """Sums over the queries, the mean over the heads of a group: `joined` divides them."""
        n, tokens = len(k), q.shape[-2]
        if self.softcap is None:
            return shares(q, k, lse, scale=scale) * tokens
        at, total = torch.arange(n, device=k.device), 0.0
        for start in range(0, tokens, ROWS):
            mine = slice(start, start + ROWS)
            seen = at <= at[n - tokens + start :][:ROWS, None]
            x = logits(q[:, mine], k, scale, seen, ROWS, self.softcap)
            total = total + (x - lse[:, mine, None]).exp().sum(1)
        return by_kv_head(total, k.shape[1])

    def joined(self, old, count, new, saw, queries):
        count = count * (0.5 ** (queries / self.half_life) if self.half_life else 1.0)
        total = count + saw
        return (old * count + new) / total, total


class H2O(Observed):
    """The sum of the attention that a token got, from all queries, as published.

    H2O (Zhang et al. 2023, https://arxiv.org/abs/2306.14048): accumulated scores, by head. Every
    decoded token is looked at, which takes the slow way through attention.
    """

    name = "h2o"
    looks = sys.maxsize

    def __init__(self):
        super().__init__()

    def joined(self, old, count, new, saw, queries):
        return torch.where(count > 0, old, 0.0) + new, count + saw
