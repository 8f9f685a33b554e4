"""A policy of one's own: replayed over a trace without a model, then run in a live cache.

    python experiments/examples/own_policy.py

On the command line it is `policy._target_=own_policy.Deepest`, in the folder of this file.
"""

from __future__ import annotations

import torch

import kvlab
from kvlab.policy import PriorityPolicy
from kvlab.sim import Trace, load_trace, simulate


class Deepest(PriorityPolicy):
    """The block deepest in its sequence leaves, of equals the one that was used least recently:
    what many prompts share stands at the front and stays."""

    name = "deepest"

    def priority(self, meta):
        return (-meta.depth, meta.last)


def replayed(trace: Trace, capacity_blocks: int) -> dict[str, float]:
    """Percent of a trace's blocks that hit, for this policy and for LRU."""
    return {name: simulate(trace, policy, capacity_blocks).block_hit_percent
            for name, policy in (("deepest", Deepest), ("lru", "lru"))}


def live(model, ids: torch.Tensor, budget_blocks: int) -> list[int]:
    """First positions of the blocks that a cache of the model keeps of `ids` [1, T]."""
    cache = kvlab.PagedCache.for_model(model, policy=Deepest, budget_blocks=budget_blocks,
                                       block_size=16)  # fmt: skip
    kvlab.prefill(model, ids, cache, chunk_tokens=64)
    [table] = cache.groups[0].tables.values()
    return [16 * place for place, block in enumerate(table.ids) if block is not None]


def main() -> None:
    from kvlab.model.load import ReferenceModel

    for name, percent in replayed(load_trace("conversation"), 5000).items():
        print(f"{name:8} {percent:5.2f} % of blocks hit at 5,000 blocks of the conversation trace")
    model = ReferenceModel().load("cpu").model
    ids = torch.randint(1, 1000, (1, 640), generator=torch.Generator().manual_seed(0))
    print("of 640 tokens in 16 blocks the live cache keeps those from", live(model, ids, 16))


if __name__ == "__main__":
    main()
