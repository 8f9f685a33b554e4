"""Decode attention over sealed blocks and the open tail, in Triton.

One query token per sequence. The past of each sequence is split over programs (flash decoding,
https://pytorch.org/blog/flash-decoding/); each program multiplies stored bytes directly
(`decode_split_triton`). A second small kernel merges the partial results; of many rows, the last
program of each row and head does.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvlab.core import BadInput
from kvlab.format import KVFormat
from kvlab.kernel import tune
from kvlab.kernel.blocks_ref import First
from kvlab.kernel.decode_join_triton import combine_kernel, mass_kernel
from kvlab.kernel.decode_split_triton import decode_split_kernel
from kvlab.kernel.scratch import Scratch
from kvlab.kernel.sides import TYPES, Frame, Side, next_power, offsets, sides

LOG2E = 1.4426950408889634
RAGGED, LONG = 16, 1024  # parts that a long row of many may get, and tokens of each
JOINED = 40  # parts of a row and head that its last program merges, where there are many rows


def _tile(k: Side, v: Side, slots: int, wanted: int) -> dict[str, int | bool]:
    """Tokens of a tile, tiles of a block, and whether a tile covers several blocks.

    Scales per channel belong to one block, so there a tile does too. 32 tokens is the least depth
    of a product of bytes; a smaller block leaves the rest of its tile empty.
    """
    if folds(k, v):  # tiles of whole groups within one block
        tile = max(k.group, min(wanted, slots & -slots))
        return {"tile": tile, "per_block": slots // tile, "multi": False, "fold": True}
    grouped = bool(k.group or v.group)
    if grouped:  # a tile has one group of tokens, where the block has whole ones
        wanted = max(32, min([wanted] + [c.group for c in (k, v) if c.group and c.channel]))
    whole = slots % wanted == 0 if grouped else slots & (slots - 1) == 0
    if not whole or ((grouped or k.channel or v.channel) and slots < wanted):
        return {"tile": max(32, next_power(slots)), "per_block": 1, "multi": False}
    return {"tile": wanted, "per_block": max(1, slots // wanted), "multi": slots < wanted}


def folds(k: Side, v: Side) -> bool:
    """Whether scales go to the query and to the probabilities: groups of a channel's tokens in the
    keys, of a token's channels in the values, whose parts are wide enough for a product."""
    grouped = k.kind == v.kind == 3 and k.channel and not v.channel
    return grouped and not k.wide and not v.wide and min(k.group, v.group) >= 16


