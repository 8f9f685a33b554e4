"""Rounding and bit packing of block contents, in plain torch: the ground truth of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FLOOR = 2.0**-14  # the smallest normal fp16 number: below it a scale loses its digits
FP16_MAX = 65504.0  # largest finite fp16: what a scale or zero cannot say saturates there
FP8_MAX = 448.0  # largest finite e4m3


def stored_scale(span: Tensor, steps: float) -> Tensor:
    """The fp16 number nearest to `span` / `steps`; `span` is fp32.

    Nearest, so that a block that is read and sealed again keeps its scale: from one grid to
    another and back, rounding to nearest ends where it was. Rounding up would climb one step each
    time. The largest value is then at most 2^-11 of itself above the last code, less than half a
    step of any code here, so it still rounds to the last code.
    Spans above `steps` * 65504 saturate instead of overflowing to inf and NaN.
    """
    return (span * (1.0 / steps)).clamp(SCALE_FLOOR, FP16_MAX).half()


def quantize_symmetric(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """fp32 `x` -> unsigned codes (uint8, same shape) and fp16 scale (without `dim`).

    x ~ (code - 2^(bits-1)) * scale, codes in 1 .. 2^bits - 1.
    """
    half = 2 ** (bits - 1)
    scale = stored_scale(x.abs().amax(dim), half - 1)
    code = torch.round(x / scale.float().unsqueeze(dim)).clamp(1 - half, half - 1) + half
    return code.to(torch.uint8), scale


def quantize_asymmetric(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 `x` -> unsigned codes, fp16 scale and fp16 zero; x ~ code * scale + zero.

    The codes span what lies above the stored zero, so that the largest value gets the last one.
    """
    top = 2**bits - 1
    zero = x.amin(dim).clamp(-FP16_MAX, FP16_MAX).half()
    scale = stored_scale(x.amax(dim) - zero.float(), top)
    code = torch.round((x - zero.float().unsqueeze(dim)) / scale.float().unsqueeze(dim))
    return code.clamp(0, top).to(torch.uint8), scale, zero


def quantize_fp8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """fp32 `x` -> e4m3 payload and fp16 scale (without `dim`); x ~ payload * scale."""
    scale = stored_scale(x.abs().amax(dim), FP8_MAX)
    scaled = (x / scale.float().unsqueeze(dim)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def middle_of(x: Tensor, dim: int) -> Tensor:
    """fp32 `x` -> fp16, half way between its least and its largest value along `dim`.

    Of a block that is read and sealed again it is the same, which a mean is not; and it stays as
    near (attention of Qwen2.5 keys, see docs/FORMATS.md).
    """
    middle = (x.amin(dim) + x.amax(dim)) * 0.5 + 0.0  # no negative zero
    return middle.clamp(-FP16_MAX, FP16_MAX).half()


def rotate(x: Tensor) -> Tensor:
    """fp32 `x` [..., D] times the Hadamard matrix of D channels over sqrt(D); its own inverse.

    D is a power of two. Log2(D) rounds of sums and differences of neighbours, the differences put
    behind the sums (Pease, https://doi.org/10.1145/321450.321457): the kernels add in this order
    too, and get the same bits.
    """
    dim = x.shape[-1]
    for _ in range(dim.bit_length() - 1):
        a, b = x[..., 0::2], x[..., 1::2]
        x = torch.cat([a + b, a - b], -1)
    return x * dim**-0.5


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
