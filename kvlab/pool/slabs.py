"""Slabs: rows of planes in buffers that never move, committed when first written."""

from __future__ import annotations

from copy import deepcopy
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvlab.core import KvlabError
from kvlab.format import Plane
from kvlab.pool.coming import NothingComing

ALIGNMENT = 256  # bytes; what a vector load and the bulk copy engine want
MAX_SLABS = 8192  # entries of the device address table: 64 KiB, committed with the first kernel


class PlaneView(NamedTuple):
    """Where one plane of one layer lies inside every slab."""

    offset_bytes: int  # of this layer's [P, *shape] region in the slab
    block_stride_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class LayerPlanes(NamedTuple):
    """What a kernel needs to find block n of a layer: base[n // P] + offset + (n % P) * stride."""

    base: Tensor  # int64 [MAX_SLABS] on the device: address of each slab, 0 where none
    slabs: dict[int, Tensor]  # slab index -> its uint8 buffer
    slab_blocks: int  # P
    planes: dict[str, PlaneView]


class Meter:
    """Bytes that whoever shares this object holds now, and the most they held at one time.

    A step takes the memory of all its blocks before it gives any back, so whoever looks between
    steps misses the peak.
    """

    def __init__(self):
        self.now = self.peak = 0

    def add(self, count: int) -> None:
        """`count` bytes more; fewer if it is negative."""
        self.now += count
        self.peak = max(self.peak, self.now)

    def reset_peak(self) -> None:
        """Begin anew with what is held now."""
        self.peak = self.now

    def __deepcopy__(self, memo: dict) -> Meter:
        """Of a copied cache: its stores tell it anew what they take."""
        return Meter()