def _splits(rows: int, kv_heads: int, resident: int) -> int:
    """Programs per row and key/value head: those `resident` at a time, or whole rounds of them.

    A batch gets three or more, so that the longest of ragged rows is not one program's work; of a
    large one, whose three may still be long, a program takes `LONG` tokens at most, see `RAGGED`.
    """
    pairs = rows * kv_heads

    def busy(splits: int) -> float:
        return pairs * splits / (-(-pairs * splits // resident) * resident)

    tried = {resident // pairs, *range(3 if rows > 1 else 1, 9)} - {0}
    return max(sorted(tried), key=lambda n: round(busy(n), 2))


def _most(frame: Frame, width: int) -> int:
    """Programs that a table of `width` columns has work for; one of few is half empty mostly."""
    most = max(1, -(-width * frame.S // frame.tile))
    return -(-most // 2) if frame.fresh and width <= 64 else most


def _tails(pairs: int, slots: int, opened: int, gpu: tune.Device) -> int:
    """Programs for the open blocks: of few rows, one for every 32 tokens, read at once."""
    return -(-slots * opened // 32) if pairs <= gpu.processors else opened


def setting_key(format: KVFormat, slots: int, dim: int, group: int) -> str:
    """Name of a kernel and shape in the table of measured settings."""
    return f"decode {format.stored} S{slots} D{dim} G{group}"


def _setting(format: KVFormat, k: Side, v: Side, slots: int, key: str, device: str):
    """Launch settings: stored for this device and shape, or the defaults of the wider side."""
    bits = max(16 if c.kind == 0 else 8 if c.kind == 1 else c.bits for c in (k, v))
    fp8 = 1 in (k.kind, v.kind)
    kind = "dense" if bits == 16 else "fp8" if fp8 else "low" if bits < 4 else f"int{bits}"
    kind = "fold" if folds(k, v) else "grouped" if k.group or v.group else kind
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
    if open_slot.shape[:1] != (rows,) or not open_slot.is_contiguous():
        raise BadInput("open_slot", tuple(open_slot.shape), f"must be contiguous, {rows} rows")
    if table.shape[:-1] != lines or n_blocks.shape != lines or not table.shape[-1]:
        raise BadInput("table", tuple(table.shape), f"with n_blocks {tuple(n_blocks.shape)}: one "
                       "line per row or per row and key/value head, of at least one column")
    for name, x in (("table", table), ("n_blocks", n_blocks), ("open_slot", open_slot),
                    ("open_len", open_len)):
        if x.dtype != torch.int32:
            raise BadInput(name, x.dtype, "must be int32")


def _apart_frame(apart: First | None) -> dict:
    if apart is None:
        return {}
    planes = apart.planes
    return {"apart": planes.planes["k_data"].shape[1], "apart_P": planes.slab_blocks}


def _apart_arguments(apart: First | None, lse: Tensor | None) -> tuple:
    if apart is None:
        return (None,) * 4 + (0,) * 3
    at = (apart.planes.planes[name].offset_bytes for name in ("k_data", "v_data", "count"))
    return apart.planes.base, apart.row, apart.block, lse, *at


def paged_decode(
    q: Tensor, sealed, format: KVFormat, table: Tensor, n_blocks: Tensor, open, open_slot: Tensor,
    open_len: Tensor, *, scale: float, mass: Tensor | None = None, setting=None,
    new: tuple[Tensor, Tensor] | None = None, scratch: Scratch | None = None,
    apart: First | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per row over its sealed blocks and its open tail.

    q: [B, Hq, D]; sealed, open: `LayerPlanes` of this layer, whose addresses may be pinned host
    memory; table: int32 [B, max_blocks] of block ids, the first n_blocks[b] of row b in use, or
    [B, H, max_blocks] with n_blocks [B, H] where each key/value head reads blocks of its own
    (retrieval); open_slot, open_len: int32 [B], the row of the open store and its number of tokens
    (0: none); open_slot [B, n] where tokens lie in up to n rows, one behind the other. scale: of
    the logits. mass: fp32 [B, Hq, max_blocks], receives each sealed block's share of attention.
    setting: launch settings, see `tune`.
    new: k and v [B, H, D] (contiguous) of this step's token, which open_len counts already and the
        open blocks lack: they are put there, as by `append`, and attended to. Then tables, lengths
        and stored tokens must not come from the kernel launched before this one: they are looked
        up while it still runs.
    scratch: where partial results lie until they are merged; None: made for this call.
    apart: first tokens that are read from beside their block.

    Returns out [B, Hq, D] in q's dtype and lse fp32 [B, Hq] (natural log; -inf for an empty row).
    Nothing depends on a length on the host, so the call can be captured in a graph (after one call
    outside, which compiles).
    """
    (rows, heads, dim), tail = q.shape, open.planes["k_data"]
    kv_heads, slots, _ = tail.shape
    _check(q, kv_heads, table, n_blocks, open_slot, open_len)
    group, width = heads // kv_heads, table.shape[-1]
    k, v = sides(format, sealed.planes, slots, dim)
    gpu = tune.device_facts(q.device)
    wanted, warps, stages, fill, *cap = setting or _setting(
        format, k, v, slots, setting_key(format, slots, dim, group), gpu.name
    )
    frame = _frame(
        q, sealed, open, gpu, warps=warps, mass=mass is not None, per_head=table.ndim == 3,
        fresh=new is not None, opened=open_slot.numel() // rows, **_tile(k, v, slots, wanted),
        **_apart_frame(apart),
    )
    many, most = rows * kv_heads > gpu.processors, _most(frame, width)
    alike = min(_splits(rows, kv_heads, gpu.processors * fill), most)
    splits = min(max(alike, RAGGED), most) if many else alike
    frame = frame._replace(least=max(1, LONG // frame.tile) if many else 0)
    chain = {"launch_pdl": True} if gpu.chained else {}
    parts = splits + frame.tails
    join = many and parts <= JOINED
    scratch, lines = scratch or Scratch(), rows * heads * parts
    take, arrivals = scratch.take, scratch.counters("arrivals", rows * kv_heads, q.device)
    part_out, part_lse = take("out", lines * dim, q.device), take("lse", lines, q.device)
    shares = 0 if mass is None else rows * heads * width * frame.per_block
    cells = take("cells", shares, q.device) if shares else None
    apart_lse = take("apart", rows * heads, q.device) if shares and apart else None
    out, lse = torch.empty_like(q), torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    decode_split_kernel[(rows * kv_heads, parts)](
        q, *(new or (q, q)), part_out, part_lse, cells, out, lse, arrivals, sealed.base, table,
        n_blocks, open.base, open_slot, open_len, width, splits, alike, scale * LOG2E,
        *offsets(sealed.planes), tail.offset_bytes, open.planes["v_data"].offset_bytes,
        *_apart_arguments(apart, apart_lse),
        F=frame, K=k, V=v, JOIN=join, num_warps=warps, num_stages=stages,
        **({"maxnreg": cap[0]} if cap else {}), **chain,
    )
    given = part_out, part_lse, cells, apart_lse, out, lse, mass, n_blocks
    _finish(*given, 0 if join else parts, frame, chain)
    return out, lse


def _frame(q: Tensor, sealed, open, gpu: tune.Device, opened: int, **choices) -> Frame:
    """Sizes of a launch over these stores, and what was chosen for it."""
    (rows, heads, dim), tail = q.shape, open.planes["k_data"]
    kv_heads, slots, _ = tail.shape
    group = heads // kv_heads
    return Frame(
        H=kv_heads, G=group, GP=next_power(group), D=dim, S=slots, P=sealed.slab_blocks,
        open_P=open.slab_blocks, digits=2, chained=gpu.chained,
        tails=_tails(rows * kv_heads, slots, opened, gpu), opened=opened,
        open_dtype=TYPES[tail.dtype], query_digits=1 if q.itemsize == 2 else 2, **choices,
    )


def _finish(
    part_out: Tensor, part_lse: Tensor, cells: Tensor | None, apart_lse: Tensor | None,
    out: Tensor, lse: Tensor, mass: Tensor | None, n_blocks: Tensor,
    parts: int, frame: Frame, chain: dict,
) -> None:
    """Merge `parts` partial results of each row and head, 0 where that is done; then the shares."""
    rows, heads, dim = out.shape
    if parts:
        combine_kernel[(rows * frame.H, frame.G, dim // 32)](
            part_out, part_lse, out, lse, parts, G=frame.G, D=dim, SP=next_power(parts), WIDTH=32,
            CHAINED=frame.chained, **chain,
        )
    if mass is not None:
        width = mass.shape[-1]
        step = min(256, next_power(width))
        mass_kernel[(rows * heads, triton.cdiv(width, step))](
            cells, apart_lse, lse, mass, n_blocks, width, TPB=frame.per_block,
            HEADS=frame.G if frame.per_head else heads, APART=bool(frame.apart), WIDTH=step,
        )
