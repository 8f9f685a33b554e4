"""Decode attention over sealed blocks and the open tail, in Triton.

One query token per sequence. The past of each sequence is split over programs (flash decoding,
https://pytorch.org/blog/flash-decoding/); each program multiplies stored bytes directly
(`decode_split_triton`), and a second small kernel merges the partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kvlab.core import BadInput
from kvlab.format import KVFormat
from kvlab.kernel import tune
from kvlab.kernel.codes_triton import narrow
from kvlab.kernel.decode_split_triton import decode_split_kernel
from kvlab.kernel.scratch import Scratch
from kvlab.kernel.sides import TYPES, Frame, Side, next_power, offsets, sides

LOG2E = 1.4426950408889634

@triton.jit
def combine_kernel(
    part_out, part_lse, out, lse, splits, G: tl.constexpr, D: tl.constexpr, SP: tl.constexpr,
    WIDTH: tl.constexpr, CHAINED: tl.constexpr,
):
    """Merges the splits of WIDTH dims of one query head; writes the natural log-sum-exp.

    CHAINED: launched before the split kernel has ended; waits for what it wrote.
    """
    if CHAINED:
        gdc_wait()
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
def mass_kernel(cell_lse, lse, mass, n_blocks, max_blocks, TPB: tl.constexpr, HEADS: tl.constexpr,
                WIDTH: tl.constexpr):
    """Share of attention of each sealed block, [B, Hq, max_blocks]; 0 beyond the sequence.

    HEADS: query heads that share a row of the table.
    """
    r, i = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    known = i < tl.load(n_blocks + r // HEADS)
    total = tl.load(lse + r) * 1.4426950408889634
    share = tl.zeros([WIDTH], tl.float32)
    for c in tl.static_range(TPB):
        at = cell_lse + (r * max_blocks + i) * TPB + c
        share += tl.exp2(tl.load(at, mask=known, other=-1e30) - total)
    tl.store(mass + r * max_blocks + i, tl.where(known, share, 0.0), mask=i < max_blocks)


def _tile(k: Side, v: Side, slots: int, wanted: int) -> tuple[int, int, bool]:
    """Tokens of a tile, tiles of a block, and whether a tile covers several blocks.

    Scales per channel belong to one block, so there a tile does too. 32 tokens is the least depth
    of a product of bytes; a smaller block leaves the rest of its tile empty.
    """
    whole = slots & (slots - 1) == 0
    if not whole or ((k.channel or v.channel) and slots < wanted):
        return max(32, next_power(slots)), 1, False
    return wanted, max(1, slots // wanted), slots < wanted


def _splits(rows: int, kv_heads: int, resident: int) -> int:
    """Programs per row and key/value head: those `resident` at a time, or whole rounds of them.

    A batch gets three or more, so that the longest of ragged rows is not one program's work.
    """
    pairs = rows * kv_heads

    def busy(splits: int) -> float:
        return pairs * splits / (-(-pairs * splits // resident) * resident)

    tried = {resident // pairs, *range(3 if rows > 1 else 1, 9)} - {0}
    return max(sorted(tried), key=lambda n: round(busy(n), 2))


def setting_key(format: KVFormat, slots: int, dim: int, group: int) -> str:
    """Name of a kernel and shape in the table of measured settings."""
    return f"decode {format.identity} S{slots} D{dim} G{group}"


def _setting(format: KVFormat, k: Side, v: Side, slots: int, key: str, device: str):
    """Launch settings: stored for this device and shape, or the defaults of the wider side."""
    bits = max(16 if c.kind == 0 else 8 if c.kind == 1 else c.bits for c in (k, v))
    fp8 = 1 in (k.kind, v.kind)
    kind = "dense" if bits == 16 else "fp8" if fp8 else "low" if bits < 4 else f"int{bits}"
    span = slots if k.channel or v.channel or slots == 64 else 256
    return tune.choose(device, key, kind, max(slots, span))


def _check(
    q: Tensor, kv_heads: int, table: Tensor, n_blocks: Tensor, open_slot: Tensor, open_len: Tensor
) -> None:
    rows, _, dim = q.shape
    if dim & (dim - 1) or not 32 <= dim <= 256:
        raise BadInput("head_dim", dim, "the decode kernel takes 32, 64, 128 or 256")
    if not q.is_contiguous() or not (table.is_contiguous() and n_blocks.is_contiguous()):
        raise BadInput("q, table", (q.stride(), table.stride()), "must be contiguous")
    lines = (rows, kv_heads) if table.ndim == 3 else (rows,)
    if table.shape[:-1] != lines or n_blocks.shape != lines or not table.shape[-1]:
        raise BadInput("table", tuple(table.shape), f"with n_blocks {tuple(n_blocks.shape)}: one "
                       "line per row or per row and key/value head, of at least one column")
    for name, x in (("table", table), ("n_blocks", n_blocks), ("open_slot", open_slot),
                    ("open_len", open_len)):
        if x.dtype != torch.int32:
            raise BadInput(name, x.dtype, "must be int32")


def paged_decode(
    q: Tensor, sealed, format: KVFormat, table: Tensor, n_blocks: Tensor, open, open_slot: Tensor,
    open_len: Tensor, *, scale: float, mass: Tensor | None = None, setting=None,
    after_append: bool = False, scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per row over its sealed blocks and its open tail.

    q: [B, Hq, D]; sealed, open: `LayerPlanes` of this layer, whose addresses may be pinned host
    memory; table: int32 [B, max_blocks] of block ids, the first n_blocks[b] of row b in use, or
    [B, H, max_blocks] with n_blocks [B, H] where each key/value head reads blocks of its own
    (retrieval); open_slot, open_len: int32 [B], the row of the open store and its number of tokens
    (0: none). scale: of the logits. mass: fp32 [B, Hq, max_blocks], receives each sealed block's
    share of attention. setting: launch settings, see `tune`.
    after_append: the kernel launched before this one is `append`, and table, n_blocks and sealed
    blocks were written before it; then they are looked up while it still runs.
    scratch: where partial results lie until they are merged; None: made for this call.

    Returns out [B, Hq, D] in q's dtype and lse fp32 [B, Hq] (natural log; -inf for an empty row).
    Nothing depends on a length on the host, so the call can be captured in a graph (after one call
    outside, which compiles).
    """
    rows, heads, dim = q.shape
    tail = open.planes["k_data"]
    kv_heads, slots, _ = tail.shape
    _check(q, kv_heads, table, n_blocks, open_slot, open_len)
    group, width = heads // kv_heads, table.shape[-1]
    k, v = sides(format, sealed.planes, slots, dim)
    gpu = tune.device_facts(q.device)
    wanted, warps, stages, fill, *cap = setting or _setting(
        format, k, v, slots, setting_key(format, slots, dim, group), gpu.name
    )
    tile, per_block, multi = _tile(k, v, slots, wanted)
    splits = min(_splits(rows, kv_heads, gpu.processors * fill), max(1, -(-width * slots // tile)))
    frame = Frame(
        H=kv_heads, G=group, GP=next_power(group), D=dim, S=slots, P=sealed.slab_blocks,
        open_P=open.slab_blocks, warps=warps, tile=tile, per_block=per_block, multi=multi,
        digits=2, mass=mass is not None, per_head=table.ndim == 3,
        chained=gpu.chained, after_append=after_append, open_dtype=TYPES[tail.dtype],
    )
    chain = {"launch_pdl": True} if gpu.chained else {}
    take, parts = (scratch or Scratch()).take, rows * heads * splits
    part_out, part_lse = take("out", parts * dim, q.device), take("lse", parts, q.device)
    cells = None if mass is None else take("cells", rows * heads * width * per_block, q.device)
    out, lse = torch.empty_like(q), torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    decode_split_kernel[(rows * kv_heads, splits)](
        q, part_out, part_lse, cells, sealed.base, table, n_blocks, open.base, open_slot, open_len,
        width, splits, scale * LOG2E, *offsets(sealed.planes), tail.offset_bytes,
        open.planes["v_data"].offset_bytes, F=frame, K=k, V=v, num_warps=warps, num_stages=stages,
        **({"maxnreg": cap[0]} if cap else {}), **chain,
    )
    combine_kernel[(rows * kv_heads, group, dim // 32)](
        part_out, part_lse, out, lse, splits, G=group, D=dim, SP=next_power(splits), WIDTH=32,
        CHAINED=gpu.chained, **chain,
    )
    if mass is not None:
        step = min(256, next_power(width))
        mass_kernel[(rows * heads, triton.cdiv(width, step))](
            cells, lse, mass, n_blocks, width, TPB=per_block,
            HEADS=group if frame.per_head else heads, WIDTH=step,
        )
    return out, lse
