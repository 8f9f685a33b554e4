"""Cosines and sines of rotary positions, for one token per row, in one launch.

The library takes a dozen small kernels for them, as long as a layer takes in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel.codes_triton import narrow
from kvlab.kernel.sides import next_power


@triton.jit
def angles_kernel(positions, freq, out, scaling, B, N, WIDTH: tl.constexpr):
    """Row b: cos then, B rows on, sin, each of N angles twice side by side."""
    b, i = tl.program_id(0), tl.arange(0, WIDTH)
    angle = tl.load(freq + i, mask=i < N, other=0.0) * tl.load(positions + b).to(tl.float32)
    for side in tl.static_range(2):
        y = (tl.cos(angle) if side == 0 else tl.sin(angle)) * scaling
        at = out + (side * B + b) * 2 * N + i
        tl.store(at, narrow(y, out.dtype.element_ty), mask=i < N)
        tl.store(at + N, narrow(y, out.dtype.element_ty), mask=i < N)


def angles(
    positions: Tensor, freq: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """positions int64 [B, 1], freq fp32 [D / 2] -> cos and sin [B, 1, D], times `scaling`."""
    rows, half = len(positions), len(freq)
    out = torch.empty(2, rows, 1, 2 * half, dtype=dtype, device=freq.device)
    angles_kernel[(rows,)](
        positions, freq, out, scaling, rows, half, WIDTH=next_power(half), num_warps=1
    )
    return out[0], out[1]
