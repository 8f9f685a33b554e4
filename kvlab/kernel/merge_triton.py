"""Merge of attention results over disjoint keys; same name and signature as `attend_ref.merge`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel.sides import next_power


@triton.jit
def merge_kernel(
    out, lse, part, part_lse, rows, T, part_stride, head_stride, token_stride,
    PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    FRESH: tl.constexpr,
):
    """Folds PARTS results (any strides, any dtype) into the contiguous fp32 `out`, in place."""
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    known, inside = r < rows, (r < rows)[:, None] & (d < D)[None, :]
    at = out + r.to(tl.int64)[:, None] * D + d[None, :]
    head, token = (r // T).to(tl.int64), (r % T).to(tl.int64)
    off = (head * head_stride + token * token_stride)[:, None] + d[None, :]
    if FRESH:
        a = tl.full([ROWS], -float("inf"), tl.float32)
        x = tl.zeros([ROWS, DP], tl.float32)
    else:
        a = tl.load(lse + r, mask=known, other=-float("inf"))
        x = tl.load(at, mask=inside, other=0.0)
    for p in tl.static_range(PARTS):
        b = tl.load(part_lse + p * rows + r, mask=known, other=-float("inf"))
        top = tl.maximum(tl.maximum(a, b), -1e30)  # two empty parts leave an empty one, not a NaN
        wa, wb = tl.exp(a - top), tl.exp(b - top)
        total = wa + wb
        inverse = 1.0 / tl.maximum(total, 1e-37)
        y = tl.load(part + p * part_stride + off, mask=inside, other=0.0).to(tl.float32)
        x = x * (wa * inverse)[:, None] + y * (wb * inverse)[:, None]
        a = tl.where(total > 0, top + tl.log(total), -float("inf"))
    tl.store(at, x, mask=inside)
    tl.store(lse + r, a, mask=known)


def merge_into(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, fresh: bool = False
) -> None:
    """Folds one or more partial results into the running one, in place, in one pass.

    out fp32 [Hq, T, D] and lse fp32 [Hq, T], contiguous; part [Hq, T, D] or [n, Hq, T, D] of any
    float dtype with its last dim contiguous; part_lse fp32 [Hq, T] or [n, Hq, T], contiguous.
    fresh: there is no running result yet; `out` and `lse` may hold anything.
    """
    heads, tokens, dim = out.shape
    rows, parts = 16, part if part.dim() == 4 else part[None]
    merge_kernel[(triton.cdiv(heads * tokens, rows),)](
        out, lse, parts, part_lse, heads * tokens, tokens, *parts.stride()[:3],
        PARTS=parts.shape[0], D=dim, DP=next_power(dim), ROWS=rows, FRESH=fresh, num_warps=4,
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
