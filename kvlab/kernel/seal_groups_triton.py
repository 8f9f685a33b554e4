"""Seal small groups so that a thread holds a group: no thread asks another for a sum or an extreme.

Keys have groups of a channel's tokens: a thread takes a channel, and neighbours take neighbouring
channels. Values have groups of a token's channels: a thread takes a token with all its channels,
which also turns them without leaving its registers. A program seals a side of one head's block.

The bits are those of `grouped_ref`, but for the choice of a clip between two that err alike.
C is a `sides.Side`, `off` the byte offsets of a side's planes: data, high, scale, zero, unit, mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import NATIVE, log2_of, typed
from kvlab.kernel.grouped_triton import (
    CLIP_STEP,
    CLIPS,
    ROUND,
    centre_from,
    nearest,
    range_of,
    unit_from,
)
from kvlab.kernel.memory_triton import read_number, read_words, write_byte


@triton.constexpr_function
def off_asm(top):
    """error + (the nearest code - u)^2 with u = x * per + shift; codes from 0 to `top`."""
    return f"""{{ .reg .f32 a, u;
    fma.rn.sat.f32 a, $1, $4, $5; fma.rn.f32 a, a, 0f{float_bits(top)}, 0f4B400000;
    add.rn.f32 a, a, 0fCB400000; fma.rn.f32 u, $1, $2, $3; sub.rn.f32 a, a, u;
    fma.rn.f32 $0, a, a, $6; }}"""


@triton.constexpr_function
def float_bits(x):
    return {3: "40400000", 7: "40E00000", 15: "41700000"}[x]


@triton.jit
def add_error(error, x, per, shift, part, part_shift, TOP: tl.constexpr):
    """`off_asm`; part, part_shift: `per` and `shift` over TOP."""
    if NATIVE:
        y = tl.inline_asm_elementwise(
            off_asm(TOP), "=f,f,f,f,f,f,f", [x, per, shift, part, part_shift, error],
            dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        u = x * per + shift
        off = (tl.minimum(tl.maximum(u, 0.0), TOP) + ROUND) - ROUND - u
        y = error + off * off
    return y


@triton.jit
def best_range(x, FIRST: tl.constexpr, unit, C: tl.constexpr):
    """Scale and zero (fp32 of what is stored) of the C.group tensors of `x` from FIRST on, one
    group an element."""
    N: tl.constexpr = C.group
    low, high = x[FIRST], x[FIRST]
    for i in tl.static_range(1, N):
        low, high = tl.minimum(low, x[FIRST + i]), tl.maximum(high, x[FIRST + i])
    per = tl.div_rn(tl.full([], 1.0, tl.float32), unit)
    scale, zero, _, _ = range_of(low, high, unit, per, C)
    if C.search:
        TOP: tl.constexpr = 2**C.bits - 1
        centre, half = (low + high) * 0.5, (high - low) * 0.5
        least = tl.full(low.shape, float("inf"), tl.float32)
        for i in range(CLIPS):
            clip = 1.0 - i * CLIP_STEP
            bottom = tl.where(i == 0, low, centre - half * clip)
            top = tl.where(i == 0, high, centre + half * clip)
            stored, base, s, z = range_of(bottom, top, unit, per, C)
            inverse, error = 1.0 / s, tl.zeros(low.shape, tl.float32)
            shift = -z * inverse
            part, part_shift = inverse * (1.0 / TOP), shift * (1.0 / TOP)
            for j in tl.static_range(N):
                error = add_error(error, x[FIRST + j], inverse, shift, part, part_shift, TOP)
            error *= s * s
            better = error < least
            least = tl.where(better, error, least)
            scale, zero = tl.where(better, stored, scale), tl.where(better, base, zero)
    return scale, zero


@triton.jit
def keep_ranges(scales, zeros, slab, slot, h, off, place, H: tl.constexpr, C: tl.constexpr):
    at = slab + slot * (C.scale * H) + h * C.scale
    scales, zeros = scales.to(tl.float8e4nv), zeros.to(tl.float8e4nv)
    write_byte(typed(at + off[2], tl.uint8) + place, scales.to(tl.uint8, bitcast=True).to(tl.int32))
    write_byte(typed(at + off[3], tl.uint8) + place, zeros.to(tl.uint8, bitcast=True).to(tl.int32))


@triton.jit
def placed_code(code, PART: tl.constexpr, BITS: tl.constexpr):
    """A code in its place within a byte; the third of 3 bits in the byte above."""
    if BITS == 3:
        y = ((code & 3) << (2 * PART)) | ((code >> 2) << (8 + 2 * PART))
    else:
        y = code << (BITS * PART)
    return y


@triton.constexpr_function
def slice_of(dim, bits):
    """Channels that neighbouring threads take at a time: of one part of the bytes."""
    return min(32, dim // (4 if bits < 4 else 2))


@triton.jit
def key_places(source, ROW: tl.constexpr, D: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """Of a key's groups [n, 1] and the channels of a slice [1, W]: indices, and first elements."""
    n, w = tl.arange(0, S // C.group)[:, None], tl.arange(0, slice_of(D, C.bits))[None, :]
    return n, w, source + n * (C.group * ROW) + w


@triton.jit
def key_centres(
    source, slab, slot, h, off, ROW: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr,
):
    """Stores the channels' centres and the head's unit; returns them, the centres per slice."""
    W: tl.constexpr = slice_of(D, C.bits)
    N: tl.constexpr = C.group
    DT: tl.constexpr = source.dtype.element_ty
    _, w, at = key_places(source, ROW, D, S, C)
    centres, peak = (), tl.zeros(at.shape, tl.float32)
    for i in tl.static_range(D // W):
        low = read_number(at + i * W, DT)
        high, total = low, low
        for t in tl.static_range(1, N):
            x = read_number(at + (i * W + t * ROW), DT)
            low, high, total = tl.minimum(low, x), tl.maximum(high, x), total + x
        centre = 0.0
        if C.centred:
            half = centre_from(tl.sum(total, 0), tl.min(low, 0), tl.max(high, 0), S)
            to = typed(slab + slot * (2 * D * H) + off[5] + h * (2 * D), tl.float16)
            tl.store(to + i * W + tl.arange(0, W), half)
            centre = half.to(tl.float32)[None, :]
        centres = centres + (centre,)
        peak = tl.maximum(peak, tl.maximum(high - centre, centre - low))
    unit = unit_from(tl.max(tl.max(peak, 1), 0))
    tl.store(typed(slab + slot * (2 * H) + off[4] + h * 2, tl.float16), unit.to(tl.float16))
    return centres, unit


@triton.jit
def seal_keys(
    source, slab, slot, h, off, ROW: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr,
):
    """S tokens, ROW elements apart, from `source` on -> keys of head `h` of one block."""
    PER: tl.constexpr = 4 if C.bits < 4 else 2
    LINE: tl.constexpr = D // PER
    W: tl.constexpr = slice_of(D, C.bits)
    N: tl.constexpr = C.group
    DT: tl.constexpr = source.dtype.element_ty
    centres, unit = key_centres(source, slab, slot, h, off, ROW, H, D, S, C)
    n, w, at = key_places(source, ROW, D, S, C)
    to = typed(slab + slot * (C.data * H) + off[0] + h * C.data, tl.uint8) + n * (N * LINE) + w
    bytes = ()
    for column in tl.static_range(LINE // W):
        for part in tl.static_range(PER):
            x, centre = (), centres[part * (LINE // W) + column]
            for t in tl.static_range(N):
                y = read_number(at + (part * LINE + column * W + t * ROW), DT)
                x = x + (y - centre,)
            scales, zeros = best_range(x, 0, unit, C)
            place = n * D + w + (part * LINE + column * W)
            keep_ranges(scales, zeros, slab, slot, h, off, place, H, C)
            s, z, packed = scales * unit, zeros * unit, ()
            per = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
            for t in tl.static_range(N):
                y = placed_code(nearest(x[t], per, z, C), part, C.bits)
                packed = packed + (y if part == 0 else bytes[t] | y,)
            bytes = packed
        for t in tl.static_range(N):
            write_byte(to + (t * LINE + column * W), bytes[t])
    if C.bits == 3:  # one column: LINE is 32 at most
        V: tl.constexpr = D // 8
        half, v = tl.arange(0, 2)[None, :, None], tl.arange(0, V)[None, :]
        to = typed(slab + slot * (C.high * H) + off[1] + h * C.high, tl.uint8) + n * (N * V) + v
        for t in tl.static_range(N):
            y = tl.reshape(bytes[t] >> 8, [bytes[t].shape[0], 2, V])
            write_byte(to + t * V, tl.sum(y << half, 1))


@triton.jit
def token_elements(source, t, D: tl.constexpr, ROW: tl.constexpr):
    """Rows `t`, ROW apart, of D elements as a tuple of D fp32 tensors."""
    DT: tl.constexpr = source.dtype.element_ty
    BITS: tl.constexpr = DT.primitive_bitwidth
    EACH: tl.constexpr = 32 // BITS
    INT: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    at = source.to(tl.int64) + t.to(tl.int64) * (ROW * BITS // 8)
    x = ()
    for i in tl.static_range(D // (4 * EACH)):
        words = read_words(at + 16 * i)
        for n in tl.static_range(4 * EACH):
            part = (words[n // EACH] >> (n % EACH * BITS)).to(INT)
            x = x + (part.to(DT, bitcast=True).to(tl.float32),)
    return x


@triton.jit
def turned(x, D: tl.constexpr):
    """`codes_triton.rotate` of tuples of D tensors."""
    ROUNDS: tl.constexpr = log2_of(D)
    for _ in tl.static_range(ROUNDS):
        sums, differences = (), ()
        for i in tl.static_range(D // 2):
            sums = sums + (x[2 * i] + x[2 * i + 1],)
            differences = differences + (x[2 * i] - x[2 * i + 1],)
        x = sums + differences
    y = ()
    for i in tl.static_range(D):
        y = y + (x[i] * D**-0.5,)
    return y


@triton.jit
def seal_values(
    source, slab, slot, h, off, ROW: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, C: tl.constexpr,
):
    """As `seal_keys`, values."""
    PER: tl.constexpr = 4 if C.bits < 4 else 2
    W: tl.constexpr = D // PER
    N: tl.constexpr = C.group
    t = tl.arange(0, S)
    x = token_elements(source, t, D, ROW)
    if C.rotated:
        x = turned(x, D)
    peak = tl.abs(x[0])
    for i in tl.static_range(1, D):
        peak = tl.maximum(peak, tl.abs(x[i]))
    unit = unit_from(tl.max(peak, 0))
    tl.store(typed(slab + slot * (2 * H) + off[4] + h * 2, tl.float16), unit.to(tl.float16))
    code = ()
    for g in tl.static_range(D // N):
        scales, zeros = best_range(x, g * N, unit, C)
        keep_ranges(scales, zeros, slab, slot, h, off, g * S + t, H, C)
        s, z = scales * unit, zeros * unit
        per = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
        for i in tl.static_range(N):
            code = code + (nearest(x[g * N + i], per, z, C),)
    to = typed(slab + slot * (C.data * H) + off[0] + h * C.data, tl.uint8) + t
    up = typed(slab + slot * (C.high * H) + off[1] + h * C.high, tl.uint8) + t
    low = ()
    for w in tl.static_range(W):
        y = code[w]
        for part in tl.static_range(1, PER):
            more = placed_code(code[part * W + w], part, C.bits)
            y = more | (placed_code(y, 0, C.bits) if part == 1 else y)
        write_byte(to + w * S, y)
        low = low + (y,)
    if C.bits == 3:
        for v in tl.static_range(D // 8):
            y = (low[v] >> 8) | ((low[v + D // 8] >> 8) << 1)
            write_byte(up + v * S, y)
