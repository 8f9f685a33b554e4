"""Dequantize a list of sealed blocks into a workspace in compute dtype, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvlab.format import KVFormat
from kvlab.kernel.codes_triton import DENSE, GROUPED, narrow, rotate, tile_pointer, typed
from kvlab.kernel.grouped_triton import gather_groups
from kvlab.kernel.sides import next_power, offsets, sides


@triton.jit
def unpack(at, t, seen, D: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """One packed plane at byte address `at` -> its bits as int32 [T, D]."""
    PER: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // PER
    RUN: tl.constexpr = 8 if (S if C.slots_last else W) % 8 == 0 else 1
    w = tl.arange(0, W)
    p = tile_pointer(
        at, t, w, tl.uint8, 1 if C.slots_last else W, S if C.slots_last else 1,
        RUN if BITS == 1 else C.run,
    )
    x = tl.load(p, mask=seen[:, None], other=0).to(tl.int32)
    shift = tl.arange(0, PER) * BITS
    x = (x[:, None, :] >> shift[None, :, None]) & (2**BITS - 1)
    return tl.reshape(x, [t.shape[0], D])


@triton.jit
def gather_side(
    out, i, h, slab, slot, data, high, scale, zero, unit, mean, H: tl.constexpr,
    D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, C: tl.constexpr,
):
    """Head `h` of the `i`-th block of the list -> rows i * S .. of `out` [n * S, H, D].

    data .. mean: byte offsets of the planes in the slab. C: a `Side`.
    """
    t, d = tl.arange(0, SP), tl.arange(0, D)
    seen = t < S
    at = slab + slot * (C.data * H) + data + h * C.data
    if C.bits > 0:
        code = unpack(at, t, seen, D, 2 if C.bits == 3 else C.bits, S, C)
        if C.bits == 3:
            above = slab + slot * (C.high * H) + high + h * C.high
            code += unpack(above, t, seen, D, 1, S, C) << 2
        x = code.to(tl.float32)
    else:
        p = tile_pointer(
            at, t, d, C.dtype, 1 if C.slots_last else D, S if C.slots_last else 1, C.run
        )
        x = tl.load(p, mask=seen[:, None], other=0.0).to(tl.float32)
    if C.kind == GROUPED:
        x = gather_groups(x, slab, slot, h, scale, zero, unit, mean, H, S, C)
    elif C.kind != DENSE:
        at = slab + slot * (C.scale * H) + h * C.scale
        run = d if C.channel else t
        known = run < (D if C.channel else S)
        s = tl.load(typed(at + scale, tl.float16) + run, mask=known, other=0.0).to(tl.float32)
        if C.symmetric:
            x -= 2 ** (C.bits - 1)
        x *= s[None, :] if C.channel else s[:, None]
        if C.zero:
            z = tl.load(typed(at + zero, tl.float16) + run, mask=known, other=0.0).to(tl.float32)
            x += z[None, :] if C.channel else z[:, None]
    if C.rotated:
        x = rotate(x)
    row = (i * S + t).to(tl.int64)
    x = narrow(x, out.dtype.element_ty)
    tl.store(out + (row * H + h)[:, None] * D + d[None, :], x, mask=seen[:, None])


@triton.jit
def gather_kernel(
    out_k, out_v, base, ids, between, kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm,
    P: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):
    """Program (block of the list, head, side of a layer: 2 * layer + 0 for keys, 1 for values).

    between: elements from one layer to the next, in `out`. In a slab the layers of a plane follow
    one another.
    """
    i, h, layer = tl.program_id(0), tl.program_id(1), (tl.program_id(2) // 2).to(tl.int64)
    block, at = tl.load(ids + i), layer * between
    if block >= 0:
        slab, slot = tl.load(base + block // P), (block % P).to(tl.int64) + layer * P
        if tl.program_id(2) % 2 == 0:
            gather_side(out_k + at, i, h, slab, slot, kd, kh, ks, kz, ku, km, H, D, S, SP, K)
        else:
            gather_side(out_v + at, i, h, slab, slot, vd, vh, vs, vz, vu, vm, H, D, S, SP, V)


def gather(planes, format: KVFormat, block_ids: Tensor, out_k: Tensor, out_v: Tensor) -> None:
    """Sealed blocks -> keys and values in `out_k`, `out_v` [n * S, H, D] (contiguous).

    planes: `LayerPlanes` of one layer; block_ids: int64 [n] on the device, in the wanted order;
    where one is negative, nothing is written.
    Of the L layers from `planes` on where the outputs are [L, n * S, H, D], each layer contiguous.
    Bit-equal to `format.dequantize`: products and sums are not fused.
    """
    if not len(block_ids):
        return
    layers, (tokens, heads, dim) = out_k.shape[0] if out_k.dim() == 4 else 1, out_k.shape[-3:]
    slots = tokens // len(block_ids)
    k, v = sides(format, planes.planes, slots, dim)
    gather_kernel[(len(block_ids), heads, 2 * layers)](
        out_k, out_v, planes.base, block_ids, out_k.stride(0), *offsets(planes.planes),
        P=planes.slab_blocks, H=heads, D=dim, S=slots, SP=next_power(slots), K=k, V=v,
        num_warps=4 if slots * dim <= 8192 else 8, enable_fp_fusion=False,
    )
