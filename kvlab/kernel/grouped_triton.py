"""Small groups that share a scale and a zero, in the kernels; see `grouped_ref`.

C is a `sides.Side`: groups of C.group tokens of a channel (C.channel), or of C.group channels of a
token. Scales lie [H, S / group, D] or [H, D / group, S].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel import grouped_ref as ref
from kvlab.kernel.codes_triton import narrow, typed
from kvlab.kernel.quantize_ref import FP8_MAX, FP16_MAX

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small number to nearest even
TOP, HALF_MAX = tl.constexpr(FP8_MAX), tl.constexpr(FP16_MAX)
PER_PEAK = tl.constexpr(1.0 / ref.PEAK)
LEAST, MOST = tl.constexpr(ref.UNIT_LEAST), tl.constexpr(ref.UNIT_MOST)
SMALLEST = tl.constexpr(ref.E4M3_LEAST)
CLIPS, CLIP_STEP = tl.constexpr(len(ref.CLIPS)), tl.constexpr(ref.CLIP_STEP)


@triton.jit
def power_below(x):
    """The greatest power of two that is at most `x` (fp32, positive and normal)."""
    return (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)


@triton.jit
def centre_of(x, seen, S: tl.constexpr):
    """`grouped_ref.centre_of` of fp32 [T, D], of which `seen` [T, 1] are the block's S tokens."""
    total = tl.sum(tl.where(seen, x, 0.0), 0)
    high = tl.max(tl.where(seen, x, -float("inf")), 0)
    low = tl.min(tl.where(seen, x, float("inf")), 0)
    return centre_from(total, low, high, S)


@triton.jit
def centre_from(total, low, high, S: tl.constexpr):
    """Centres (fp16) of channels whose S tokens have this sum and these extremes."""
    mean = tl.div_rn(total, tl.full(total.shape, S, tl.float32))
    span = power_below(tl.maximum(high - low, LEAST)) * 0.25
    step = tl.maximum(span, power_below(tl.maximum(tl.abs(mean), LEAST)) * 0.0009765625)
    centre = (tl.div_rn(mean, step) + ROUND - ROUND) * step + 0.0
    return tl.minimum(tl.maximum(centre, -HALF_MAX), HALF_MAX).to(tl.float16)


@triton.jit
def unit_of(x, seen):
    """`grouped_ref.unit_of` of fp32 [T, D]: a power of two, as fp32."""
    return unit_from(tl.max(tl.max(tl.where(seen, tl.abs(x), 0.0), 1), 0))


