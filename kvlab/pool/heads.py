"""Blocks of single heads: a block id stands for a row of its own in each layer and key/value head
that has one, so that heads may hold unlike numbers of tokens and no byte is held for nothing."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import torch
from torch import Tensor

from kvlab.core import CacheGeometry
from kvlab.pool.blocks import FINE_SLAB_TOKENS, BlockPool
from kvlab.pool.slabs import LayerPlanes, SlabStore


class HeadPool(BlockPool):
    """A pool whose sealed rows hold one block of one head of one layer.

    A block is a column of such rows; where a head has none, `read` gives zeros and `present` says
    so. Kernels see a store of one layer and one head, and each head as a sequence of its own. Open
    blocks are as ever: what is not sealed, all heads have.
    """

    by_head = True

    def __init__(self, geometry: CacheGeometry, format, device, dtype, *args, **more):
        super().__init__(geometry, format, device, dtype, *args, **more)
        self.row_shape = self.shape._replace(kv_heads=1)
        one = CacheGeometry.of([self.row_shape], geometry.group, geometry.block_size)
        self.places = geometry.layers, geometry.kv_heads
        self.count = geometry.layers * geometry.kv_heads
        rows = max(1, FINE_SLAB_TOKENS // geometry.block_size) * self.count
        self.sealed = SlabStore(format.planes(one), 1, rows, device, self.meter)
        self._rows: dict[int, np.ndarray] = {}  # block -> [L, H], -1: none
        self._free: list[int] = []
        self._next = 0

    def ids(self, blocks):
        """Rows are looked up at each call: they differ by layer and head."""

    # ---- rows

    def rows(self, blocks: list[int]) -> np.ndarray:
        """int64 [n, L, H], -1 where a head has no such block."""
        if not blocks:
            return np.zeros((0, *self.places), dtype=np.int64)
        return np.stack([self._rows[block] for block in blocks])

    def held(self, blocks: list[int]) -> np.ndarray:
        """How many of `blocks` each head has, [L, H]."""
        return (self.rows(blocks) >= 0).sum(0)

    def commit(self, blocks, first=False):
        for block in blocks:
            for layer, head in np.ndindex(*self.places):
                self.sealed.commit([self._row(block, layer, head)])

    def _row(self, block: int, layer: int, head: int) -> int:
        """The row of a head's block, a new one where it has none."""
        rows = self._rows.get(block)
        if rows is None:
            rows = self._rows[block] = np.full(self.places, -1, dtype=np.int64)
        if rows[layer, head] < 0:
            if not self._free:
                heappush(self._free, self._next)
                self._next += 1
            rows[layer, head] = heappop(self._free)
        return int(rows[layer, head])

    def unseal(self, blocks):
        for block in blocks:
            rows = self._rows.pop(block, None)
            if rows is not None:
                gone = rows[rows >= 0].tolist()
                self.sealed.drop(gone)
                for row in gone:
                    heappush(self._free, row)

    # ---- sealed blocks

    def seal(self, layer, blocks, k, v, ids=None, count=None, counts=None):
        """See `BlockPool.seal`. counts: how many of the blocks, from the first on, each head has;
        None: all of them."""
        heads = range(self.places[1])
        counts = [len(blocks)] * len(heads) if counts is None else counts
        rows = [self._row(blocks[i], layer, h) for h in heads for i in range(counts[h])]
        if rows:
            cut = [n * self.block_size for n in counts]
            pair = (torch.cat([x[: cut[h], h] for h in heads])[:, None] for x in (k, v))
            super().seal(0, rows, *pair, super().ids(rows))

    def seal_open(self, blocks):
        self.commit(blocks)
        if self.fused is None:
            for block in blocks:
                for layer in range(self.places[0]):
                    self.seal(layer, [block], *self.read_open(layer, block, self.block_size))
        elif blocks:
            self._seal_open_fused(blocks)

    def _seal_open_fused(self, blocks: list[int]) -> None:
        """All heads of all layers in one launch."""
        rows = torch.tensor([self._open_row[b] for b in blocks])[:, None] * self.count
        rows = (rows + torch.arange(self.count)).flatten()
        sealed = torch.from_numpy(self.rows(blocks).reshape(-1))
        rows, sealed = (x.to(self.device, non_blocking=True) for x in (rows, sealed))
        whole = self._by_head(0, self.count)
        self.fused.seal_open(whole, self.sealed.layer(0), self.format, rows, sealed, 1)

    def read(self, layer, blocks, ids=None):
        rows = self.rows(blocks)[:, layer]
        there = torch.from_numpy(rows >= 0).to(self.device)
        found = rows[rows >= 0].tolist()
        pair = []
        for x, width in zip(super().read(0, found, super().ids(found)) if found else (None, None),
                            (self.shape.k_width, self.shape.v_width)):  # fmt: skip
            whole = torch.zeros(*rows.shape, self.block_size, width, dtype=self.dtype,
                                device=self.device)  # fmt: skip
            if x is not None:
                whole[there] = x.view(-1, self.block_size, width)
            pair.append(whole.transpose(1, 2).flatten(0, 1))
        return tuple(pair)

    def present(self, layer: int, blocks: list[int]) -> Tensor | None:
        """bool [n*S, H], which tokens of `read` each head has; None where it is all of them."""
        there = self.rows(blocks)[:, layer] >= 0
        if there.all():
            return None
        return torch.from_numpy(there).to(self.device).repeat_interleave(self.block_size, 0)

    # ---- for the decode kernel

    def open_by_head(self, layer: int) -> LayerPlanes:
        """The open store of a layer as one of a single head: row r of head h is r * H + h."""
        return self._by_head(layer, self.places[1])

    def _by_head(self, layer: int, count: int) -> LayerPlanes:
        """A slab of the open store is [L, 1, H, S, D] of keys, then of values: from `layer` on,
        `count` blocks of single heads lie side by side."""
        base, slabs, _, planes = self.open.layer(layer)
        views = {name: p._replace(block_stride_bytes=p.block_stride_bytes // p.shape[0],
                                  shape=(1, *p.shape[1:])) for name, p in planes.items()}
        return LayerPlanes(base, slabs, count, views)
