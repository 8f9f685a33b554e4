"""From the query's digits to logits, and from products to running values, in the decode kernel.

F is a `sides.Frame`, C a `sides.Side`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import DENSE, GROUPED, fast_log2, join_products, reach
from kvlab.kernel.decode_parts_triton import grouped, normalizer, query_columns


@triton.jit
def _peak_and_sum(a, x, b, y):
    return tl.maximum(a, b), x + y


@triton.jit
def query_operands(q, scales, zeros, scale, SCALED: tl.constexpr, C: tl.constexpr):
    """Digits of the query [W, GP * ND] per part, and what turns products with them into logits:
    [GP, ND] with the digits' unit in column 0 and what the zeros add (q @ zeros, or with SCALED off
    the sum of q) in column 1, both times `scale`.

    q: [GP, ND, W] per part; scales, zeros: [W] per part, used if SCALED. One tensor for both: what
    changes its layout crosses shared memory at two barriers.
    """
    PARTS: tl.constexpr = C.parts
    scaled, lift, peak = (), 0.0, 0.0
    for i in tl.static_range(PARTS):
        x, y = q[i], q[i]
        if SCALED:
            x, y = x * scales[i][None, None, :], y * zeros[i][None, None, :]
        scaled, lift, peak = scaled + (x,), lift + y, tl.maximum(tl.abs(x), peak)
    top, lift = tl.reduce((peak, lift), 2, _peak_and_sum)
    gain, b = normalizer(top, C.kind), ()
    for i in tl.static_range(PARTS):
        b = b + (query_columns(scaled[i] * gain[:, :, None], C.kind, C.multiply),)
    j = tl.arange(0, q[0].shape[1])[None, :]
    return b, tl.where(j == 0, 1.0 / gain, lift) * scale


@triton.jit
def logits(x, unit, s, z, seen, F: tl.constexpr, C: tl.constexpr):
    """Products of stored keys and digits [TILE, GP * ND] -> base-2 logits [TILE, GP]."""
    x = join_products(grouped(x, F.GP, F.digits), C.kind)
    j = tl.arange(0, F.digits)[None, :]
    if C.channel or C.kind == GROUPED:
        y = tl.sum(tl.where((j == 0)[None, :, :], x[:, :, None], 1.0) * unit[None, :, :], 2)
    else:
        y = x * tl.sum(tl.where(j == 0, unit, 0.0), 1)[None, :]
        if C.kind != DENSE:
            y *= s[:, None]
            if C.zero or C.bias != 0:
                y += z[:, None] * tl.sum(tl.where(j == 1, unit, 0.0), 1)[None, :]
    return tl.where(seen[:, None], y, -float("inf"))


@triton.jit
def rescale(parts, scales, zeros, p, C: tl.constexpr):
    """A tile's products of codes [W, GP] with the block's channel scales and zeros applied."""
    PARTS: tl.constexpr = C.parts
    y = ()
    for i in tl.static_range(PARTS):
        x = parts[i] * scales[i][:, None]
        if C.zero or C.bias != 0:
            x += zeros[i][:, None] * (tl.sum(p, 0) * reach(C.kind))[None, :]
        y = y + (x,)
    return y


@triton.jit
def finish(acc, lift, C: tl.constexpr):
    """Running values per part -> unnormalized outputs [W, GP]; lift: what the zeros add."""
    PARTS: tl.constexpr = C.parts
    y = ()
    for i in tl.static_range(PARTS):
        y = y + (acc[i] * (1.0 / reach(C.kind)) + lift,)
    return y


@triton.jit
def keep_cells(cell_lse, p, top, first, stride, cells, CELLS: tl.constexpr, G: tl.constexpr):
    """Writes the log2 of the sum of each block's (or part of a block's) probabilities."""
    GP: tl.constexpr = p.shape[1]
    share = tl.sum(tl.reshape(p, [CELLS, p.shape[0] // CELLS, GP]), 1)
    share = tl.maximum(fast_log2(tl.maximum(share, 1e-37)) + top[None, :], -1e30)
    g, cell = tl.arange(0, GP), first + tl.arange(0, CELLS)
    known = (cell < cells)[:, None] & (g < G)[None, :]
    tl.store(cell_lse + g[None, :] * stride + cell[:, None], share, mask=known)
