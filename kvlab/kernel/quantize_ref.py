"""Rounding and bit packing of block contents, in plain torch: the ground truth of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FLOOR = 2.0**-14  # the smallest normal fp16 number: below it a scale loses its digits
FP16_MAX = 65504.0  # largest finite fp16: what a scale or zero cannot say saturates there
ROUND_UP = 1.0 + 2.0**-10  # one fp16 step, so that the stored scale is never below the exact one
FP8_MAX = 448.0  # largest finite e4m3


def stored_scale(span: Tensor, steps: float) -> Tensor:
    """fp16 scale such that `span` / scale never exceeds `steps`; `span` is fp32.

    Spans above `steps` * 65504 saturate instead of overflowing to inf and NaN.
    """
    return (span * (ROUND_UP / steps)).clamp(SCALE_FLOOR, FP16_MAX).half()


def quantize_symmetric(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """fp32 `x` -> unsigned codes (uint8, same shape) and fp16 scale (without `dim`).

    x ~ (code - 2^(bits-1)) * scale, codes in 1 .. 2^bits - 1.
    """
    half = 2 ** (bits - 1)
    scale = stored_scale(x.abs().amax(dim), half - 1)
    code = torch.round(x / scale.float().unsqueeze(dim)).clamp(1 - half, half - 1) + half
    return code.to(torch.uint8), scale


def quantize_asymmetric(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 `x` -> unsigned codes, fp16 scale and fp16 zero; x ~ code * scale + zero."""
    top = 2**bits - 1
    low, high = x.amin(dim), x.amax(dim)
    scale, zero = stored_scale(high - low, top), low.clamp(-FP16_MAX, FP16_MAX).half()
    code = torch.round((x - zero.float().unsqueeze(dim)) / scale.float().unsqueeze(dim))
    return code.clamp(0, top).to(torch.uint8), scale, zero


def quantize_fp8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """fp32 `x` -> e4m3 payload and fp16 scale (without `dim`); x ~ payload * scale."""
    scale = stored_scale(x.abs().amax(dim), FP8_MAX)
    scaled = (x / scale.float().unsqueeze(dim)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, [..., D] uint8 -> [..., D * bits / 8] uint8, planar.

    Byte j holds dims j, j + D*bits/8, ...: a kernel that loads a row of bytes gets runs of
    neighbouring dims from each shift, with no shuffle between lanes.
    """
    parts = codes.chunk(8 // bits, dim=-1)
    out = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        out |= part << (i * bits)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`."""
    mask = 2**bits - 1
    return torch.cat([(packed >> (i * bits)) & mask for i in range(8 // bits)], dim=-1)
