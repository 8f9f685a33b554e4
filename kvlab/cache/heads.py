"""How many blocks each head of a layer keeps, where the budget divides among heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Tokens that stay in some layers: places int64 [L, H, m], in order.

    counts: blocks of each layer and head, where they differ: of its m places a head keeps the first
    so many. None: all of them.
    """

    index: Tensor
    counts: list[list[int]] | None = None

    def of(self, layer: int) -> tuple[Tensor, list[int] | None]:
        return self.index[layer], None if self.counts is None else self.counts[layer]

    def layers(self, first: int, count: int) -> Kept:
        """Of some layers."""
        mine = slice(first, first + count)
        return Kept(self.index[mine], None if self.counts is None else self.counts[mine])


def best_of_each(score: Tensor, counts: list[list[int]], size: int) -> Kept:
    """Of score [L, H, n] the best tokens of each head, counts[l][h] blocks of `size` of them."""
    n, most = score.shape[-1], size * max(map(max, counts))
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :most]
    own = size * torch.tensor(counts, device=score.device)[..., None]
    best = best.masked_fill(torch.arange(most, device=score.device) >= own, n)
    return Kept(best.sort(-1).values.clamp_max(max(0, n - 1)), counts)


def adaptive(
    score: Tensor, keep: int, size: int, floor: float, across: bool = False
) -> list[list[int]]:
    """Blocks for each head of each layer, H * keep in all of a layer: see `kvlab.budget.AdaKV`.

    score: fp32 [L, H, n], infinite for what stays anyway and -inf for what a head does not have.
    A head's blocks are its tokens by score, `size` at a time, each worth their mean.
    across: heads of all layers compete, for L * H * keep blocks: `kvlab.budget.AllHeads`.
    """
    if across:
        heads = score.shape[1]
        [found] = adaptive(score.flatten(0, 1)[None], keep, size, floor)
        return [found[at : at + heads] for at in range(0, len(found), heads)]
    ranked = score.sort(-1, descending=True).values.unflatten(-1, (-1, size))
    value = ranked.mean(-1)
    have = (ranked[..., -1] > -torch.inf).sum(-1, keepdim=True)  # of whole blocks
    place = torch.arange(value.shape[-1], device=value.device)
    least = min(keep, -(-int(floor * keep * size) // size))
    value = value.masked_fill((place < least) & (place < have), torch.inf)
    heads, blocks = value.shape[1:]
    order = value.flatten(1).argsort(dim=-1, descending=True, stable=True)[:, : heads * keep]
    taken = torch.zeros(len(value), heads, dtype=torch.int64, device=value.device)
    taken.scatter_add_(1, order // blocks, torch.ones_like(order))
    return torch.minimum(taken, have[..., 0]).tolist()


def protect(score: Tensor, window, fill: int) -> None:
    """Make infinite what the `window` keeps of each head's own tokens; `fill` more come behind."""
    there = score > -torch.inf
    total, rank = there.sum(-1, keepdim=True), there.cumsum(-1) - 1
    for length in set(total.flatten().tolist()):
        for begin, end in window.protected(length + fill):
            kept = (total == length) & there & (rank >= begin) & (rank < end)
            score.masked_fill_(kept, torch.inf)


def protected_blocks(window, length: int, size: int) -> int:
    """Blocks that what the `window` keeps of `length` tokens takes."""
    return -(-sum(min(end, length) - begin for begin, end in window.protected(length)) // size)
