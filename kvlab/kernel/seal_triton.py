"""Quantize, pack and scatter full blocks in one launch; append one token per row to open blocks.

Full blocks come from new tokens of one layer (`seal`, prefill), from those that were chosen in
several layers (`seal_kept`), or straight from the open store, all layers at once (`seal_open`,
decode).

`seal` gives the very bits of `format.quantize`: division and rounding are IEEE, products and sums
are not fused.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from kvlab.format import KVFormat
from kvlab.kernel.codes_triton import DENSE, GROUPED, INT, narrow, rotate, tile_pointer, typed
from kvlab.kernel.grouped_triton import ROUND, seal_groups
from kvlab.kernel.quantize_ref import FP8_MAX, FP16_MAX, SCALE_FLOOR
from kvlab.kernel.seal_groups_triton import seal_keys, seal_values
from kvlab.kernel.sides import TYPES, Side, next_power, offsets, sides
from kvlab.kernel.tune import device_facts

HELD = False  # a thread for each group: where a benchmark or a test sets it; it has run on no GPU
FLOOR, TOP = tl.constexpr(SCALE_FLOOR), tl.constexpr(FP8_MAX)
HALF_MAX = tl.constexpr(FP16_MAX)


@triton.jit
def stored_scale(span, STEPS: tl.constexpr):
    """fp16 scale and the fp32 number it stands for."""
    factor: tl.constexpr = 1.0 / STEPS
    scale = tl.minimum(tl.maximum(span * factor, FLOOR), HALF_MAX).to(tl.float16)
    return scale, scale.to(tl.float32)


@triton.jit
def divide(x, s, AXIS: tl.constexpr):
    """x / s with IEEE rounding, `s` without dim AXIS."""
    return tl.div_rn(x, tl.broadcast_to(tl.expand_dims(s, AXIS), x.shape))


@triton.jit
def encode(x, seen, C: tl.constexpr):
    """fp32 [T, D] -> values to store [T, D] (int32 codes or fp32), scale and zero [D] or [T]."""
    AXIS: tl.constexpr = 0 if C.channel else 1
    if C.zero and C.kind == INT:
        low = tl.min(tl.where(seen, x, float("inf")), AXIS)
        high = tl.max(tl.where(seen, x, -float("inf")), AXIS)
        low = tl.where(low == float("inf"), 0.0, low)  # of tokens that do not exist
        zero = tl.minimum(tl.maximum(low, -HALF_MAX), HALF_MAX).to(tl.float16)
        base = zero.to(tl.float32)
        scale, s = stored_scale(tl.maximum(high, low) - base, 2**C.bits - 1)
        x = divide(x - tl.expand_dims(base, AXIS), s, AXIS)
        x = tl.minimum(tl.maximum(x, 0.0), 2.0**C.bits - 1)
        y = (x + ROUND).to(tl.int32, bitcast=True) & (2**C.bits - 1)
    else:
        LIMIT: tl.constexpr = 2.0 ** (C.bits - 1) - 1 if C.kind == INT else TOP
        if C.zero:  # FP8 around the middle of a channel
            low = tl.min(tl.where(seen, x, float("inf")), 0)
            middle = (low + tl.max(tl.where(seen, x, -float("inf")), 0)) * 0.5 + 0.0
            zero = tl.minimum(tl.maximum(middle, -HALF_MAX), HALF_MAX).to(tl.float16)
            x -= zero.to(tl.float32)[None, :]
        scale, s = stored_scale(tl.max(tl.where(seen, tl.abs(x), 0.0), AXIS), LIMIT)
        if not C.zero:
            zero = scale
        x = tl.minimum(tl.maximum(divide(x, s, AXIS), -LIMIT), LIMIT)
        if C.kind == INT:
            code = (x + ROUND).to(tl.int32, bitcast=True) + 2 ** (C.bits - 1)
            y = code & (2**C.bits - 1)
        else:
            y = narrow(x, C.dtype)
    return y, scale, zero


@triton.jit
def store_packed(
    at, code, t, seen, D: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, C: tl.constexpr
):
    """The low BITS of int32 codes [T, D], planar, to the plane at byte address `at`."""
    PER: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // PER
    RUN: tl.constexpr = 8 if (S if C.slots_last else W) % 8 == 0 else 1
    i, w = tl.arange(0, PER), tl.arange(0, W)
    part = tl.reshape(code & (2**BITS - 1), [code.shape[0], PER, W])
    byte = tl.sum(part << (i * BITS)[None, :, None], 1)
    p = tile_pointer(
        at, t, w, tl.uint8, 1 if C.slots_last else W, S if C.slots_last else 1,
        RUN if BITS == 1 else C.run,
    )
    tl.store(p, byte.to(tl.uint8), mask=seen[:, None])


@triton.jit
def seal_side(
    source, rows, h, slab, slot, data, high, scale, zero, unit, mean,
    H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, C: tl.constexpr,
):
    """S tokens, at `rows` [SP] elements from `source` on -> head `h` of one block; the inverse of
    `gather_side`."""
    t, d = tl.arange(0, SP), tl.arange(0, D)
    seen = t < S
    x = tl.load(source + rows[:, None] + d[None, :], mask=seen[:, None], other=0.0)
    x = rotate(x.to(tl.float32)) if C.rotated else x.to(tl.float32)
    at = slab + slot * (C.data * H) + data + h * C.data
    if C.kind == DENSE:
        y = narrow(x, C.dtype)
    elif C.kind == GROUPED:
        y = seal_groups(x, seen[:, None], slab, slot, h, scale, zero, unit, mean, H, S, C)
    else:
        y, scales, zeros = encode(x, seen[:, None], C)
        run = d if C.channel else t
        known = run < (D if C.channel else S)
        place = slab + slot * (C.scale * H) + h * C.scale
        tl.store(typed(place + scale, tl.float16) + run, scales, mask=known)
        if C.zero:
            tl.store(typed(place + zero, tl.float16) + run, zeros, mask=known)
    if C.bits > 0:
        store_packed(at, y, t, seen, D, 2 if C.bits == 3 else C.bits, S, C)
        if C.bits == 3:
            above = slab + slot * (C.high * H) + high + h * C.high
            store_packed(above, y >> 2, t, seen, D, 1, S, C)
    else:
        p = tile_pointer(
            at, t, d, C.dtype, 1 if C.slots_last else D, S if C.slots_last else 1, C.run
        )
        tl.store(p, y, mask=seen[:, None])


@triton.jit
def seal_kernel(
    x_k, x_v, base, ids, kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm, P: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, OWN: tl.constexpr,
):
    """Program (block of the list, head, side). OWN: a thread holds a group, see
    `seal_groups_triton`."""
    i, h = tl.program_id(0), tl.program_id(1)
    block = tl.load(ids + i)
    slab, slot = tl.load(base + block // P), (block % P).to(tl.int64)
    first, rows = (i.to(tl.int64) * S * H + h) * D, tl.arange(0, SP) * (H * D)
    if OWN:
        if tl.program_id(2) == 0:
            seal_keys(x_k + first, slab, slot, h, (kd, kh, ks, kz, ku, km), H * D, H, D, S, K)
        else:
            seal_values(x_v + first, slab, slot, h, (vd, vh, vs, vz, vu, vm), H * D, H, D, S, V)
    elif tl.program_id(2) == 0:
        seal_side(x_k + first, rows, h, slab, slot, kd, kh, ks, kz, ku, km, H, D, S, SP, K)
    else:
        seal_side(x_v + first, rows, h, slab, slot, vd, vh, vs, vz, vu, vm, H, D, S, SP, V)


@triton.jit
def seal_kept_kernel(
    x_k, x_v, index, base, ids, between, many, kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm,
    P: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):
    """Program (block of the list, head, side of a layer); between: elements of a layer in x;
    many: tokens that a head keeps."""
    i, h, layer = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // 2).to(tl.int64)
    block, t = tl.load(ids + i), tl.arange(0, SP)
    slab, slot = tl.load(base + block // P), (block % P).to(tl.int64) + layer * P
    place = tl.load(index + (layer * H + h) * many + i * S + t, mask=t < S, other=0)
    first, rows = layer * between + h * D, place.to(tl.int64) * (H * D)
    if tl.program_id(2) % 2 == 0:
        seal_side(x_k + first, rows, h, slab, slot, kd, kh, ks, kz, ku, km, H, D, S, SP, K)
    else:
        seal_side(x_v + first, rows, h, slab, slot, vd, vh, vs, vz, vu, vm, H, D, S, SP, V)


@triton.jit
def seal_open_kernel(
    open_base, rows, ok, ov, base, ids, kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm,
    DT: tl.constexpr, OP: tl.constexpr, P: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OWN: tl.constexpr,
):
    """Program (block of the list, head, side of a layer: 2 * layer + 0 for keys, 1 for values).

    In a slab the regions [P, *shape] of the layers follow one another, plane by plane.
    """
    HEAD: tl.constexpr = S * D * (DT.primitive_bitwidth // 8)
    i, h, layer = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // 2).to(tl.int64)
    row, block = tl.load(rows + i), tl.load(ids + i)
    slab, slot = tl.load(base + block // P), (block % P).to(tl.int64) + layer * P
    at = tl.load(open_base + row // OP) + (((row % OP) + layer * OP) * H + h) * HEAD
    rows = tl.arange(0, SP) * D
    if tl.program_id(2) % 2 == 0:
        seal_side(typed(at + ok, DT), rows, h, slab, slot, kd, kh, ks, kz, ku, km, H, D, S, SP, K)
    else:
        seal_side(typed(at + ov, DT), rows, h, slab, slot, vd, vh, vs, vz, vu, vm, H, D, S, SP, V)


@triton.jit
def append_kernel(
    k, v, base, slots, lens, ok, ov, P: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, S: tl.constexpr, CHAINED: tl.constexpr,
):
    """Program (row, head): one token's key and value into the row's open block.

    CHAINED: the next kernel may start now; it waits by itself for what this one writes.
    """
    if CHAINED:
        gdc_launch_dependents()
    b, h, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DP)
    slot, n = tl.load(slots + b), tl.load(lens + b)
    if (n >= 0) & (n < S):
        size: tl.constexpr = k.dtype.element_ty.primitive_bitwidth // 8
        place = ((slot % P).to(tl.int64) * H + h) * (S * D * size) + n * (D * size)
        at = tl.load(base + slot // P) + place
        source = (b * H + h) * D + d
        inside = d < D
        x, y = tl.load(k + source, mask=inside), tl.load(v + source, mask=inside)
        tl.store(typed(at + ok, k.dtype.element_ty) + d, x, mask=inside)
        tl.store(typed(at + ov, v.dtype.element_ty) + d, y, mask=inside)


def _held(k: Side, v: Side, slots: int, dim: int) -> bool:
    """Whether a thread has room for a group of keys, and for a token's values."""
    grouped = k.kind == v.kind == 3 and k.channel and not v.channel and max(k.group, v.group) <= 32
    return HELD and grouped and not slots & (slots - 1) and dim in (32, 64, 128)


