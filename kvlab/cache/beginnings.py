"""Prompts that begin in one packed step: attended to and sealed in one call a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kvlab.cache.group import LayerGroup
from kvlab.kernel import attend_sdpa
from kvlab.source import Extent, sent


class Beginnings:
    """Sequences without a past, whose tokens lie one behind the other.

    A prompt of some hundred tokens keeps the device busy for less time than the host takes to
    launch its own attention and sealing in each layer; all prompts of a chunk take as long.
    """

    def __init__(self, group: LayerGroup, extents: Sequence[Extent]):
        self.pool, self.extents = group.pool, extents
        counts, size = [e.count for e in extents], group.block_size
        self.bounds = [0, *np.cumsum(counts).tolist()]
        self.bounds_there = sent(np.array(self.bounds, dtype=np.int32), self.pool.device)
        self.blocks = [block for e in extents for block in e.sealing]
        self.ids = self.pool.ids(self.blocks) if self.blocks else None
        whole = [(begin, begin + n // size * size) for begin, n in zip(self.bounds, counts)]
        self.places = None  # of the tokens that are sealed: all
        if whole != list(zip(self.bounds, self.bounds[1:])):
            places = np.concatenate([np.arange(*span, dtype=np.int32) for span in whole])
            self.places = sent(places, self.pool.device)
        self.rests = [(e.rest, end - e.rest_count, end)
                      for e, end in zip(extents, self.bounds[1:]) if e.rest is not None]
        for e, (_, end) in zip(extents, whole):
            newest = zip(reversed(group.recent.coming(e)), range(end, 0, -size))
            self.rests += [(place, end - size, end) for place, end in newest]
        self.rest = self._rest() if self.rests and self.pool.fused is not None else None

    def _rest(self) -> Tensor:
        """Of each token that stays open: its place here, the row of the open store, its slot."""
        counts = [end - begin for _, begin, end in self.rests]
        rows = [self.pool.open_row(block) for block, _, _ in self.rests]
        spans = [np.arange(begin, end) for _, begin, end in self.rests]
        table = np.stack([np.concatenate(spans), np.repeat(rows, counts),
                          np.concatenate([np.arange(n) for n in counts])])  # fmt: skip
        return sent(table.astype(np.int32), self.pool.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [N, Hq, D], k and v [N, H, D] of all these sequences -> [N, Hq, D]; stores k and v."""
        out = attend_sdpa.attend_each(q, k, v, self.bounds, self.bounds_there, scale=scale)
        if self.blocks:
            full = (x if self.places is None else x.index_select(0, self.places) for x in (k, v))
            self.pool.seal(layer, self.blocks, *full, self.ids)
        self._keep(layer, k, v)
        return out

    def _keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """What fills no block stays open: in one launch where kernels run."""
        if self.rest is None:
            for block, begin, end in self.rests:
                self.pool.write(layer, block, 0, k[begin:end], v[begin:end])
            return
        places, rows, slots = self.rest
        new = (x.index_select(0, places) for x in (k, v))
        self.pool.fused.append(*new, self.pool.open.layer(layer), rows, slots)


def beginnings(group: LayerGroup, extents: Sequence[Extent]) -> Beginnings | None:
    """For the sequences at the end of `extents` that have no past, if they are several."""
    count = 0
    if group.packs:
        for e in reversed(extents):
            if e.past or e.single or e.adopted or not e.count:
                break
            count += 1
    return Beginnings(group, extents[len(extents) - count :]) if count > 1 else None
