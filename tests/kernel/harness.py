"""Planes in slabs, laid out by hand: what the pool promises to the kernels, without the pool."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvlab.core import CacheGeometry
from kvlab.format import Dense, KVFormat


class View(NamedTuple):
    offset_bytes: int
    block_stride_bytes: int
    shape: tuple
    dtype: torch.dtype


class Planes(NamedTuple):
    base: torch.Tensor
    slabs: dict
    slab_blocks: int
    planes: dict


class Store:
    """Slabs of `rows` blocks for `layers` layers, filled with noise; `blocks` in all."""

    def __init__(self, planes, layers, rows, blocks, device):
        self.specs, self.rows, self.device = planes, rows, device
        self.starts, end = {}, 0
        for name, plane in planes.items():
            self.starts[name] = end
            end += -(-layers * rows * plane.nbytes // 256) * 256
        self.slabs = {
            i: torch.randint(0, 256, (end,), dtype=torch.uint8, device=device)
            for i in range(-(-blocks // rows))
        }
        self.base = torch.zeros(64, dtype=torch.int64, device=device)
        for i, slab in self.slabs.items():
            self.base[i] = slab.data_ptr()

    def block(self, layer: int, block: int) -> dict:
        """Plane name -> the [*shape] view of one block."""
        slab, out = self.slabs[block // self.rows], {}
        for name, plane in self.specs.items():
            start = self.starts[name] + (layer * self.rows + block % self.rows) * plane.nbytes
            raw = slab[start : start + plane.nbytes]
            out[name] = raw.view(plane.dtype).view(plane.shape)
        return out

    def write(self, layer: int, blocks: list[int], values: dict) -> None:
        for i, block in enumerate(blocks):
            for name, view in self.block(layer, block).items():
                view.copy_(values[name][i])

    def read(self, layer: int, blocks: list[int]) -> dict:
        views = [self.block(layer, b) for b in blocks]
        return {name: torch.stack([v[name] for v in views]) for name in self.specs}

    def layer(self, layer: int) -> Planes:
        views = {
            name: View(self.starts[name] + layer * self.rows * p.nbytes, p.nbytes, p.shape, p.dtype)
            for name, p in self.specs.items()
        }
        return Planes(self.base, self.slabs, self.rows, views)


def stores(format, geometry, blocks, rows, dtype, device):
    """A sealed and an open store for two layers."""
    dense = KVFormat(*(Dense(str(dtype).removeprefix("torch.")) for _ in range(2)))
    sealed = Store(format.planes(geometry), 2, 4, blocks, device)
    return sealed, Store(dense.planes(geometry), 2, 1, rows, device)


class Past(NamedTuple):
    """A ragged batch as the kernels see it, and what it stands for in fp32."""

    sealed: Store
    open: Store
    format: KVFormat
    args: tuple  # table, n_blocks, open_slot, open_len
    keys: list  # fp32 [n, H, D] per row, as stored
    values: list
    geometry: CacheGeometry


def past(format, lengths, *, H=2, G=2, D=64, S=16, dtype=torch.float16, device="cpu", sink=0.0,
         residual=0):  # fmt: skip
    """`lengths` tokens per row in random blocks; `sink` is added to every row's first key.
    residual: so many whole blocks before the tail are open ones, too."""
    geometry = CacheGeometry(2, H * G, H, D, S)
    counts, opened = [max(0, n // S - residual) for n in lengths], residual + 1
    rows = len(lengths) * opened + 1
    sealed, open_ = stores(format, geometry, sum(counts) + 6, rows, dtype, device)
    places = (torch.randperm(rows - 1) if residual else torch.arange(rows - 1)).view(-1, opened) + 1
    free = torch.randperm(sum(counts) + 5).tolist()
    table = torch.full((len(lengths), max(counts) + 3), -1, dtype=torch.int32)
    keys, values = [], []
    for b, (n, count) in enumerate(zip(lengths, counts)):
        k, v = (torch.randn(n, H, D, device=device).to(dtype) for _ in range(2))
        k[:, :, 3] *= 6  # the outlier channel that keys have
        k[:1] += sink
        v += 0.5
        ids, free = free[:count], free[count:]
        table[b, :count] = torch.tensor(ids, dtype=torch.int32)
        whole = count * S
        stored = (k[:0].float(), v[:0].float())
        if count:
            blocks = (x[:whole].reshape(count, S, H, D) for x in (k, v))
            sealed.write(1, ids, format.quantize(*blocks))
            pair = format.dequantize(sealed.read(1, ids), torch.float32)
            stored = tuple(x.flatten(0, 1) for x in pair)
        for i, place in enumerate(places[b].tolist()):
            views, begin = open_.block(1, place), whole + i * S
            for name, x in (("k_data", k), ("v_data", v)):
                views[name].fill_(float("nan"))  # slots beyond the tail must not be read into it
                views[name][:, : max(0, min(S, n - begin))] = x[begin : begin + S].transpose(0, 1)
        keys.append(torch.cat([stored[0], k[whole:].float()]))
        values.append(torch.cat([stored[1], v[whole:].float()]))

    def ints(x):
        return torch.tensor(x, dtype=torch.int32, device=device)

    tails = [n - c * S for n, c in zip(lengths, counts)]
    args = (table.to(device), ints(counts), ints((places if residual else places[:, 0]).tolist()),
            ints(tails))
    return Past(sealed, open_, format, args, keys, values, geometry)


