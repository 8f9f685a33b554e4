"""Small groups in the decode kernel: codes are multiplied as they are, scales go to the other side.

Keys have groups of a channel's tokens, so the scales of one group of tokens are a vector over
channels: the query takes them. Values have groups of a token's channels, so the scales of one group
of channels are a vector over tokens: the probabilities take them. Zeros are one product of a row
of zeros with the query, or with the probabilities. What is left for each stored element is to make
it an operand: a code in the low bits of a half is a subnormal number, which the matrix unit
multiplies exactly, so a mask does it, without a conversion and without a zero point of its own.

F is a `sides.Frame`, K and V the keys' and the values' `sides.Side`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kvlab.kernel.codes_triton import typed
from kvlab.kernel.decode_parts_triton import absorb, turned_back, zero_parts
from kvlab.kernel.decode_place_triton import head_address
from kvlab.kernel.decode_scores_triton import keep_cells
from kvlab.kernel.subnormal_triton import LEAST_HALF, part_operands, place_of, small_tile

REACH = tl.constexpr(6.0)  # log2 of the largest probability, as an operand
@triton.constexpr_function
def lanes_of(tokens):
    """Sums over a tile's tokens are kept apart this far, so that no thread has to ask another."""
    return min(tokens, 32)


@triton.jit
def fold_query(query, F: tl.constexpr, K: tl.constexpr):
    """The query in parts: fp32 [GP, W] each; fp16 [GP * ND, W] each, its largest number between 32
    and 64, each part divided by its operands' place; and the factor that made it so, [GP]."""
    PARTS: tl.constexpr = K.parts
    W: tl.constexpr = F.D // K.parts
    GP: tl.constexpr = F.GP
    g, w = tl.arange(0, GP), tl.arange(0, W)
    q, top = (), tl.zeros([GP], tl.float32)
    for i in tl.static_range(PARTS):
        x = tl.load(query + g[:, None] * F.D + i * W + w[None, :], mask=g[:, None] < F.G, other=0.0)
        q, top = q + (x.to(tl.float32),), tl.maximum(top, tl.max(tl.abs(x.to(tl.float32)), 1))
    power = tl.maximum(top, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    gain = 32.0 / power.to(tl.float32, bitcast=True)
    b = ()
    for i in tl.static_range(PARTS):
        x = q[i] * (gain * (1.0 / place_of(i, K.parts, K.bits)))[:, None]
        high = x.to(tl.float16)
        if F.query_digits == 2:
            low = (x - high.to(tl.float32)).to(tl.float16)
            high = tl.reshape(tl.permute(tl.join(high, low), [2, 0, 1]), [2 * GP, W])
        b = b + (high,)
    return q, b, gain


@triton.jit
def digits_joined(x, F: tl.constexpr):
    """[.., ND * GP] -> [.., GP], the sum of the query's digits."""
    if F.query_digits == 2:
        GP: tl.constexpr = F.GP
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, GP]), 2)
    return x


@triton.jit
def fold_logits(q, b, gain, slab, slot, h, first, scale, kd, kh, ks, kz, ku, km,
                F: tl.constexpr, K: tl.constexpr):
    """Base-2 logits [TILE, GP] of the tokens from `first` of a block on."""
    PARTS: tl.constexpr = K.parts
    W: tl.constexpr = F.D // K.parts
    KG: tl.constexpr = K.group
    SUB: tl.constexpr = F.tile // K.group
    at = head_address(slab, slot, kd, h, F.H, K.data)
    up = head_address(slab, slot, kh, h, F.H, K.high)
    s_at = head_address(slab, slot, ks, h, F.H, K.scale)
    z_at = head_address(slab, slot, kz, h, F.H, K.scale)
    n, w = tl.arange(0, SUB), tl.arange(0, W)
    t = first + n[:, None, None] * KG + tl.arange(0, KG)[None, :, None]
    a = part_operands(at, up, t, 0, F, K)
    row = (first // KG + n)[:, None] * F.D + w[None, :]
    unit = tl.load(typed(head_address(slab, slot, ku, h, F.H, 2), tl.float16)).to(tl.float32)
    m_at = head_address(slab, slot, km, h, F.H, 2 * F.D)
    m_at = tl.multiple_of(m_at.to(tl.pointer_type(tl.float16)), 16)
    y, lift = None, 0.0
    for i in tl.static_range(PARTS):
        s, z = small_tile(s_at, row + i * W), small_tile(z_at, row + i * W).to(tl.float32) * unit
        c = tl.permute(b[i][None, :, :] * s[:, None, :], [0, 2, 1])
        y = tl.dot(a[i], c, y)
        if K.centred:
            z += tl.load(m_at + i * W + w).to(tl.float32)[None, :]
        lift += q[i][None, :, :] * z[:, None, :]
    lift = tl.sum(lift, 2) * scale
    y = digits_joined(y, F) * (unit * scale / (gain * LEAST_HALF))[None, None, :] + lift[:, None, :]
    return tl.reshape(y, [SUB * KG, y.shape[2]])


@triton.jit
def lanes_summed(x):
    """[A, B, T] -> [A, B, LANES]."""
    T: tl.constexpr = x.shape[2]
    LANES: tl.constexpr = lanes_of(T)
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], T // LANES, LANES]), 2)