@triton.jit
def unit_from(top):
    """The unit of a head's block whose largest magnitude is `top`."""
    peak = tl.minimum(tl.maximum(top * PER_PEAK, LEAST), MOST)
    bits = (peak.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def range_of(low, high, unit, per, C: tl.constexpr):
    """Scale and zero as stored, but still fp32, and what they stand for: four tensors."""
    zero = tl.minimum(tl.maximum(low * per + 0.0, -TOP), TOP)
    zero = narrow(zero, tl.float8e4nv).to(tl.float32)
    z = zero * unit
    span = (high - z) * per * (1.0 / C.reach)
    span = tl.minimum(tl.maximum(span, SMALLEST), TOP)
    small = tl.floor(span * 512.0) * 0.001953125
    whole = (span.to(tl.int32, bitcast=True) & -0x100000).to(tl.float32, bitcast=True)
    scale = tl.where(span < 0.015625, small, whole)
    s = scale * unit
    return scale, zero, s, z


@triton.jit
def nearest_codes(x, s, z, AXIS: tl.constexpr, C: tl.constexpr):
    """Codes of fp32 groups along AXIS as fp32 numbers above ROUND."""
    per = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    code = (x - tl.expand_dims(z, AXIS)) * tl.expand_dims(per, AXIS)
    return tl.minimum(tl.maximum(code, 0.0), 2.0**C.bits - 1) + ROUND


@triton.jit
def nearest(x, per, z, C: tl.constexpr):
    """int32 codes of fp32 numbers, with the zero and one over the scale of each."""
    code = tl.minimum(tl.maximum((x - z) * per, 0.0), 2.0**C.bits - 1) + ROUND
    return code.to(tl.int32, bitcast=True) & (2**C.bits - 1)


@triton.jit
def encode_groups(x, seen, unit, AXIS: tl.constexpr, C: tl.constexpr):
    """fp32 groups along AXIS of three -> int32 codes, scales and zeros (fp32 of what is stored).

    seen: which elements exist; all of a group or none.
    """
    low = tl.min(tl.where(seen, x, float("inf")), AXIS)
    high = tl.max(tl.where(seen, x, -float("inf")), AXIS)
    low, high = tl.where(low == float("inf"), 0.0, low), tl.where(low == float("inf"), 0.0, high)
    per = tl.div_rn(tl.full([], 1.0, tl.float32), unit)
    scale, zero, s, z = range_of(low, high, unit, per, C)
    if C.search:  # a loop that keeps no codes: unrolled, it would hold more than there is room for
        centre, half = (low + high) * 0.5, (high - low) * 0.5
        least = tl.full(low.shape, float("inf"), tl.float32)
        for i in range(CLIPS):
            clip = 1.0 - i * CLIP_STEP
            bottom = tl.where(i == 0, low, centre - half * clip)
            top = tl.where(i == 0, high, centre + half * clip)
            stored, base, s1, z1 = range_of(bottom, top, unit, per, C)
            code = nearest_codes(x, s1, z1, AXIS, C) - ROUND
            off = code * tl.expand_dims(s1, AXIS) + tl.expand_dims(z1, AXIS) - x
            error = tl.sum(off * off, AXIS)
            better = error < least
            least = tl.where(better, error, least)
            scale, zero = tl.where(better, stored, scale), tl.where(better, base, zero)
        s, z = scale * unit, zero * unit
    codes = nearest_codes(x, s, z, AXIS, C)
    return codes.to(tl.int32, bitcast=True) & (2**C.bits - 1), scale, zero


@triton.jit
def group_places(T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Where each group's scale lies in a head's plane, and whether it exists: [T / g, D] or
    [T, D / g]."""
    if C.channel:
        j, d = tl.arange(0, T // C.group)[:, None], tl.arange(0, D)[None, :]
        place, known = j * D + d, (j < S // C.group) & (d < D)
    else:
        t, j = tl.arange(0, T)[:, None], tl.arange(0, D // C.group)[None, :]
        place, known = j * S + t, (t < S) & (j < D)
    return place, known


@triton.jit
def seal_groups(
    x, seen, slab, slot, h, scale, zero, unit, mean, H: tl.constexpr, S: tl.constexpr,
    C: tl.constexpr,
):
    """fp32 [T, D] of head `h` of a block -> int32 codes [T, D]; stores all else. scale .. mean:
    byte offsets of the planes."""
    T: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    d = tl.arange(0, D)
    if C.centred:
        centre = centre_of(x, seen, S)
        tl.store(typed(slab + slot * (2 * D * H) + mean + h * (2 * D), tl.float16) + d, centre)
        x -= centre.to(tl.float32)[None, :]
    one = unit_of(x, seen)
    tl.store(typed(slab + slot * (2 * H) + unit + h * 2, tl.float16), one.to(tl.float16))
    if C.channel:
        y = tl.reshape(x, [T // C.group, C.group, D])
        there = tl.reshape(seen, [T // C.group, C.group, 1])
        codes, scales, zeros = encode_groups(y, there, one, 1, C)
    else:
        y = tl.reshape(x, [T, D // C.group, C.group])
        codes, scales, zeros = encode_groups(y, seen[:, :, None], one, 2, C)
    place, known = group_places(T, S, D, C)
    at = slab + slot * (C.scale * H) + h * C.scale
    tl.store(typed(at + scale, tl.float8e4nv) + place, scales.to(tl.float8e4nv), mask=known)
    tl.store(typed(at + zero, tl.float8e4nv) + place, zeros.to(tl.float8e4nv), mask=known)
    return tl.reshape(codes, [T, D])


@triton.jit
def gather_groups(
    code, slab, slot, h, scale, zero, unit, mean, H: tl.constexpr, S: tl.constexpr,
    C: tl.constexpr,
):
    """Codes of head `h` of a block, fp32 [T, D] -> what they stand for."""
    T: tl.constexpr = code.shape[0]
    D: tl.constexpr = code.shape[1]
    place, known = group_places(T, S, D, C)
    at = slab + slot * (C.scale * H) + h * C.scale
    s = tl.load(typed(at + scale, tl.float8e4nv) + place, mask=known, other=0.0).to(tl.float32)
    z = tl.load(typed(at + zero, tl.float8e4nv) + place, mask=known, other=0.0).to(tl.float32)
    u = tl.load(typed(slab + slot * (2 * H) + unit + h * 2, tl.float16)).to(tl.float32)
    s, z = s * u, z * u
    if C.channel:
        x = tl.reshape(code, [T // C.group, C.group, D]) * s[:, None, :] + z[:, None, :]
    else:
        x = tl.reshape(code, [T, D // C.group, C.group]) * s[:, :, None] + z[:, :, None]
    x = tl.reshape(x, [T, D])
    if C.centred:
        at = slab + slot * (2 * D * H) + mean + h * (2 * D)
        x += tl.load(typed(at, tl.float16) + tl.arange(0, D)).to(tl.float32)[None, :]
    return x
