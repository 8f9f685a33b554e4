"""The bytes behind block ids: slabs that never move, committed when first written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.core import BadInput, CacheGeometry, KvlabError
from kvlab.format import Dense, KVFormat, Plane

ALIGNMENT = 256  # bytes; what a vector load and the bulk copy engine want
MAX_SLABS = 8192  # entries of the device address table: 64 KiB, committed with the first kernel
SLAB_TOKENS = 1024


@cache
def fused_kernels(device_type: str, kernels: str = "auto") -> ModuleType | None:
    """The Triton kernels for this kind of device, or None where plain torch does the work.

    kernels: "auto" (Triton on CUDA if it is installed), "torch", or "triton" (also on the CPU,
    where its interpreter runs them: for tests). Raises `BadInput` if Triton cannot be had.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise BadInput("cache.kernels", kernels, "must be auto, torch or triton")
    if kernels == "torch" or (kernels == "auto" and device_type != "cuda"):
        return None
    try:
        from kvlab.kernel import all_triton
    except ImportError as error:
        if kernels == "auto":
            return None
        raise BadInput("cache.kernels", kernels, f"Triton cannot be imported: {error}") from error
    return all_triton


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


class SlabStore:
    """Rows of planes for all layers, in slabs of `slab_rows` rows.

    One slab is one uint8 buffer that holds [L, P, *shape] of every plane. It is allocated when its
    first row is committed and dropped with its last; it never moves, so device addresses stay
    valid in captured graphs.
    """

    def __init__(self, planes: dict[str, Plane], layers: int, slab_rows: int, device):
        self.planes, self.layers, self.slab_rows = planes, layers, slab_rows
        self.device = torch.device(device)
        self.slabs: dict[int, Tensor] = {}
        self._views: dict[int, dict[str, Tensor]] = {}
        self._live: dict[int, set[int]] = {}
        self._base: Tensor | None = None
        self._offsets: dict[str, int] = {}
        self._layers: dict[int, dict[str, PlaneView]] = {}  # made once: decode asks at every step
        end = 0
        for name, plane in planes.items():
            self._offsets[name] = end
            end += -(-layers * slab_rows * plane.nbytes // ALIGNMENT) * ALIGNMENT
        self.slab_bytes = end

    def commit(self, rows: list[int]) -> None:
        """Make `rows` writable; allocates the slabs they lie in."""
        for row in rows:
            slab = row // self.slab_rows
            if slab not in self.slabs:
                self._grow(slab)
            self._live[slab].add(row)

    def drop(self, rows: list[int]) -> None:
        """Give `rows` back; a slab without live rows returns to the allocator."""
        for row in rows:
            slab = row // self.slab_rows
            live = self._live.get(slab)
            if live is None:
                continue
            live.discard(row)
            if not live:
                self._shrink(slab)

    def write(self, layer: int, rows: list[int], values: dict[str, Tensor]) -> None:
        """`values`: plane name -> [N, *shape] for the N `rows`."""
        for slab, where, local in self._by_slab(rows):
            for name, view in self._views[slab].items():
                view[layer, local] = values[name][where].to(view.device)  # host blocks come back

    def read(self, layer: int, rows: list[int]) -> dict[str, Tensor]:
        """Plane name -> [N, *shape], a copy, in the order of `rows` (grouped by ascending runs)."""
        parts = [
            {name: view[layer, local] for name, view in self._views[slab].items()}
            for slab, _, local in self._by_slab(rows)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in self.planes}

    def row(self, layer: int, row: int) -> dict[str, Tensor]:
        """Plane name -> the live [*shape] of one row, a view."""
        slab, local = divmod(row, self.slab_rows)
        return {name: view[layer, local] for name, view in self._views[slab].items()}

    def layer(self, layer: int) -> LayerPlanes:
        """Addresses and strides of one layer, for the kernels."""
        if layer not in self._layers:
            self._layers[layer] = {
                name: PlaneView(
                    self._offsets[name] + layer * self.slab_rows * plane.nbytes,
                    plane.nbytes, plane.shape, plane.dtype,
                )
                for name, plane in self.planes.items()
            }
        return LayerPlanes(self.base, self.slabs, self.slab_rows, self._layers[layer])

    @property
    def base(self) -> Tensor:
        """Device table of slab addresses; committed on first use, since only kernels read it."""
        if self._base is None:
            with torch.inference_mode(False):  # else nobody may write to it outside of that mode
                self._base = torch.zeros(MAX_SLABS, dtype=torch.int64, device=self.device)
            for slab, buffer in self.slabs.items():
                self._base[slab] = buffer.data_ptr()
        return self._base

    @property
    def nbytes(self) -> int:
        table = 0 if self._base is None else self._base.nbytes
        return len(self.slabs) * self.slab_bytes + table

    @property
    def live_rows(self) -> int:
        return sum(map(len, self._live.values()))

    def _grow(self, slab: int) -> None:
        if slab >= MAX_SLABS:
            raise KvlabError(
                f"the cache would need more than {MAX_SLABS} slabs of {self.slab_rows} blocks; "
                "use a larger cache.block_size"
            )
        with torch.inference_mode(False):  # who writes later may be in another mode
            buffer = torch.empty(self.slab_bytes, dtype=torch.uint8, device=self.device)
            self._views[slab] = {n: self._view(buffer, n, p) for n, p in self.planes.items()}
        self.slabs[slab], self._live[slab] = buffer, set()
        if self._base is not None:
            self._base[slab] = buffer.data_ptr()

    def _view(self, buffer: Tensor, name: str, plane: Plane) -> Tensor:
        shape = (self.layers, self.slab_rows, *plane.shape)
        start, size = self._offsets[name], prod(shape) * plane.dtype.itemsize
        return buffer[start : start + size].view(plane.dtype).view(shape)

    def _shrink(self, slab: int) -> None:
        del self.slabs[slab], self._views[slab], self._live[slab]
        if self._base is not None:
            self._base[slab] = 0

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


class Workspace:
    """Two buffers in the compute dtype that dequantized pieces of the past pass through."""

    def __init__(self):
        self._buffers: tuple[Tensor, Tensor] | None = None

    def take(self, tokens: int, heads: int, dim: int, dtype, device) -> tuple[Tensor, Tensor]:
        """Two [tokens, heads, dim], overwritten by the next call; grown where too small."""
        size = tokens * heads * dim
        if self._buffers is None or self._buffers[0].numel() < size:
            self._buffers = None  # the old ones first: both would not fit under a tight cap
            self._buffers = tuple(torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        return tuple(b[:size].view(tokens, heads, dim) for b in self._buffers)

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self._buffers or ())


class BlockPool:
    """Sealed blocks in their format, open blocks in the compute dtype.

    geometry: what a block holds, `layers` being those of this pool's layer group.
    dtype: the model's compute dtype, in which keys and values arrive and leave.
    kernels: see `fused_kernels`; workspace: shared by the pools of one cache.
    """

    def __init__(
        self, geometry: CacheGeometry, format: KVFormat, device, dtype: torch.dtype,
        kernels: str = "torch", workspace: Workspace | None = None,
    ):
        self.geometry, self.format, self.dtype = geometry, format, dtype
        self.block_size = geometry.block_size
        self.device = torch.device(device)
        self.fused = fused_kernels(self.device.type, kernels)
        self.workspace = workspace or Workspace()
        g = geometry
        rows = max(1, SLAB_TOKENS // g.block_size)
        self.sealed = SlabStore(format.planes(g), g.layers, rows, device)
        dense = KVFormat(*(Dense(str(dtype).removeprefix("torch.")) for _ in range(2)))
        self.open = SlabStore(dense.planes(g), g.layers, 1, device)
        self._open_row: dict[int, int] = {}
        self._free_rows: list[int] = []

    @property
    def exact(self) -> bool:
        """Whether sealing loses nothing, so that a block read back is what was written."""
        sides = self.format.key, self.format.value
        return all(isinstance(c, Dense) and c.dtype in (self.dtype, torch.float32) for c in sides)

    # ---- open blocks

    def open_block(self, block: int, contents: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """Give `block` a place to collect tokens in, [L, H, S, D] twice.

        contents: keys and values [n, H, D] of each layer, for its first slots.
        """
        row = self._free_rows.pop() if self._free_rows else len(self._open_row)
        self._open_row[block] = row
        self.open.commit([row])
        for layer, pair in enumerate(contents):
            self.write(layer, block, 0, *pair)

    def close_block(self, block: int) -> None:
        """Take the open place back: the block was sealed or abandoned."""
        row = self._open_row.pop(block)
        self.open.drop([row])
        self._free_rows.append(row)

    def is_open(self, block: int) -> bool:
        return block in self._open_row

    def open_row(self, block: int) -> int:
        """Row of the open store in which `block` collects its tokens."""
        return self._open_row[block]

    def write(self, layer: int, block: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v` [n, H, D] in the open `block` from `slot` on."""
        row = self.open.row(layer, self._open_row[block])
        for name, x in (("k_data", k), ("v_data", v)):
            row[name][:, slot : slot + x.shape[0]] = x.transpose(0, 1)

    def read_open(self, layer: int, block: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens of an open block, [count, H, D] views."""
        row = self.open.row(layer, self._open_row[block])
        return tuple(row[name][:, :count].transpose(0, 1) for name in ("k_data", "v_data"))

    # ---- sealed blocks

    def ids(self, blocks: list[int]) -> Tensor | None:
        """Block ids as the kernels want them, int64 [n] on the device; None without kernels."""
        if self.fused is None:
            return None
        return torch.tensor(blocks).to(self.device, non_blocking=True)

    def seal(
        self, layer: int, blocks: list[int], k: Tensor, v: Tensor, ids: Tensor | None = None
    ) -> None:
        """Quantize `k`, `v` [n*S, H, D] into the n `blocks`; they are read-only from then on.

        ids: `self.ids(blocks)`, where the caller has them already.
        """
        self.sealed.commit(blocks)
        if self.fused is not None:
            ids = self.ids(blocks) if ids is None else ids
            k, v = k.contiguous(), v.contiguous()
            self.fused.seal(k, v, self.format, self.sealed.layer(layer), ids)
            return
        shape = (len(blocks), self.geometry.block_size, *k.shape[1:])
        self.sealed.write(layer, blocks, self.format.quantize(k.reshape(shape), v.reshape(shape)))

    def seal_open(self, blocks: list[int]) -> None:
        """Seal full open `blocks` in all layers; their open places are given back."""
        self.sealed.commit(blocks)
        if self.fused is not None and blocks:
            rows, layers = [self._open_row[b] for b in blocks], self.geometry.layers
            self.fused.seal_open(
                self.open.layer(0), self.sealed.layer(0), self.format, self.ids(rows),
                self.ids(blocks), layers,
            )
        for block in blocks:
            if self.fused is None:
                for layer in range(self.geometry.layers):
                    self.seal(layer, [block], *self.read_open(layer, block, self.block_size))
            self.close_block(block)

    def read(
        self, layer: int, blocks: list[int], ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sealed `blocks`, dequantized: two [n*S, H, D] in the compute dtype.

        With kernels they lie in the workspace, until the next read.
        """
        if self.fused is not None:
            ids = self.ids(blocks) if ids is None else ids
            return self.gather(self.sealed.layer(layer), ids)
        k, v = self.format.dequantize(self.sealed.read(layer, blocks), self.dtype)
        return k.flatten(0, 1), v.flatten(0, 1)

    def gather(self, planes: LayerPlanes, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks `ids` of any planes in this format, dequantized into the workspace."""
        g = self.geometry
        tokens = len(ids) * g.block_size
        out = self.workspace.take(tokens, g.kv_heads, g.head_dim, self.dtype, self.device)
        self.fused.gather(planes, self.format, ids, *out)
        return out

    def drop(self, blocks: list[int]) -> None:
        """Forget `blocks`, open or sealed."""
        for block in blocks:
            if block in self._open_row:
                self.close_block(block)
        self.sealed.drop(blocks)

    @property
    def nbytes(self) -> int:
        """Bytes really held, from the tensors: scales, open blocks and tables included."""
        return self.sealed.nbytes + self.open.nbytes
