"""Layers of a chunk that are chosen among together.

To score, rank and seal the tokens of one layer takes some forty launches, and a chunk of a small
model computes a layer in less time than the host takes for them. So layers wait, with their tokens
side by side, as many as `ROOM` bytes hold, and are chosen among in as many launches as one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.cache.heads import Kept
from kvlab.cache.recent import patch
from kvlab.core import BlockId
from kvlab.pool import BlockPool
from kvlab.source import Ask

ROOM = 1 << 27  # bytes of keys, values and queries that wait


class Together:
    """The layers [first, stop) of a group's step, for one sequence.

    k, v      [L, n, H, D] in the compute dtype: what each layer held, then its open tail, then the
              step's own tokens; written as the layers come
    queries   of each layer that came, those that its scorer reads, [Hq, t, D]; lse: theirs, [Hq, t]
    scales    of their products with keys, by layer: they need not be alike (GPT-2's by depth)
    there     which tokens each head has, bool [n, H] by layer; None: all
    """

    def __init__(self, pool: BlockPool, ask: Ask, reads: int | None):
        """reads: of the step's queries, how many at the end are looked at; None: all."""
        e, size = ask.extent, pool.block_size
        self.pool, self.reads = pool, reads
        self.held = e.past // size * size
        self.n = e.past % size + self.held + e.count
        # few queries of many are copied, since a view would hold all of them
        self.copies = reads is not None and 4 * reads <= e.count
        self.first, self.stop = ask.layer, pool.geometry.layers
        if e.alone:
            self.stop = min(self.stop, ask.layer + max(1, ROOM // self._layer_bytes(ask)))
        else:
            self.stop = ask.layer + 1
        g, shape = pool.geometry, pool.shape
        self.k, self.v = (
            torch.empty(self.stop - self.first, self.n, g.kv_heads, width, dtype=pool.dtype,
                        device=pool.device) for width in (shape.k_width, shape.v_width))
        if self.held:
            pair = [x[:, : self.held] for x in (self.k, self.v)]
            pool.read_layers(self.first, e.old, e.held_ids, *pair)
            patch(pool, slice(self.first, self.stop), e.recent, *pair)
        if e.fill:
            tail = pool.read_open(slice(self.first, self.stop), e.tail, e.fill)
            for x, found in zip((self.k, self.v), tail):
                x[:, self.held : self.held + e.fill] = found
        self.queries: list[Tensor] = []
        self.scales: list[float] = []
        self.lse: list[Tensor] = []
        self.there: list[Tensor | None] = []
        self.came = 0

    def _layer_bytes(self, ask: Ask) -> int:
        asked = 0 if ask.q is None or self.copies else ask.q.numel()
        return (self.n * self.pool.shape.elements + asked) * self.pool.dtype.itemsize

    def add(self, ask: Ask) -> tuple[Tensor, Tensor]:
        """The next layer is here: all its keys and values, [n, H, D]."""
        k, v = self.k[self.came], self.v[self.came]
        for x, new in ((k, ask.k), (v, ask.v)):
            x[self.n - ask.extent.count :] = new
        self.came += 1
        return k, v

    def note(self, ask: Ask, lse: Tensor, there: Tensor | None) -> None:
        """It has attended; `lse` [Hq, T] over everything that its queries saw."""
        last = 0 if self.reads is None else max(0, ask.q.shape[1] - self.reads)
        queries = ask.q[:, last:]
        self.queries.append(queries.clone() if self.copies else queries)
        self.scales.append(ask.scale)
        self.lse.append(lse[:, last:])
        self.there.append(there)

    @property
    def full(self) -> bool:
        """Whether all of its layers came."""
        return self.came == self.stop - self.first


def seal_layers(
    pool: BlockPool, first: int, held: list[BlockId], blocks: list[BlockId], k: Tensor, v: Tensor,
    kept: Kept, ids: Tensor | None,
) -> None:
    """Of the layers from `first` on, of keys and values [L, n, H, D], those of the blocks `held`
    first, the tokens `kept` into `blocks`."""
    if pool.fused is not None and kept.counts is None and not pool.apart.tokens:
        planes = pool.sealed.layer(first)
        pool.fused.seal_kept(k, v, kept.index.contiguous(), pool.format, planes, ids)
        return
    for i, layer in enumerate(range(first, first + len(k))):
        index, counts = kept.of(i)
        pair = (by_head(x[i], index) for x in (k, v))
        if counts is not None:
            pool.seal(layer, blocks, *pair, counts=counts)
        else:
            pool.seal(layer, blocks, *pair, ids, still_apart(pool, layer, held, index))


def still_apart(pool: BlockPool, layer: int, held: list[BlockId], index: Tensor) -> Tensor | None:
    """How many of the tokens `index` [H, m] of the blocks `held`, or of those that a sequence
    begins with, were kept apart, int32 [H]; they come first. None where no tokens are."""
    apart = pool.apart
    if held and held[0] not in apart.rows or not apart.tokens:
        return None
    count = apart.row(layer, held[0])["count"] if held else apart.all
    return (index < count[:, None]).sum(-1, dtype=torch.int32)


def by_head(x: Tensor, index: Tensor) -> Tensor:
    """Of x [n, H, D] the tokens `index` [H, m] of each head, [m, H, D]."""
    return x.gather(0, index.T[..., None].expand(-1, -1, x.shape[-1]))
