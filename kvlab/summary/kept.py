"""The control: tokens drawn by lot."""

from __future__ import annotations

import torch

from kvlab.core import checked_seed
from kvlab.summary.base import Entries, Queries, Summary


class RandomTokens(Summary):
    """Some of the evicted tokens stay as they are; what every summary has to beat.

    ratio, max_entries: as `Summary`. seed: of the draw, the same tokens in all layers and heads.
    """

    name = "random"

    def __init__(self, ratio: float = 0.05, max_entries: int | None = None, seed: int = 0):
        super().__init__(ratio, max_entries)
        self.seed = checked_seed("summary.seed", seed)

    def reduce(self, past: Entries, count: int, queries: Queries) -> Entries:
        draw = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(past.count, generator=draw)[:count].sort().values
        return Entries(*(x[chosen.to(x.device)] for x in past))
