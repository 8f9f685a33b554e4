"""Single kernels on random stored values: what to call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.core import CacheGeometry
from kvlab.format import Dense, KVFormat
from kvlab.kernel import attend_sdpa
from kvlab.kernel.scratch import Scratch
from kvlab.pool import SLAB_TOKENS, SlabStore


class Shape(NamedTuple):
    """One attention layer; the defaults are Qwen3-0.6B's."""

    kv_heads: int = 8
    group: int = 2
    head_dim: int = 128
    device: str = "cuda"

    def geometry(self, slots: int, layers: int = 1) -> CacheGeometry:
        heads = self.kv_heads * self.group
        return CacheGeometry(layers, heads, self.kv_heads, self.head_dim, slots)

    def random(self, *lead: int, heads: int) -> Tensor:
        """bf16 [*lead, heads, head_dim]."""
        return torch.randn(*lead, heads, self.head_dim, device=self.device).bfloat16()


def random_store(
    format: KVFormat, shape: Shape, slots: int, blocks: int, layers: int = 1
) -> SlabStore:
    """A store with `blocks` sealed blocks of random codes and small positive scales."""
    rows = max(1, SLAB_TOKENS // slots)
    store = SlabStore(format.planes(shape.geometry(slots, layers)), layers, rows, shape.device)
    store.commit(list(range(blocks)))
    planes = store.layer(0).planes
    for slab in store.slabs.values():
        for name, p in planes.items():
            region = slab[p.offset_bytes : p.offset_bytes + layers * rows * p.block_stride_bytes]
            _noise(region.view(p.dtype), name)
    return store


def _noise(view: Tensor, name: str) -> None:
    if name.endswith(("scale", "zero", "unit", "mean")):
        view.copy_(torch.rand(view.shape, device=view.device) * 0.01 + 0.001)
    elif view.dtype == torch.uint8:
        view.random_(0, 256)
    else:
        view.copy_((100 * torch.randn(view.shape, device=view.device)).clamp(-448, 448))


def open_store(shape: Shape, slots: int, rows: int, layers: int = 1) -> SlabStore:
    return random_store(KVFormat(Dense("bfloat16"), Dense("bfloat16")), shape, slots, rows, layers)


class Decode(NamedTuple):
    """Decode attention of one layer over random blocks of `rows` rows."""

    store: SlabStore
    tail: SlabStore
    format: KVFormat
    shape: Shape
    rows: int
    blocks: int

    @property
    def nbytes(self) -> int:
        """Stored bytes that one call reads, scales included."""
        return self.rows * self.blocks * sum(p.nbytes for p in self.store.planes.values())

    def call(self, paged_decode: Callable, setting: tuple[int, ...] | None = None) -> Callable:
        shape, device = self.shape, self.shape.device
        q = shape.random(self.rows, heads=shape.kv_heads * shape.group)
        order = torch.randperm(self.rows * self.blocks, device=device)
        counts, slot, tail_len = (
            torch.full((self.rows,), n, dtype=torch.int32, device=device)
            for n in (self.blocks, 0, min(5, self.tail.layer(0).planes["k_data"].shape[1] - 1))
        )
        return partial(
            paged_decode, q, self.store.layer(0), self.format,
            order.int().view(self.rows, self.blocks), counts, self.tail.layer(0), slot, tail_len,
            scale=shape.head_dim**-0.5, setting=setting, scratch=Scratch(),
        )


def decode_case(format: KVFormat, shape: Shape, slots: int, rows: int, tokens: int) -> Decode:
    blocks = tokens // slots
    store = random_store(format, shape, slots, rows * blocks)
    return Decode(store, open_store(shape, slots, 1), format, shape, rows, blocks)


def prefill_call(
    kernels, format: KVFormat, shape: Shape, slots: int, tokens: int, past: int, segment: int
) -> Callable:
    """`tokens` new ones over a sealed past, piece by piece through a bounded workspace, as the
    cache does it: dequantize, the library's attention, merge; then the causal part."""
    store, heads = random_store(format, shape, slots, past // slots), shape.kv_heads * shape.group
    pieces = torch.randperm(past // slots, device=shape.device).split(segment // slots)
    q = shape.random(tokens, heads=heads).transpose(0, 1)
    own = [shape.random(tokens, heads=shape.kv_heads) for _ in range(2)]
    work = [shape.random(segment, heads=shape.kv_heads) for _ in range(2)]
    scale = shape.head_dim**-0.5

    def run() -> None:
        out, lse = attend_sdpa.attend(q, *own, scale=scale, causal=True)
        out, lse = out.float().contiguous(), lse.contiguous()
        for ids in pieces:
            k, v = (x[: len(ids) * slots] for x in work)
            kernels.gather(store.layer(0), format, ids, k, v)
            part, part_lse = attend_sdpa.attend(q, k, v, scale=scale)
            kernels.merge_into(out, lse, part, part_lse)

    return run


def causal_flops(heads: int, dim: int, tokens: int, past: int) -> int:
    """Of the products with keys and values that `tokens` new queries see."""
    return 4 * heads * dim * (tokens * past + tokens * (tokens + 1) // 2)