def _warps(k: Side, v: Side, elements: int) -> int:
    """Twice as many where groups have scales: a thread holds its elements beside their trials."""
    return (4 if elements <= 8192 else 8) * (2 if k.group or v.group else 1)


def _choices(k: Side, v: Side, slots: int, dim: int) -> dict:
    """Of a launch: whether a thread holds a group; then there is one for each token."""
    own = _held(k, v, slots, dim)
    warps = max(1, min(8, slots // 32)) if own else _warps(k, v, slots * dim)
    return {"OWN": own, "num_warps": warps, "enable_fp_fusion": False}


def seal(x_k: Tensor, x_v: Tensor, format: KVFormat, planes, block_ids: Tensor) -> None:
    """Keys and values [n * S, H, D] (contiguous) into the n sealed blocks `block_ids`.

    planes: `LayerPlanes` of one layer, rows committed; block_ids: int64 [n] on the device.
    """
    if not len(block_ids):
        return
    slots, (_, heads, dim) = x_k.shape[0] // len(block_ids), x_k.shape
    k, v = sides(format, planes.planes, slots, dim)
    seal_kernel[(len(block_ids), heads, 2)](
        x_k, x_v, planes.base, block_ids, *offsets(planes.planes), P=planes.slab_blocks, H=heads,
        D=dim, S=slots, SP=next_power(slots), K=k, V=v,
        **_choices(k, v, slots, dim),
    )


def seal_kept(
    x_k: Tensor, x_v: Tensor, index: Tensor, format: KVFormat, planes, block_ids: Tensor
) -> None:
    """As `blocks_ref.seal_kept`; x_k, x_v and index contiguous."""
    if not len(block_ids):
        return
    layers, _, heads, dim = x_k.shape
    slots = index.shape[2] // len(block_ids)
    k, v = sides(format, planes.planes, slots, dim)
    seal_kept_kernel[(len(block_ids), heads, 2 * layers)](
        x_k, x_v, index, planes.base, block_ids, x_k.stride(0), index.shape[2],
        *offsets(planes.planes), P=planes.slab_blocks, H=heads, D=dim, S=slots,
        SP=next_power(slots), K=k, V=v, num_warps=_warps(k, v, slots * dim),
        enable_fp_fusion=False,
    )


def seal_open(open, sealed, format: KVFormat, rows: Tensor, blocks: Tensor, layers: int) -> None:
    """Full open blocks of all layers into sealed ones, in one launch; as `blocks_ref.seal_open`."""
    if not len(blocks):
        return
    plane = open.planes["k_data"]
    heads, slots, dim = plane.shape
    k, v = sides(format, sealed.planes, slots, dim)
    seal_open_kernel[(len(blocks), heads, 2 * layers)](
        open.base, rows, plane.offset_bytes, open.planes["v_data"].offset_bytes, sealed.base,
        blocks, *offsets(sealed.planes), DT=TYPES[plane.dtype], OP=open.slab_blocks,
        P=sealed.slab_blocks, H=heads, D=dim, S=slots, SP=next_power(slots), K=k, V=v,
        **_choices(k, v, slots, dim),
    )


def append(k: Tensor, v: Tensor, open, open_slot: Tensor, open_len: Tensor) -> None:
    """One new token per row into its open block, at slot `open_len[b]`.

    k, v: [B, H, D] contiguous, in the open store's dtype; open: `LayerPlanes` of the open store;
    open_slot, open_len: int32 [B] on the device. A row with open_len < 0 or a full block is left
    alone. Lengths are not advanced: one step appends in every layer at the same place.
    """
    plane = open.planes["k_data"]
    rows, heads, dim = k.shape
    append_kernel[(rows, heads)](
        k, v, open.base, open_slot, open_len, plane.offset_bytes,
        open.planes["v_data"].offset_bytes, P=open.slab_blocks, H=heads, D=dim,
        DP=next_power(dim), S=plane.shape[1], CHAINED=device_facts(k.device).chained,
        num_warps=1,
    )
