"""Packed integers whose scales belong to small groups and are themselves stored in few bits.

Plain torch, the ground truth of the kernels. Every step is one that Triton repeats to the bit:
units are powers of two, reciprocals and products are single IEEE operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernel.quantize_ref import FP8_MAX, FP16_MAX, stored_scale

PEAK = 240.0  # units of a head's largest value: e4m3 has room for what a group adds to it
UNIT_LEAST, UNIT_MOST = 2.0**-24, 2.0**15  # powers of two that fp16 can say
E4M3_LEAST = 2.0**-9  # the smallest e4m3 number above 0
CLIP_STEP = 5 / 64
CLIPS = tuple(1.0 - CLIP_STEP * i for i in range(7))  # of a group's range, what a search tries


def power_above(x: Tensor) -> Tensor:
    """The least power of two that is at least `x` (fp32, positive and normal)."""
    return ((x.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)


def power_below(x: Tensor) -> Tensor:
    """The greatest power of two that is at most `x` (fp32, positive and normal)."""
    return (x.view(torch.int32) & -0x800000).view(torch.float32)


def floor_e4m3(x: Tensor) -> Tensor:
    """The greatest e4m3 number at most `x`, as fp32; `x` within 2^-9 .. 448."""
    small = torch.floor(x * 512.0) * (1.0 / 512.0)
    return torch.where(x < 2.0**-6, small, (x.view(torch.int32) & -(1 << 20)).view(torch.float32))


def reach(bits: int) -> float:
    """Scales that a group's range must hold at least.

    The scale is the largest e4m3 number of which this many fit into the range. So the last code is
    used, and a group that is read and sealed again, whose range then is 2^bits - 1 scales, finds
    the same scale: one e4m3 number up is at least 1/15 more.
    """
    top = 2**bits - 1
    return max(top - 0.5, top * 16 / 17)


def centre_of(x: Tensor) -> Tensor:
    """The mean of each channel of a block, `x` [N, H, S, D] -> fp16 [N, H, D].

    Rounded to a quarter or an eighth of the channel's range: as near as that helps, and a block
    that is read and sealed again finds the same centre, though rounding moved its mean a little.
    """
    mean = x.mean(-2)
    span = power_below((x.amax(-2) - x.amin(-2)).clamp(min=2.0**-24)) * 0.25
    own = power_below(mean.abs().clamp(min=2.0**-24)) * 2.0**-10  # what fp16 can say of it
    step = torch.maximum(span, own)
    centre = torch.round(mean / step) * step + 0.0  # no negative zero
    return centre.clamp(-FP16_MAX, FP16_MAX).half()


def unit_of(x: Tensor) -> Tensor:
    """What scales and zeros of a head's block count in: `x` [N, H, S, D] -> fp16 [N, H]."""
    peak = x.abs().amax((-2, -1)) * (1.0 / PEAK)
    return power_above(peak.clamp(UNIT_LEAST, UNIT_MOST)).half()


def compact_range(low: Tensor, high: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero (e4m3, counted in `unit`) of groups that reach from `low` to `high`."""
    per = 1.0 / unit
    zero = (low * per + 0.0).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    span = (high - zero.float() * unit) * per * (1.0 / reach(bits))
    scale = floor_e4m3(span.clamp(E4M3_LEAST, FP8_MAX)).to(torch.float8_e4m3fn)
    return scale, zero


def wide_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero in fp16 of groups that reach from `low` to `high`."""
    zero = (low + 0.0).clamp(-FP16_MAX, FP16_MAX).half()
    return stored_scale(high - zero.float(), 2**bits - 1), zero


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes (fp32) nearest to `x`, whose last dim has one fp32 scale and zero each."""
    code = torch.round((x - zero.unsqueeze(-1)) * (1.0 / scale).unsqueeze(-1))
    return code.clamp(0, 2**bits - 1)


def quantize_groups(
    x: Tensor, bits: int, unit: Tensor | None, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups `x` [..., g] fp32 -> codes (uint8), scale and zero [...]: x ~ code * scale + zero.

    unit: fp32, broadcast over [...]: scales and zeros are e4m3 numbers that count in it, codes made
    with what is stored; None: fp16 ones. search: of `CLIPS`, what errs least (squared) is taken.
    """
    low, high = x.amin(-1), x.amax(-1)
    centre, half = (low + high) * 0.5, (high - low) * 0.5
    best = None
    for clip in CLIPS if search else CLIPS[:1]:
        if clip != 1.0:
            low, high = centre - half * clip, centre + half * clip
        found = wide_range(low, high, bits) if unit is None else compact_range(
            low, high, unit, bits)
        s, z = (n.float() if unit is None else n.float() * unit for n in found)
        codes = encode(x, s, z, bits)
        off = codes * s.unsqueeze(-1) + z.unsqueeze(-1) - x
        error = (off * off).sum(-1)
        if best is None:
            least, best = error, (codes, *found)
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better.unsqueeze(-1), codes, best[0]),
                *(torch.where(better, a.float(), b.float()).to(b.dtype)
                  for a, b in zip(found, best[1:])))  # fmt: skip
    return best[0].to(torch.uint8), best[1], best[2]
