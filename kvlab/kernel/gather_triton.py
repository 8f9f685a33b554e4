"""Dequantize a list of sealed blocks into a workspace in compute dtype, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvlab.format import KVFormat
from kvlab.kernel.codes_triton import DENSE, INT, load_tile, narrow, typed
from kvlab.kernel.sides import TYPES, Side, next_power, sides


@triton.jit
def unpack(
    at, t, seen, D: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr,
    VEC: tl.constexpr,
):
    """One packed plane at byte address `at` -> its bits as int32 [T, D]."""
    PER: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // PER
    SLOT: tl.constexpr = 1 if LAST else W
    UNIT: tl.constexpr = S if LAST else 1
    x = load_tile(at, t, tl.arange(0, W), seen, tl.uint8, SLOT, UNIT, VEC, False, 0).to(tl.int32)
    shift = tl.arange(0, PER) * BITS
    x = (x[:, None, :] >> shift[None, :, None]) & (2**BITS - 1)
    return tl.reshape(x, [t.shape[0], D])


@triton.jit
def gather_side(
    out, i, h, slab, slot, data, high, scale, zero, H: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, CHANNEL: tl.constexpr, SYMMETRIC: tl.constexpr,
    DATA: tl.constexpr, HIGH: tl.constexpr, SCALE: tl.constexpr,
):
    """Head `h` of the `i`-th block of the list -> rows i * S .. of `out` [n * S, H, D].

    data .. zero: byte offsets of the planes; DATA, HIGH, SCALE: bytes of one head in them.
    """
    t, d = tl.arange(0, SP), tl.arange(0, D)
    seen = t < S
    at = slab + slot * (DATA * H) + data + h * DATA
    if KIND == INT:
        low: tl.constexpr = 2 if BITS == 3 else BITS
        code = unpack(at, t, seen, D, low, S, LAST, VEC)
        if BITS == 3:
            above = slab + slot * (HIGH * H) + high + h * HIGH
            run8: tl.constexpr = 8 if (S if LAST else D // 8) % 8 == 0 else 1
            code += unpack(above, t, seen, D, 1, S, LAST, run8) << 2
        x = code.to(tl.float32)
    else:
        x = load_tile(at, t, d, seen, DT, 1 if LAST else D, S if LAST else 1, VEC, False, 0)
        x = x.to(tl.float32)
    if KIND != DENSE:
        at = slab + slot * (SCALE * H) + h * SCALE
        run = d if CHANNEL else t
        spread = (run < (D if CHANNEL else S))
        s = tl.load(typed(at + scale, tl.float16) + run, mask=spread, other=0.0).to(tl.float32)
        s = s[None, :] if CHANNEL else s[:, None]
        if KIND == INT and SYMMETRIC:
            x = (x - 2 ** (BITS - 1)) * s
        elif KIND == INT:
            z = tl.load(typed(at + zero, tl.float16) + run, mask=spread, other=0.0).to(tl.float32)
            x = x * s + (z[None, :] if CHANNEL else z[:, None])
        else:
            x = x * s
    row = (i * S + t).to(tl.int64)
    x = narrow(x, out.dtype.element_ty)
    tl.store(out + (row * H + h)[:, None] * D + d[None, :], x, mask=seen[:, None])


@triton.jit
def gather_kernel(
    out_k, out_v, base, ids, kd, kh, ks, kz, vd, vh, vs, vz, P: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):
    """Program (block of the list, head, side). K, V: the constants of `gather_side`."""
    i, h = tl.program_id(0), tl.program_id(1)
    block = tl.load(ids + i)
    slab, slot = tl.load(base + block // P), (block % P).to(tl.int64)
    if tl.program_id(2) == 0:
        gather_side(
            out_k, i, h, slab, slot, kd, kh, ks, kz, H, D, S, SP, K[0], K[1], K[2], K[3], K[4],
            K[5], K[6], K[7], K[8], K[9],
        )
    else:
        gather_side(
            out_v, i, h, slab, slot, vd, vh, vs, vz, H, D, S, SP, V[0], V[1], V[2], V[3], V[4],
            V[5], V[6], V[7], V[8], V[9],
        )


def constants(s: Side) -> tuple:
    """What `gather_side` and `seal_side` take of one side, in their order."""
    return (
        s.kind, s.bits, TYPES[s.dtype], s.slots_last, s.run, s.channel, s.symmetric, *s.head_bytes
    )


def gather(planes, format: KVFormat, block_ids: Tensor, out_k: Tensor, out_v: Tensor) -> None:
    """Sealed blocks -> keys and values in `out_k`, `out_v` [n * S, H, D] (contiguous).

    planes: `LayerPlanes` of one layer; block_ids: int64 [n] on the device, in the wanted order.
    Bit-equal to `format.dequantize`.
    """
    if not len(block_ids):
        return
    slots, (_, heads, dim) = out_k.shape[0] // len(block_ids), out_k.shape
    k, v = sides(format, planes.planes, slots)
    gather_kernel[(len(block_ids), heads, 2)](
        out_k, out_v, planes.base, block_ids, *k.offsets, *v.offsets, P=planes.slab_blocks,
        H=heads, D=dim, S=slots, SP=next_power(slots), K=constants(k), V=constants(v),
        num_warps=4 if slots * dim <= 8192 else 8, enable_fp_fusion=False,
    )
