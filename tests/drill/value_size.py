"""A policy and its scorer as a user writes them: one file, outside the package."""

from __future__ import annotations

import torch

from kvlab.cache.scores import Scorer
from kvlab.policy import PriorityPolicy


class Size(Scorer):
    """The largest value of a block: small values add little to any sum."""

    def part(self, q, k, v, *, scale, block_size, seen=None):
        return v.float().norm(dim=-1).amax(-1).unflatten(0, (-1, block_size)).amax(-1)

    def scores(self, parts, lse):
        return torch.cat(parts)


class ValueSize(PriorityPolicy):
    """The block of smallest values leaves; `age` of its score is lost with each step of life."""

    name = "value_size"
    scored = True
    observes = Size

    def __init__(self, age: float = 0.0):
        super().__init__()
        self.age = age

    def priority(self, meta):
        return meta.score + self.age * meta.born, meta.last