@triton.jit
def fold_values(p, slab, slot, h, first, vd, vh, vs, vz, F: tl.constexpr, V: tl.constexpr):
    """Probabilities [TILE, GP] times the values of a tile, in the block's unit: without zeros and
    places [W, NG * GP] per part, of which a part's own group is meant; what the groups' zeros add,
    [NG, GP]."""
    PARTS: tl.constexpr = V.parts
    NG: tl.constexpr = F.D // V.group
    GP: tl.constexpr = F.GP
    at = head_address(slab, slot, vd, h, F.H, V.data)
    up = head_address(slab, slot, vh, h, F.H, V.high)
    s_at = head_address(slab, slot, vs, h, F.H, V.scale)
    z_at = head_address(slab, slot, vz, h, F.H, V.scale)
    t = first + tl.arange(0, F.tile)
    a = part_operands(at, up, t[None, :], 1, F, V)
    place = tl.arange(0, NG)[:, None] * F.S + t[None, :]
    s, z = small_tile(s_at, place), small_tile(z_at, place)
    p = tl.trans(p)[None, :, :]
    c = p.to(tl.float16) * s[:, None, :]
    c = tl.trans(tl.reshape(c, [NG * GP, t.shape[0]]))
    y = ()
    for i in tl.static_range(PARTS):
        y = y + (tl.dot(a[i], c),)
    return y, lanes_summed(p * z.to(tl.float32)[:, None, :]), lanes_summed(p)


@triton.jit
def columns_of(x, NG: tl.constexpr):
    """[GP] -> [NG * GP], once for each group."""
    return tl.reshape(tl.broadcast_to(x[None, :], [NG, x.shape[0]]), [NG * x.shape[0]])


@triton.jit
def fold_part(
    query, cell_lse, base, table, max_blocks, blocks, lo, hi, b, h, scale, hidden,
    kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, F: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):
    """As `decode_split_triton.sealed_part`, of sides with small groups."""
    GP: tl.constexpr = F.GP
    PARTS: tl.constexpr = V.parts
    W: tl.constexpr = F.D // V.parts
    NG: tl.constexpr = F.D // V.group
    LANES: tl.constexpr = lanes_of(F.tile)
    order = tl.arange(0, F.tile)
    line = b * F.H + h if F.per_head else b
    row = table + line.to(tl.int64) * max_blocks
    last = tl.maximum(blocks - 1, 0)
    live = tl.minimum(blocks, 1)  # 0: an empty row, whose table may hold anything
    block = tl.load(row + tl.minimum(lo // F.per_block, last)) * live
    slab, slot = tl.load(base + block // F.P), (block % F.P).to(tl.int64)
    ahead = tl.load(row + tl.minimum((lo + 1) // F.per_block, last)) * live
    if F.chained and F.fresh:  # what is above was there before the kernel before
        gdc_wait()
    q, digits, gain = fold_query(query, F, K)
    m = tl.full([GP], -1e30, tl.float32)
    acc, low = zero_parts(PARTS, W, NG * GP), tl.zeros([NG, GP, LANES], tl.float32)
    total = tl.zeros([1, GP, LANES], tl.float32)
    for i in range(lo, hi):
        first = i % F.per_block * F.tile
        s = fold_logits(q, digits, gain, slab, slot, h, first, scale, kd, kh, ks, kz, ku, km, F, K)
        if F.apart:
            s = tl.where((i * F.tile + order >= hidden)[:, None], s, -float("inf"))
        top = tl.max(s, 0)
        if F.apart:  # all of a tile may be hidden
            top = tl.maximum(top, -1e30)
        p = tl.exp2(s - (top - REACH)[None, :])
        o, lift, sums = fold_values(p, slab, slot, h, first, vd, vh, vs, vz, F, V)
        new = tl.maximum(m, top)
        keep, more = tl.exp2(m - new), tl.exp2(top - new)
        m = new
        total = total * keep[None, :, None] + sums * more[None, :, None]
        unit = tl.load(typed(head_address(slab, slot, vu, h, F.H, 2), tl.float16)).to(tl.float32)
        more *= unit
        low = low * keep[None, :, None] + lift * more[None, :, None]
        acc = absorb(acc, o, columns_of(keep, NG), columns_of(more, NG), PARTS)
        if F.mass:
            keep_cells(
                cell_lse + (b * F.H + h) * F.G * max_blocks * F.per_block, p, top - REACH, i,
                max_blocks * F.per_block, blocks * F.per_block, 1, F.G,
            )
        slab, slot = tl.load(base + ahead // F.P), (ahead % F.P).to(tl.int64)
        ahead = tl.load(row + tl.minimum((i + 2) // F.per_block, last))
    out, n, low = (), tl.arange(0, NG), tl.sum(low, 2)
    for i in tl.static_range(PARTS):
        own = n == i * W // V.group
        x = tl.reshape(acc[i], [W, NG, GP]) * (1.0 / (LEAST_HALF * place_of(i, V.parts, V.bits)))
        x = tl.sum(tl.where(own[None, :, None], x + low[None, :, :], 0.0), 1)
        out = out + (x,)
    total = tl.sum(tl.reshape(total, [GP, LANES]), 1)
    return m - REACH, total, turned_back(out, V.parts) if V.rotated else out
