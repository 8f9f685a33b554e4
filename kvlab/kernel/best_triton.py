"""Which tokens score best, without sorting: same name and signature as the reference in `best_ref`.

One program takes a row of scores as whole numbers in the same order, halves the range in which the
last place lies until as many lie above it as are wanted, and writes the places of those in order:
one launch in place of two sorts, whose passes over a few thousand numbers are all launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel import best_ref
from kvlab.kernel.sides import next_power

MOST = 32768  # of a row: what one program holds in its registers
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def best_kernel(score, out, n, keep, N: tl.constexpr):
    """Program: a row of `score` [rows, n]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    there = i < n
    x = tl.load(score + row * n + i, mask=there, other=0.0) + 0.0  # of two zeros one
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
    low = tl.min(tl.where(there, key, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(key, 0).to(tl.int64)
    while low < high:  # at least `keep` of them are `low` or more; `high` + 1 or more: fewer
        middle = (low + high + 1) >> 1
        count = tl.sum((there & (key >= middle.to(tl.int32))).to(tl.int32), 0)
        high = tl.where(count > keep, high, tl.where(count == keep, middle, middle - 1))
        low = tl.where(count >= keep, middle, low)
    last = low.to(tl.int32)
    above, equal = there & (key > last), there & (key == last)
    rank = tl.cumsum(equal.to(tl.int32), 0)
    taken = above | (equal & (rank <= keep - tl.sum(above.to(tl.int32), 0)))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(out + row * keep + place, i.to(tl.int64), mask=taken)


def best_of(score: Tensor, keep: int) -> Tensor:
    """See `best_ref.best_of`; fp32 scores that are numbers. Very long rows are sorted there."""
    *rows, n = score.shape
    if n > MOST or not 0 < keep < n or score.dtype != torch.float32:
        return best_ref.best_of(score, keep)
    flat = score.reshape(-1, n).contiguous()
    out = torch.empty(len(flat), keep, dtype=torch.int64, device=score.device)
    size = next_power(n)
    best_kernel[(len(flat),)](
        flat, out, n, keep, N=size, num_warps=min(32, max(4, size // 512)),
    )
    return out.view(*rows, keep)
