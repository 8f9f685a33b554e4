"""Kernels that work on blocks where they lie in their slabs, in plain torch: the ground truth.

`planes` is a `LayerPlanes` of the pool: base addresses for the kernels, and the slabs themselves,
which are what this file reads. `format` is a `KVFormat`. Loops over blocks and rows: slow, for
tests, and for a look at one block by hand.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.kernel import attend_ref


class First(NamedTuple):
    """First tokens of a batch's sequences that are read from beside their blocks.

    planes  `LayerPlanes` of `pool.Apart`: k_data, v_data [H, n, D], count [H]
    row     int32 [B], of that store
    block   int32 [B], the id, as tables have it, of the block that begins with them; -1: none
    """

    planes: object
    row: Tensor
    block: Tensor


def block_views(planes, block: int, layer: int = 0) -> dict[str, Tensor]:
    """Plane name -> the [*shape] of one block, a view; `layer` counts from the planes' own."""
    slab, slot = divmod(block, planes.slab_blocks)
    out = {}
    for name, p in planes.planes.items():
        size = prod(p.shape) * p.dtype.itemsize
        start = p.offset_bytes + (layer * planes.slab_blocks + slot) * p.block_stride_bytes
        raw = planes.slabs[slab][start : start + size]
        out[name] = raw.view(p.dtype).view(p.shape)
    return out


def seal_open(open, sealed, format, rows: Tensor, blocks: Tensor, layers: int) -> None:
    """Full open blocks of all layers, quantized into sealed ones.

    open, sealed: `LayerPlanes` of the first of `layers` consecutive layers, rows committed;
    rows, blocks: int [n] on the device: row of the open store -> sealed block. The open rows stay
    as they are.
    """
    for row, block in zip(rows.tolist(), blocks.tolist()):
        for layer in range(layers):
            full = block_views(open, row, layer)
            k, v = (full[name].transpose(0, 1)[None] for name in ("k_data", "v_data"))
            stored = format.quantize(k, v)
            for name, view in block_views(sealed, block, layer).items():
                view.copy_(stored[name][0])


def seal_kept(k: Tensor, v: Tensor, index: Tensor, format, planes, block_ids: Tensor) -> None:
    """Of keys and values [L, n, H, D] the tokens `index` int64 [L, H, m * S] of each head,
    quantized into the m sealed blocks `block_ids` of L consecutive layers; `planes`: of the first.
    """
    for layer, places in enumerate(index):
        at = places.T[..., None]
        kept = (x[layer].gather(0, at.expand(-1, -1, x.shape[-1])) for x in (k, v))
        stored = format.quantize(*(x.unflatten(0, (len(block_ids), -1)) for x in kept))
        for i, block in enumerate(block_ids.tolist()):
            for name, view in block_views(planes, block, layer).items():
                view.copy_(stored[name][i])


def paged_decode(
    q: Tensor, sealed, format, table: Tensor, n_blocks: Tensor, open, open_slot: Tensor,
    open_len: Tensor, *, scale: float, mass: Tensor | None = None, setting=None,
    new: tuple[Tensor, Tensor] | None = None, scratch=None, apart: First | None = None,
) -> tuple[Tensor, Tensor]:
    """As `decode_triton.paged_decode`, in fp32; its launch settings have no meaning here."""
    rows, heads, _ = q.shape
    kv_heads, slots, _ = open.planes["k_data"].shape
    places = open_slot.view(rows, -1).tolist()
    for b, count in enumerate(open_len.tolist() if new else ()):
        if 0 < count <= len(places[b]) * slots:
            tail = block_views(open, places[b][(count - 1) // slots])
            for name, x in zip(("k_data", "v_data"), new):
                tail[name][:, (count - 1) % slots] = x[b]
    group = heads // kv_heads
    out, lse = torch.zeros_like(q), q.new_full((rows, heads), -torch.inf, dtype=torch.float32)
    per_head = table.ndim == 3
    for b in range(rows):
        for h in range(kv_heads):
            line = (b, h) if per_head else b
            ids = table[line][: int(n_blocks[line])].tolist()
            k, v = _past(sealed, format, ids, open, places[b], int(open_len[b]), h)
            if apart is not None and ids and ids[0] == int(apart.block[b]):
                row = block_views(apart.planes, int(apart.row[b]))
                for name, x in (("k_data", k), ("v_data", v)):
                    n = int(row["count"][h])
                    x[:n, 0] = row[name][h, :n].float()
            mine = slice(h * group, (h + 1) * group)
            part, part_lse = attend_ref.attend(q[b, mine, None], k, v, scale=scale)
            out[b, mine], lse[b, mine] = part[:, 0].to(q.dtype), part_lse[:, 0]
            if mass is not None:
                mass[b, mine] = 0
                if ids:
                    whole = k[: len(ids) * slots]
                    own = attend_ref.block_lse(
                        q[b, mine, None], whole, scale=scale, block_size=slots
                    )
                    mass[b, mine, : len(ids)] = (own[:, 0] - part_lse).exp()
    return out, lse


def _past(sealed, format, ids: list[int], open, rows: list[int], count: int, head: int):
    """Keys and values fp32 [n, 1, D] of one head: sealed blocks, then `count` tokens of open ones.
    """
    parts = []
    for block in ids:
        views = {name: x[None] for name, x in block_views(sealed, block).items()}
        k, v = format.dequantize(views, torch.float32)
        parts.append((k[0, :, head], v[0, :, head]))
    slots = open.planes["k_data"].shape[1]
    for begin, row in zip(range(0, count, slots), rows):
        tail, n = block_views(open, row), min(slots, count - begin)
        parts.append(tuple(tail[name][head, :n].float() for name in ("k_data", "v_data")))
    if not parts:
        return (torch.zeros(0, 1, open.planes["k_data"].shape[2], device=sealed.base.device),) * 2
    return tuple(torch.cat(x)[:, None] for x in zip(*parts))
