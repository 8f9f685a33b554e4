"""Merge of what the programs of the decode kernel left, and shares of attention of each block."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvlab.kernel.codes_triton import narrow


@triton.jit
def merge_parts(part_out, part_lse, out, lse, pair, parts, F: tl.constexpr):
    """Merges the parts of one key/value head of one row; writes the natural log-sum-exp.

    Other programs wrote them in this launch: they are read past the first cache.
    """
    STEP: tl.constexpr = 4 * min(F.warps, 4)
    GP: tl.constexpr = F.GP
    D: tl.constexpr = F.D
    i, g, d = tl.arange(0, STEP), tl.arange(0, GP), tl.arange(0, D)
    top, total = tl.full([GP], -1e30, tl.float32), tl.zeros([GP], tl.float32)
    out_sum = tl.zeros([GP, D], tl.float32)
    for start in range(0, parts, STEP):
        known = (start + i < parts)[:, None] & (g < F.G)[None, :]
        at = (start + i)[:, None] * F.G + g[None, :]
        part = tl.load(part_lse + at, mask=known, other=-float("inf"), cache_modifier=".cg")
        x = tl.load(part_out + at[:, :, None] * F.D + d[None, None, :], mask=known[:, :, None],
                    other=0.0, cache_modifier=".cg")
        new = tl.maximum(top, tl.max(part, 0))
        keep, weight = tl.exp2(top - new), tl.exp2(part - new[None, :])
        out_sum = out_sum * keep[:, None] + tl.sum(x * weight[:, :, None], 0)
        top, total = new, total * keep + tl.sum(weight, 0)
    y = out_sum / tl.maximum(total, 1e-37)[:, None]
    at = pair * F.G + g
    tl.store(out + at[:, None] * F.D + d[None, :], narrow(y, out.dtype.element_ty),
             mask=(g < F.G)[:, None])
    nat = (top + tl.log2(tl.maximum(total, 1e-37))) * 0.6931471805599453
    tl.store(lse + at, tl.where(total > 0, nat, -float("inf")), mask=g < F.G)


@triton.jit
def combine_kernel(
    part_out, part_lse, out, lse, splits, G: tl.constexpr, D: tl.constexpr, SP: tl.constexpr,
    WIDTH: tl.constexpr, CHAINED: tl.constexpr,
):
    """Merges the splits of WIDTH dims of one query head; writes the natural log-sum-exp.

    CHAINED: launched before the split kernel has ended; waits for what it wrote.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    bh, g, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, d = tl.arange(0, SP), c * WIDTH + tl.arange(0, WIDTH)
    at = (bh * splits + i) * G + g
    part = tl.load(part_lse + at, mask=i < splits, other=-float("inf"))
    top = tl.maximum(tl.max(part, 0), -1e30)
    weight = tl.exp2(part - top)
    total = tl.sum(weight, 0)
    there = (part > -float("inf"))[:, None]  # the others left nothing
    x = tl.load(part_out + at[:, None] * D + d[None, :], mask=there, other=0.0)
    x = tl.sum(x * weight[:, None], 0) / tl.maximum(total, 1e-37)
    tl.store(out + (bh * G + g) * D + d, narrow(x, out.dtype.element_ty))
    nat = (top + tl.log2(tl.maximum(total, 1e-37))) * 0.6931471805599453
    if c == 0:
        tl.store(lse + bh * G + g, tl.where(total > 0, nat, -float("inf")))


@triton.jit
def mass_kernel(cell_lse, apart_lse, lse, mass, n_blocks, max_blocks, TPB: tl.constexpr,
                HEADS: tl.constexpr, APART: tl.constexpr, WIDTH: tl.constexpr):
    """Share of attention of each sealed block, [B, Hq, max_blocks]; 0 beyond the sequence.

    HEADS: query heads that share a row of the table. APART: the first block has tokens apart.
    """
    r, i = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    known = i < tl.load(n_blocks + r // HEADS)
    total = tl.load(lse + r) * 1.4426950408889634
    share = tl.zeros([WIDTH], tl.float32)
    for c in tl.static_range(TPB):
        at = cell_lse + (r * max_blocks + i) * TPB + c
        share += tl.exp2(tl.load(at, mask=known, other=-1e30) - total)
    if APART:
        share += tl.where(i == 0, tl.exp2(tl.load(apart_lse + r) - total), 0.0)
    tl.store(mass + r * max_blocks + i, tl.where(known, share, 0.0), mask=i < max_blocks)
