"""Merge of attention results over disjoint keys; same name and signature as `attend_ref.merge`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel.sides import next_power


@triton.jit
def merge_kernel(
    out, lse, part, part_lse, rows, T, head_stride, token_stride,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):
    """Folds `part` (any strides, any dtype) into the contiguous fp32 `out`, in place."""
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    known, inside = r < rows, (r < rows)[:, None] & (d < D)[None, :]
    a = tl.load(lse + r, mask=known, other=-float("inf"))
    b = tl.load(part_lse + r, mask=known, other=-float("inf"))
    top = tl.maximum(tl.maximum(a, b), -1e30)  # two empty parts leave an empty one, not a NaN
    wa, wb = tl.exp(a - top), tl.exp(b - top)
    total = wa + wb
    inverse = 1.0 / tl.maximum(total, 1e-37)
    at = out + r.to(tl.int64)[:, None] * D + d[None, :]
    head, token = (r // T).to(tl.int64), (r % T).to(tl.int64)
    off = (head * head_stride + token * token_stride)[:, None] + d[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    y = tl.load(part + off, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, x * (wa * inverse)[:, None] + y * (wb * inverse)[:, None], mask=inside)
    tl.store(lse + r, tl.where(total > 0, top + tl.log(total), -float("inf")), mask=known)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Folds a partial result into the running one, in place, in one pass.

    out fp32 [Hq, T, D] and lse fp32 [Hq, T], contiguous; part [Hq, T, D] of any float dtype with
    its last dim contiguous; part_lse fp32 [Hq, T], contiguous.
    """
    heads, tokens, dim = out.shape
    rows = 16
    merge_kernel[(triton.cdiv(heads * tokens, rows),)](
        out, lse, part, part_lse, heads * tokens, tokens, part.stride(0), part.stride(1),
        D=dim, DP=next_power(dim), ROWS=rows, num_warps=4,
    )


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial results (out [Hq, T, D], lse [Hq, T]) over disjoint keys -> the result over all."""
    if len(parts) == 1:
        return parts[0]
    (first, first_lse), *rest = parts
    out = first.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    lse = first_lse.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for part, part_lse in rest:
        merge_into(out, lse, part, part_lse.contiguous())
    return out, lse
