"""What stands for a sealed block when a decoded token chooses what to read."""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush

import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.core import SeqId
from kvlab.format import Plane
from kvlab.kernel.select_ref import HOLE
from kvlab.pool import SlabStore
from kvlab.retrieval import Retrieval
from kvlab.source.base import Source
from kvlab.source.host import Host
from kvlab.source.step import Extent

SLAB_ROWS = 64


class Digests(Source):
    """Digests of all sealed blocks of the sequences of one layer group, on the device.

    They are made from the keys before quantization, stay when their block leaves for the host, and
    go with it when it is gone for good. Forks share them. Blocks that came sealed (an attached
    prefix) get theirs from the stored keys.

    rows[seq][i]: row in the store of the i-th block, None where it is gone.
    """

    obstacle = ""

    def __init__(self, retrieval: Retrieval, host: Host):
        pool = host.pool
        shape, layers = pool.shape, pool.geometry.layers
        self.retrieval, self.pool, self.host = retrieval, pool, host
        self.tables = host.sealed.tables
        plane = Plane((shape.kv_heads, retrieval.sides, shape.k_width), retrieval.dtype)
        self.store = SlabStore({"digest": plane}, layers, SLAB_ROWS, pool.device, pool.meter)
        self._row_nbytes = layers * plane.nbytes
        self.rows: dict[SeqId, list[int | None]] = {}
        self._coming: dict[SeqId, list[int]] = {}
        self._holders: Counter[int] = Counter()
        self._free: list[int] = []
        self._pruned: dict[SeqId, int] = {}

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    digest_nbytes = nbytes

    @property
    def digest_used_nbytes(self) -> int:
        return (len(self._holders) - len(self._free)) * self._row_nbytes

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        self.rows[seq] = []

    def close(self, seq: SeqId) -> None:
        self._give(self.rows.pop(seq))
        self._pruned.pop(seq, None)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        self.rows[child] = list(self.rows[parent])
        self._holders.update(row for row in self.rows[child] if row is not None)

    def crop(self, seq: SeqId, length: int) -> None:
        blocks = length // self.pool.block_size
        self._give(self.rows[seq][blocks:])
        del self.rows[seq][blocks:]

    # ---- one step

    def begin(self, e: Extent) -> None:
        """Rows for the blocks that this step will seal, and for those that came with a prefix."""
        self._complete(e.seq, self.tables[e.seq], e.past // self.pool.block_size)
        self._coming[e.seq] = self._take(len(e.sealing))

    def sealing(self, layer: int, e: Extent, k: Tensor) -> None:
        self._write(layer, self._coming[e.seq], k)

    def commit(self, e: Extent) -> None:
        coming = self._coming.pop(e.seq)
        if e.single and e.sealing:
            for layer in range(self.pool.geometry.layers):
                k, _ = self.pool.read_open(layer, e.writing, self.pool.block_size)
                self._write(layer, coming, k)
        self.rows[e.seq] += coming
        self._prune(e.seq, self.tables[e.seq])

    def abort(self, e: Extent) -> None:
        self._give(self._coming.pop(e.seq, []))

    def read(self, layer: int, seq: SeqId, indices: list[int]) -> Tensor:
        """Digests [n, H, C, D] of the blocks at these logical indices, which are not gone."""
        return self.store.read(layer, [self.rows[seq][i] for i in indices])["digest"]

    # ---- pieces

    def _write(self, layer: int, rows: list[int], k: Tensor) -> None:
        if rows:
            digest = self.retrieval.digest(k.unflatten(0, (len(rows), -1)))
            dtype = self.retrieval.dtype
            if dtype == torch.float8_e4m3fn:  # torch's cast makes NaN of what is too large
                digest = digest.clamp(-448, 448)
            self.store.write(layer, rows, {"digest": digest.to(dtype)})

    def _complete(self, seq: SeqId, table: BlockTable, sealed: int) -> None:
        """Digests of blocks that came sealed."""
        rows = self.rows[seq]
        if len(rows) == sealed:
            return
        places = self.host.tables.places(seq, table, sealed)[len(rows) :]
        taken = iter(self._take(len(places) - places.count(HOLE)))
        new = [None if place == HOLE else next(taken) for place in places]
        rows += new
        near = [(row, place) for row, place in zip(new, places) if place >= 0]
        far = [(row, -2 - place) for row, place in zip(new, places) if place < HOLE]
        self._from_stored(near, self.pool.read)
        if far:
            self._from_stored(far, self.host.shelf.read)

    def _from_stored(self, pairs: list[tuple[int, int]], read) -> None:
        """Digests of (row, what `read` takes) from the stored keys, a slab at a time."""
        for start in range(0, len(pairs), SLAB_ROWS):
            rows, ids = map(list, zip(*pairs[start : start + SLAB_ROWS]))
            for layer in range(self.pool.geometry.layers):
                self._write(layer, rows, read(layer, ids)[0])

    def _prune(self, seq: SeqId, table: BlockTable) -> None:
        """Drop the digests of blocks that are gone for good."""
        if self._pruned.get(seq) == table.changes:
            return
        self._pruned[seq] = table.changes
        rows = self.rows[seq]
        for index, place in enumerate(self.host.tables.places(seq, table, len(rows))):
            if place == HOLE and rows[index] is not None:
                self._give([rows[index]])
                rows[index] = None

    def _take(self, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            new = len(self._holders)
            taken.append(heappop(self._free) if self._free else new)
            self._holders[taken[-1]] = 1
        self.store.commit(taken)
        return taken

    def _give(self, rows: list[int | None]) -> None:
        for row in rows:
            if row is None:
                continue
            self._holders[row] -= 1
            if not self._holders[row]:
                heappush(self._free, row)
                self.store.drop([row])
