"""Decode attention over sealed blocks and the open tail, in Triton.

One query token per sequence. The past of each sequence is split over programs (flash decoding,
https://pytorch.org/blog/flash-decoding/); each program multiplies stored bytes directly
(`decode_split_triton`), and a second small kernel merges the partial results.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.core import BadInput
from kvlab.format import Dense, Fp8, Int, KVFormat
from kvlab.format.base import resolve_axis
from kvlab.kernel import tune
from kvlab.kernel.codes_triton import narrow
from kvlab.kernel.decode_split_triton import decode_split_kernel

LOG2E = 1.4426950408889634
TYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv, torch.uint8: tl.uint8,
}


@triton.jit
def combine_kernel(
    part_out, part_lse, out, lse, splits, G: tl.constexpr, D: tl.constexpr, SP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merges the splits of WIDTH dims of one query head; writes the natural log-sum-exp."""
    bh, g, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, d = tl.arange(0, SP), c * WIDTH + tl.arange(0, WIDTH)
    at = (bh * splits + i) * G + g
    part = tl.load(part_lse + at, mask=i < splits, other=-float("inf"))
    top = tl.maximum(tl.max(part, 0), -1e30)
    weight = tl.exp2(part - top)
    total = tl.sum(weight, 0)
    x = tl.load(part_out + at[:, None] * D + d[None, :], mask=(i < splits)[:, None], other=0.0)
    x = tl.sum(x * weight[:, None], 0) / tl.maximum(total, 1e-37)
    tl.store(out + (bh * G + g) * D + d, narrow(x, out.dtype.element_ty))
    nat = (top + tl.log2(tl.maximum(total, 1e-37))) * 0.6931471805599453
    if c == 0:
        tl.store(lse + bh * G + g, tl.where(total > 0, nat, -float("inf")))