class SlabStore:
    """Rows of planes for all layers, in slabs of `slab_rows` rows.

    One slab is one uint8 buffer that holds [L, P, *shape] of every plane. It is allocated when its
    first row is committed and dropped with its last; it never moves, so device addresses stay
    valid in captured graphs.

    meter: hears of every byte; shared by the stores of one cache, or the store's own.
    """

    def __init__(
        self, planes: dict[str, Plane], layers: int, slab_rows: int, device,
        meter: Meter | None = None,
    ):
        self.planes, self.layers, self.slab_rows = planes, layers, slab_rows
        self.device, self.meter = torch.device(device), meter or Meter()
        self.slabs: dict[int, Tensor] = {}
        self._views: dict[int, dict[str, Tensor]] = {}
        self._live: dict[int, set[int]] = {}
        self._base: Tensor | None = None
        self._addresses: np.ndarray | None = None  # the same on the host
        self._offsets: dict[str, int] = {}
        self._layers: dict[int, LayerPlanes] = {}  # made once: decode asks at every step
        self.coming = NothingComing()
        end = 0
        for name, plane in planes.items():
            self._offsets[name] = end
            end += -(-layers * slab_rows * plane.nbytes // ALIGNMENT) * ALIGNMENT
        self.slab_bytes = end

    def __deepcopy__(self, memo: dict) -> SlabStore:
        """The same rows in slabs of their own, at addresses of their own."""
        self.coming.settle()
        other = object.__new__(type(self))
        vars(other).update(
            vars(self), meter=deepcopy(self.meter, memo), coming=deepcopy(self.coming, memo),
            slabs={}, _views={}, _live={}, _base=None,
            _addresses=None, _layers={},
        )
        other._take_over(self)
        return other

    def _take_over(self, source: SlabStore) -> None:
        """Rows of a store of the same shape; all or none."""
        try:
            with torch.inference_mode(False):
                for slab, buffer in source.slabs.items():
                    self._grow(slab)
                    self.slabs[slab].copy_(buffer)
                    self._live[slab] |= source._live[slab]
        except BaseException:
            for slab in list(self.slabs):
                self._shrink(slab)
            raise

    def commit(self, rows: list[int]) -> None:
        """Make `rows` writable; allocates the slabs they lie in."""
        grown = dict.fromkeys(row // self.slab_rows for row in rows).keys() - self.slabs.keys()
        if grown:
            try:
                with torch.inference_mode(False):  # who writes later may be in another mode
                    for slab in sorted(grown):
                        self._grow(slab)
            finally:
                self._tell(list(grown))
        for row in rows:
            self._live[row // self.slab_rows].add(row)

    def drop(self, rows: list[int]) -> None:
        """Give `rows` back; a slab without live rows returns to the allocator."""
        gone = []
        self.coming.settle()
        for row in rows:
            slab = row // self.slab_rows
            live = self._live.get(slab)
            if live is None:
                continue
            live.discard(row)
            if not live:
                self._shrink(slab)
                gone.append(slab)
        self._tell(gone)

    def write(self, layer: int, rows: list[int], values: dict[str, Tensor]) -> None:
        """`values`: plane name -> [N, *shape] for the N `rows`."""
        for slab, where, local in self._by_slab(rows):
            for name, view in self.views_of(slab).items():
                view[layer, local] = values[name][where].to(view.device)  # host blocks come back

    def read(self, layer: int, rows: list[int]) -> dict[str, Tensor]:
        """Plane name -> [N, *shape], a copy, in the order of `rows` (grouped by ascending runs)."""
        self.coming.need(layer)
        parts = [
            {name: view[layer, local] for name, view in self.views_of(slab).items()}
            for slab, _, local in self._by_slab(rows)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in self.planes}

    def row(self, layer: int | slice, row: int) -> dict[str, Tensor]:
        """Plane name -> the live [*shape] of one row, a view; of several layers [L, *shape]."""
        slab, local = divmod(row, self.slab_rows)
        return {name: view[layer, local] for name, view in self.views_of(slab).items()}

    def expect(self, coming: NothingComing) -> None:
        """From now on rows come by `coming`, and whoever touches them waits for it."""
        self.coming = coming

    def layer(self, layer: int) -> LayerPlanes:
        """Addresses and strides of one layer, for the kernels; those who keep them settle what is
        `coming` before they launch one."""
        self.coming.need(layer)
        if layer not in self._layers:
            views = {
                name: PlaneView(
                    self._offsets[name] + layer * self.slab_rows * plane.nbytes,
                    plane.nbytes, plane.shape, plane.dtype,
                )
                for name, plane in self.planes.items()
            }
            self._layers[layer] = LayerPlanes(self.base, self.slabs, self.slab_rows, views)
        return self._layers[layer]

    @property
    def base(self) -> Tensor:
        """Device table of slab addresses; committed on first use, since only kernels read it."""
        if self._base is None:
            with torch.inference_mode(False):  # else nobody may write to it outside of that mode
                self._base = torch.zeros(MAX_SLABS, dtype=torch.int64, device=self.device)
            self._addresses = np.zeros(MAX_SLABS, dtype=np.int64)
            self.meter.add(self._base.nbytes)
            self._tell(list(self.slabs))
        return self._base

    def _tell(self, slabs: list[int]) -> None:
        """Write the addresses of slabs that came or went to the device, all of them in one copy."""
        slabs = [slab for slab in slabs if slab < MAX_SLABS]  # beyond it `commit` refuses
        if self._base is None or not slabs:
            return
        for slab in slabs:
            buffer = self.slabs.get(slab)
            self._addresses[slab] = 0 if buffer is None else buffer.data_ptr()
        some = slice(min(slabs), max(slabs) + 1)
        new = torch.from_numpy(self._addresses[some])
        self._base[some].copy_(new, non_blocking=True)  # pageable: staged before the call returns

    @property
    def nbytes(self) -> int:
        table = 0 if self._base is None else self._base.nbytes
        return len(self.slabs) * self.slab_bytes + table

    @property
    def live(self) -> set[int]:
        """Rows that are committed."""
        return set().union(*self._live.values())

    @property
    def live_rows(self) -> int:
        return sum(map(len, self._live.values()))

    def _grow(self, slab: int) -> None:
        if slab >= MAX_SLABS:
            raise KvlabError(self._too_many())
        self.slabs[slab], self._live[slab] = self._allocate(), set()
        self.meter.add(self.slab_bytes)

    def views_of(self, slab: int) -> dict[str, Tensor]:
        """Plane name -> [L, P, *shape] of a slab; made when they are asked for, since kernels go by
        addresses."""
        if slab not in self._views:
            with torch.inference_mode(False):
                buffer = self.slabs[slab]
                self._views[slab] = {n: self._view(buffer, n, p) for n, p in self.planes.items()}
        return self._views[slab]

    def _allocate(self) -> Tensor:
        return torch.empty(self.slab_bytes, dtype=torch.uint8, device=self.device)

    def _too_many(self) -> str:
        return (f"the cache would need more than {MAX_SLABS} slabs of {self.slab_rows} blocks; "
                "use a larger cache.block_size")

    def _view(self, buffer: Tensor, name: str, plane: Plane) -> Tensor:
        shape = (self.layers, self.slab_rows, *plane.shape)
        start, size = self._offsets[name], prod(shape) * plane.dtype.itemsize
        return buffer[start : start + size].view(plane.dtype).view(shape)

    def _shrink(self, slab: int) -> None:
        del self.slabs[slab], self._live[slab]
        self._views.pop(slab, None)
        self.meter.add(-self.slab_bytes)

    def _by_slab(self, rows: list[int]):
        """(slab, slice of the input, index within the slab) per run of rows in one slab."""
        start = 0
        while start < len(rows):
            slab, stop = rows[start] // self.slab_rows, start + 1
            while stop < len(rows) and rows[stop] // self.slab_rows == slab:
                stop += 1
            local = [row % self.slab_rows for row in rows[start:stop]]
            yield slab, slice(start, stop), _as_slice(local)
            start = stop


def _as_slice(local: list[int]) -> slice | list[int]:
    """Consecutive rows as a slice: a view instead of an index kernel."""
    run = local[-1] - local[0] + 1 == len(local) and local == list(range(local[0], local[-1] + 1))
    return slice(local[0], local[-1] + 1) if run else local
