"""Rows of planes in host memory, laid out so that one layer of a slab is one piece."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kvlab.format import Plane
from kvlab.offload.memory import HostMemory
from kvlab.pool import ALIGNMENT, MAX_SLABS, LayerPlanes, PlaneView, SlabStore


class HostSlabs(SlabStore):
    """A `SlabStore` whose slabs are pinned host memory and hold the planes layer by layer.

    On the device a slab is [plane][layer][row]: a kernel reads it from anywhere. Here it is
    [layer][plane][row]: what attention wants next, one layer of 4,096 tokens, is one copy of
    megabytes instead of one for each plane or block.

    device: whose kernels read it; the address table lies there, the slabs never do.
    """

    def __init__(
        self, planes: dict[str, Plane], layers: int, slab_rows: int, device, memory: HostMemory
    ):
        super().__init__(planes, layers, slab_rows, device)
        self.memory, end = memory, 0
        for name, plane in planes.items():
            self._offsets[name] = end
            end += -(-slab_rows * plane.nbytes // ALIGNMENT) * ALIGNMENT
        self.layer_bytes, self.slab_bytes = end, layers * end
        self._places: list[LayerPlanes] | None = None

    def _take_over(self, source: HostSlabs) -> None:
        self._places = None
        if self.device.type == "cuda":  # kernels write to host rows, and the host reads them now
            torch.cuda.synchronize(self.device)
        super()._take_over(source)

    def missing(self, rows: list[int]) -> int:
        """Slabs that `commit(rows)` would have to take."""
        return len({row // self.slab_rows for row in rows} - self.slabs.keys())

    def all_layers(self) -> list[LayerPlanes]:
        """`layer` of each layer; made once, since nothing in it ever changes."""
        if self._places is None:
            self._places = [self._layer(n) for n in range(self.layers)]
        return self._places

    def layer(self, layer: int) -> LayerPlanes:
        """Addresses of one layer: host memory that kernels read in place, over the bus."""
        return self.all_layers()[layer]

    def region(self, slab: int, layer: int) -> Tensor:
        """All planes of one layer of a slab, uint8 [layer_bytes], a view."""
        return self.slabs[slab][layer * self.layer_bytes : (layer + 1) * self.layer_bytes]

    def spans(self, first: int, last: int) -> list[tuple[int, int]]:
        """Byte ranges of a region that hold rows [first, last): one for each plane, or one."""
        if last - first == self.slab_rows:
            return [(0, self.layer_bytes)]
        return [
            (self._offsets[name] + first * plane.nbytes, self._offsets[name] + last * plane.nbytes)
            for name, plane in self.planes.items()
        ]

    def views(self) -> dict[str, PlaneView]:
        """Where the planes lie in a region."""
        return {
            name: PlaneView(self._offsets[name], plane.nbytes, plane.shape, plane.dtype)
            for name, plane in self.planes.items()
        }

    def _layer(self, layer: int) -> LayerPlanes:
        start = layer * self.layer_bytes
        planes = {n: v._replace(offset_bytes=start + v.offset_bytes)
                  for n, v in self.views().items()}  # fmt: skip
        return LayerPlanes(self.base, self.slabs, self.slab_rows, planes)

    def _allocate(self) -> Tensor:
        return self.memory.take(self.slab_bytes, self.device)

    def _too_many(self) -> str:
        return f"more than {MAX_SLABS} host slabs; use a larger offload.slab_tokens"

    def _view(self, buffer: Tensor, name: str, plane: Plane) -> Tensor:
        start, size = self._offsets[name], self.slab_rows * plane.nbytes
        rows = buffer.view(self.layers, self.layer_bytes)[:, start : start + size]
        return rows.view(plane.dtype).unflatten(1, (self.slab_rows, *plane.shape))

    def _shrink(self, slab: int) -> None:
        self.memory.give(self.slabs[slab], self.device)
        super()._shrink(slab)


def rows_of(at: LayerPlanes, rows: Tensor) -> dict[str, Tensor]:
    """Plane name -> [n, *shape] of `rows` in a store whose slabs follow each other in one buffer.

    For slabs {0: ..., 1: ...} cut from one contiguous uint8 buffer, as in a staging area.
    """
    first, count = at.slabs[0], len(at.slabs)
    stacked = torch.as_strided(
        first, (count, first.numel()), (first.numel(), 1), first.storage_offset()
    )
    slab, local = rows // at.slab_blocks, rows % at.slab_blocks
    found = {}
    for name, plane in at.planes.items():
        size = at.slab_blocks * prod(plane.shape) * plane.dtype.itemsize
        raw = stacked[:, plane.offset_bytes : plane.offset_bytes + size].view(plane.dtype)
        found[name] = raw.unflatten(1, (at.slab_blocks, *plane.shape))[slab, local]
    return found