@triton.jit
def mass_kernel(cell_lse, lse, mass, n_blocks, max_blocks, TPB: tl.constexpr, HQ: tl.constexpr,
                WIDTH: tl.constexpr):
    """Share of attention of each sealed block, [B, Hq, max_blocks]; 0 beyond the sequence."""
    r, i = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    known = i < tl.load(n_blocks + r // HQ)
    total = tl.load(lse + r) * 1.4426950408889634
    share = tl.zeros([WIDTH], tl.float32)
    for c in tl.static_range(TPB):
        at = cell_lse + (r * max_blocks + i) * TPB + c
        share += tl.exp2(tl.load(at, mask=known, other=-1e30) - total)
    tl.store(mass + r * max_blocks + i, tl.where(known, share, 0.0), mask=i < max_blocks)


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _stride(planes, name: str) -> int:
    return planes[name].block_stride_bytes if name in planes else 0


def _is_channel(codec, slots: int) -> bool:
    return not isinstance(codec, Dense) and resolve_axis(codec.axis, slots) == "channel"


def _side(codec, prefix: str, planes, slots: int, dim: int) -> dict:
    """Compile-time facts about one side (keys or values) of a format."""
    data = planes[prefix + "data"]
    heads, p = data.shape[0], prefix[0].upper()
    bits = codec.bits if isinstance(codec, Int) else 0
    parts = 2 if bits == 4 and dim >= 64 else 1
    symmetric = bool(bits) and codec.symmetric
    bias = (-(2 ** (bits - 1)) if symmetric else 0) + 128 * (bits == 8) if bits else 0
    last = getattr(codec, "slots_last", False)
    fp8 = isinstance(codec, Fp8)
    return {
        f"{p}_KIND": 0 if isinstance(codec, Dense) else 1 if fp8 else 2,
        f"{p}_BITS": bits, f"{p}_DT": TYPES[data.dtype],
        f"{p}_MT": tl.float16 if fp8 else TYPES[data.dtype], f"{p}_PARTS": parts,
        f"{p}_WIDE": bits in (2, 3) or (bits == 4 and parts == 1),
        f"{p}_LAST": last, f"{p}_VEC": gcd(slots if last else data.shape[2], 16 // data.dtype.itemsize),
        f"{p}_CHANNEL": _is_channel(codec, slots), f"{p}_BIAS": float(bias),
        f"{p}_STORED": bool(bits) and not symmetric,
        f"{p}DS": data.block_stride_bytes // heads,
        f"{p}HS": _stride(planes, prefix + "high") // heads,
        f"{p}SS": _stride(planes, prefix + "scale") // heads,
    }


def _tile(format: KVFormat, slots: int, wanted: int) -> tuple[int, int, bool]:
    """Tokens of a tile, tiles of a block, and whether a tile covers several blocks."""
    one_block = _is_channel(format.key, slots) or _is_channel(format.value, slots)
    whole = slots & (slots - 1) == 0
    if not whole or (one_block and slots < wanted):
        tile = max(32, _next_power(slots))  # 32: the least depth of a product of bytes
        return tile, 1, False
    return wanted, max(1, slots // wanted), slots < wanted


_scratch: dict[tuple, Tensor] = {}


def _buffer(name: str, size: int, device) -> Tensor:
    """Reused fp32 scratch; grows outside captured graphs, whose replays keep the old one alive."""
    key = (name, device)
    if key not in _scratch or _scratch[key].numel() < size:
        _scratch[key] = torch.empty(size, dtype=torch.float32, device=device)
    return _scratch[key]



def _kind(format: KVFormat) -> str:
    if isinstance(format.key, Dense) and isinstance(format.value, Dense):
        return "dense"
    return "fp8" if isinstance(format.key, Fp8) else "int"


def _check(q: Tensor, sealed, open) -> None:
    dim = q.shape[2]
    if dim & (dim - 1) or dim < 32:
        raise BadInput("head_dim", dim, "the decode kernel takes 32, 64, 128 or 256; use the reference")
    if open.planes["k_data"].dtype not in TYPES:
        raise BadInput("dtype", open.planes["k_data"].dtype, "must be float32, float16 or bfloat16")
    if q.stride(2) != 1 or not q.is_contiguous():
        raise BadInput("q", tuple(q.stride()), "must be contiguous")


def paged_decode(
    q: Tensor, sealed, format: KVFormat, table: Tensor, n_blocks: Tensor, open, open_slot: Tensor,
    open_len: Tensor, *, scale: float, mass: Tensor | None = None, setting=None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per row over its sealed blocks and its open tail.

    q: [B, Hq, D]; sealed, open: `LayerPlanes` of this layer; table: int32 [B, max_blocks] of block
    ids, the first n_blocks[b] of row b in use; open_slot, open_len: int32 [B], the row of the open
    store and its number of tokens (0: none). scale: of the logits. mass: fp32 [B, Hq, max_blocks],
    receives each sealed block's share of attention. setting: launch settings, see `tune`.

    Returns out [B, Hq, D] in q's dtype and lse fp32 [B, Hq] (natural log; -inf for an empty row).
    Nothing depends on a length on the host, so the call can be captured in a graph.
    """
    _check(q, sealed, open)
    rows, heads, dim = q.shape
    data = sealed.planes["k_data"]
    kv_heads = data.shape[0]
    slots = open.planes["k_data"].shape[1]
    device, count = tune.device_facts(q.device)
    key = f"decode {format.identity} S{slots} D{dim} G{heads // kv_heads}"
    wanted, warps, stages, fill, *cap = setting or tune.choose(device, key, _kind(format))
    tile, per_block, multi = _tile(format, slots, wanted)
    splits = max(1, min(count * fill // (rows * kv_heads), -(-table.shape[1] * slots // tile)))
    group = heads // kv_heads
    padded = _next_power(group)
    part_out = _buffer("out", rows * heads * splits * dim, q.device)
    part_lse = _buffer("lse", rows * heads * splits, q.device)
    cells = None
    if mass is not None:
        cells = _buffer("cells", rows * heads * table.shape[1] * per_block, q.device)
    out, lse = torch.empty_like(q), torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    offset = {n: p.offset_bytes for n, p in sealed.planes.items()}
    names = [f"{s}_{n}" for s in "kv" for n in ("data", "high", "scale", "zero")]
    decode_split_kernel[(rows * kv_heads, splits)](
        q, part_out, part_lse, cells, sealed.base, table, n_blocks, open.base, open_slot, open_len,
        table.shape[1], splits, scale * LOG2E, *(offset.get(n, 0) for n in names),
        open.planes["k_data"].offset_bytes, open.planes["v_data"].offset_bytes,
        H=kv_heads, G=group, GP=padded, D=dim, S=slots, P=sealed.slab_blocks,
        OPEN_P=open.slab_blocks, WARPS=warps, TILE=tile, TPB=per_block, MULTI=multi, ND=2,
        MASS=mass is not None, OPEN_DT=TYPES[open.planes["k_data"].dtype],
        **_side(format.key, "k_", sealed.planes, slots, dim),
        **_side(format.value, "v_", sealed.planes, slots, dim),
        num_warps=warps, num_stages=stages, **({"maxnreg": cap[0]} if cap else {}),
    )
    combine_kernel[(rows * kv_heads, group, dim // 32)](
        part_out, part_lse, out, lse, splits, G=group, D=dim, SP=_next_power(splits), WIDTH=32
    )
    if mass is not None:
        width = min(256, _next_power(table.shape[1]))
        mass_kernel[(rows * heads, triton.cdiv(table.shape[1], width))](
            cells, lse, mass, n_blocks, table.shape[1], TPB=per_block, HQ=heads, WIDTH=width
        )
    return out, lse
