"""Scores of block digests and the choice of blocks; same names and signatures as `select_ref`.

Nothing depends on a length on the host, so both calls can be captured in a graph.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.core import BadInput
from kvlab.kernel.select_ref import HOLE, Chosen
from kvlab.kernel.sides import TYPES, next_power

TILE = 32  # blocks that one program scores
WIDEST = 65536  # blocks of a sequence: one program of `choose` holds all of a head's scores


@triton.jit
def digest_tile(at, seen, d, D: tl.constexpr, DTYPE: tl.constexpr, RUN: tl.constexpr):
    """Rows of D channels at byte addresses `at` [n] -> fp32 [n, D].

    RUN: channels that lie together and aligned to 16 bytes; the hint sits on the cast itself.
    """
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    p = (at[:, None] + d[None, :] * size).to(tl.pointer_type(DTYPE))
    p = tl.max_contiguous(tl.multiple_of(p, [1, RUN * size]), [1, RUN])
    return tl.load(p, mask=seen[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def score_kernel(
    q, out, base, rows, counts, N, stride, offset, P: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    RUN: tl.constexpr, SUM: tl.constexpr, TILE: tl.constexpr,
):
    """Program (row and head, tile of blocks). stride: bytes of a digest row."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    bh, i = tl.program_id(0), tl.program_id(1) * TILE + tl.arange(0, TILE)
    b, h, d = bh // H, bh % H, tl.arange(0, DP)
    seen = i < tl.load(counts + b)
    row = tl.load(rows + b.to(tl.int64) * N + i, mask=seen, other=-1)
    seen = row >= 0
    at = tl.load(base + row // P, mask=seen, other=0) + offset
    at += (row % P).to(tl.int64) * stride + h * (C * D * SIZE)
    top = digest_tile(at, seen, d, D, DTYPE, RUN)
    low = digest_tile(at + D * SIZE, seen, d, D, DTYPE, RUN) if C == 2 else top
    result = tl.zeros([TILE], tl.float32)
    for g in tl.static_range(G):
        x = tl.load(q + (bh * G + g) * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        one = tl.sum(tl.where(x > 0, x * top, x * low), 1)
        if SUM or g == 0:
            result += one
        else:
            result = tl.maximum(result, one)
    result = tl.where(seen, result, -float("inf"))
    tl.store(out + bh.to(tl.int64) * N + i, result, mask=i < N)


def score(q: Tensor, digests, rows: Tensor, counts: Tensor, *, group: str = "max") -> Tensor:
    """As `select_ref.score`; q [B, Hq, D] contiguous, rows int32 [B, N] contiguous."""
    view = digests.planes["digest"]
    kv_heads, sides, dim = view.shape
    batch, heads, _ = q.shape
    width = rows.shape[1]
    out = torch.empty(batch, kv_heads, width, dtype=torch.float32, device=q.device)
    score_kernel[(batch * kv_heads, triton.cdiv(width, TILE))](
        q, out, digests.base, rows, counts, width, view.block_stride_bytes, view.offset_bytes,
        P=digests.slab_blocks, H=kv_heads, G=heads // kv_heads, D=dim, DP=next_power(dim),
        C=sides, DTYPE=TYPES[view.dtype], RUN=gcd(dim, 16 // view.dtype.itemsize),
        SUM=group == "sum", TILE=TILE, num_warps=4,
    )
    return out


@triton.jit
def ordered(x):
    """fp32 -> int32 in the same order; -0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def threshold(key, count):
    """The largest int32 that at least `count` of `key` reach, found bit by bit."""
    found = tl.full([], -(2**31), tl.int32)
    step = tl.full([], 1 << 30, tl.int32)
    found = tl.where(tl.sum((key >= 0).to(tl.int32)) >= count, 0, found)  # the sign
    for _ in range(31):
        above = found + step
        found = tl.where(tl.sum((key >= above).to(tl.int32)) >= count, above, found)
        step = step >> 1
    return found


@triton.jit
def put(out, n_out, bh, taken, values, keep, WIDTH: tl.constexpr):
    """Writes the marked values side by side, zeros behind them, and how many they are."""
    marks, j = taken.to(tl.int32), tl.arange(0, WIDTH)
    row, count = out + bh.to(tl.int64) * keep, tl.sum(marks)
    tl.store(row + tl.cumsum(marks, 0) - 1, values, mask=taken)
    tl.store(row + j, j * 0, mask=(j >= count) & (j < keep))
    tl.store(n_out + bh, count)


@triton.jit
def choose_kernel(
    scores, where, counts, hits, device, n_device, host, n_host, N, heads, row_stride,
    head_stride, keep, first, last, HITS: tl.constexpr, W: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (row and head): a threshold by bisection, ties by index, then compaction."""
    bh, i = tl.program_id(0), tl.arange(0, W)
    b, h = bh // heads, bh % heads
    count = tl.load(counts + b)
    place = tl.load(where + b.to(tl.int64) * N + i, mask=i < count, other=-1)
    there = place != -1
    x = tl.load(scores + b * row_stride + h * head_stride + i, mask=there, other=0.0)
    always = (i < first) | (i >= count - last)
    # a digest's score is finite, so both ends of the integers are free
    key = tl.where(there, tl.where(always, 2**31 - 1, ordered(x)), -(2**31))
    wanted = tl.minimum(keep, tl.sum(there.to(tl.int32)))
    cut = threshold(key, wanted)
    above = there & (key > cut)
    ties = there & (key == cut)
    left = wanted - tl.sum(above.to(tl.int32))
    taken = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= left))
    if HITS:
        tl.atomic_add(hits + b.to(tl.int64) * N + i, 1, mask=taken)
    put(device, n_device, bh, taken & (place >= 0), place, keep, WIDTH)
    put(host, n_host, bh, taken & (place < -1), -2 - place, keep, WIDTH)


def choose(
    scores: Tensor, where: Tensor, counts: Tensor, *, keep: int, first: int = 0, last: int = 0,
    hits: Tensor | None = None,
) -> Chosen:
    """As `select_ref.choose`; scores may be expanded over heads, the rest is contiguous."""
    rows, heads, n = scores.shape
    if n > WIDEST:
        raise BadInput("cache.block_size", f"{n} blocks", f"retrieval takes {WIDEST} a sequence; "
                       "use larger blocks")
    device, host = torch.empty(2, rows, heads, keep, dtype=torch.int32, device=scores.device)
    n_device, n_host = torch.empty(2, rows, heads, dtype=torch.int32, device=scores.device)
    width = max(16, next_power(n))
    choose_kernel[(rows * heads,)](
        scores, where, counts, hits, device, n_device, host, n_host, n, heads, scores.stride(0),
        scores.stride(1), keep, first, last, HITS=hits is not None, W=width, WIDTH=next_power(keep),
        num_warps=4 if width <= 1024 else 8 if width <= 4096 else 16 if width <= 16384 else 32,
    )
    return Chosen(device, n_device, host, n_host)


assert HOLE == -1  # as written out in the kernels
