"""The split decode kernel: one program reads one stretch of one sequence for one key/value head.

Base-2 throughout: `scale` comes multiplied with log2(e). A program leaves a normalized output and
its log-sum-exp; `decode_triton` merges them. The range of a program follows from the lengths on
the device, so the grid depends on nothing that changes between replays of a captured graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import (
    DENSE,
    INT,
    digit_weight,
    fast_log2,
    join_digits,
    load_zero,
    reach,
    typed,
)
from kvlab.kernel.decode_parts_triton import (
    absorb,
    columns,
    grouped,
    load_query,
    normalizer,
    query_columns,
    open_address,
    open_tail,
    products,
)


@triton.jit
def head_address(slab, slot, off, h, H: tl.constexpr, HEAD: tl.constexpr):
    """Byte address of head `h` in a plane with HEAD bytes per head and block."""
    return slab + slot * (HEAD * H) + (off + h * HEAD)


@triton.jit
def load_scales(
    addr, zero_addr, offsets, mask, KIND: tl.constexpr, BIAS: tl.constexpr, STORED: tl.constexpr
):
    """fp16 scales and effective zeros as fp32; a dense plane has neither."""
    if KIND == DENSE:
        scale, zero = tl.full([], 1.0, tl.float32), tl.full([], 0.0, tl.float32)
    else:
        scale = tl.load(typed(addr, tl.float16) + offsets, mask=mask, other=1.0).to(tl.float32)
        zero = load_zero(scale, zero_addr, offsets, mask, BIAS, STORED)
    return scale, zero


@triton.jit
def side_scales(
    slab, slot, h, off, zero_off, t, mask, KIND: tl.constexpr, CHANNEL: tl.constexpr,
    BIAS: tl.constexpr, STORED: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
    H: tl.constexpr, HEAD: tl.constexpr,
):
    """Scales and zeros of one tile: per token [TILE], or per channel [W] for each of two parts."""
    at = head_address(slab, slot, off, h, H, HEAD)
    zero_at = head_address(slab, slot, zero_off, h, H, HEAD)
    if CHANNEL:
        w = tl.arange(0, W)
        s0, z0 = load_scales(at, zero_at, w, w < W, KIND, BIAS, STORED)
        s1, z1 = s0, z0
        if PARTS == 2:
            s1, z1 = load_scales(at, zero_at, W + w, w < W, KIND, BIAS, STORED)
    else:
        s0, z0 = load_scales(at, zero_at, t, mask, KIND, BIAS, STORED)
        s1, z1 = s0, z0
    return s0, z0, s1, z1


@triton.jit
def _peak_and_sum(a, x, b, y):
    return tl.maximum(a, b), x + y


@triton.jit
def query_operands(
    q0, q1, s0, z0, s1, z1, KIND: tl.constexpr, MT: tl.constexpr, PARTS: tl.constexpr,
):
    """Digits of the scaled query [W, GP * ND] per part, the factor of each column [GP, ND], and
    what the zeros add to each column, q @ zeros in column 0.

    q0, q1: [GP, ND, W]; s0 .. z1: scales and zeros per channel [1, 1, W] of the parts, or numbers.
    """
    lift = q0 * z0
    q0 = q0 * s0
    peak = tl.abs(q0)
    if PARTS == 2:
        lift += q1 * z1
        q1 = q1 * s1
        peak = tl.maximum(peak, tl.abs(q1))
    top, lift = tl.reduce((peak, lift), 2, _peak_and_sum)
    gain = normalizer(top, KIND)
    b0 = query_columns(q0 * gain[:, :, None], KIND, MT)
    b1 = b0
    if PARTS == 2:
        b1 = query_columns(q1 * gain[:, :, None], KIND, MT)
    j = tl.arange(0, q0.shape[1])[None, :]
    return b0, b1, digit_weight(j, KIND) / gain, tl.where(j == 0, lift, 0.0)


@triton.jit
def rescale(x, scale, zero, p, j, ZERO: tl.constexpr):
    """A tile's products of codes [W, GP, ND] with the block's channel scales and zeros applied."""
    x = x.to(tl.float32) * scale[:, None, None]
    if ZERO:  # the column of the high byte counts 256 fold
        lift = zero[:, None] * tl.sum(p, 0)[None, :] * (reach(INT) / 256)
        x += tl.where(j == 0, lift[:, :, None], 0.0)
    return x


@triton.jit
def keep_cells(
    cell_lse, p, top, first, stride, cells, CELLS: tl.constexpr, G: tl.constexpr
):
    """Writes the log2 of the sum of each block's (or part of a block's) probabilities."""
    GP: tl.constexpr = p.shape[1]
    share = tl.sum(tl.reshape(p, [CELLS, p.shape[0] // CELLS, GP]), 1)
    share = tl.maximum(fast_log2(tl.maximum(share, 1e-37)) + top[None, :], -1e30)
    g, cell = tl.arange(0, GP), first + tl.arange(0, CELLS)
    known = (cell < cells)[:, None] & (g < G)[None, :]
    tl.store(cell_lse + g[None, :] * stride + cell[:, None], share, mask=known)


@triton.jit
def token_order(TILE: tl.constexpr, WARPS: tl.constexpr, SHUFFLE: tl.constexpr):
    """Token of each row of the score tile.

    In the matrix unit's result a thread holds rows r, r+8, r+64, ...; packing the bytes of
    neighbouring tokens into one word wants those rows to be neighbours. Loading keys in this order
    and calling `in_order` on the probabilities makes them so, at no cost.
    """
    r = tl.arange(0, TILE)
    if SHUFFLE:
        REPS: tl.constexpr = TILE // (16 * WARPS)
        warp, rep = r // 16 % WARPS, r // (16 * WARPS)
        r = ((warp * 8 + r % 8) * REPS + rep) * 2 + r // 8 % 2
    return r


@triton.jit
def in_order(x, WARPS: tl.constexpr, SHUFFLE: tl.constexpr):
    """[TILE, N] in `token_order` -> in the order of the tokens, laid out by rows of tokens."""
    if SHUFFLE:
        REPS: tl.constexpr = x.shape[0] // (16 * WARPS)
        y = tl.reshape(x, [REPS, WARPS, 2, 8, x.shape[1]])
        y = tl.reshape(tl.permute(y, [4, 1, 3, 0, 2]), [x.shape[1], x.shape[0]])
        x = tl.trans(y)
    return x


@triton.jit
def place(
    i, order, blocks, TILE: tl.constexpr, S: tl.constexpr, TPB: tl.constexpr, MULTI: tl.constexpr
):
    """Block index of tile `i` (one, or one per token), slots of its tokens, which tokens exist."""
    if MULTI:
        token = i * TILE + order
        index, t = token // S, token % S
        seen = index < blocks
    else:
        index, t = i // TPB, (i % TPB) * TILE + order
        seen = t < S
    return tl.minimum(index, tl.maximum(blocks - 1, 0)), t, seen


@triton.jit
def decode_split_kernel(
    q_ptr, part_out, part_lse, cell_lse, base, table, n_blocks, open_base, open_slot, open_len,
    max_blocks, splits, scale, kd, kh, ks, kz, vd, vh, vs, vz, ok, ov,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    P: tl.constexpr, OPEN_P: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, TPB: tl.constexpr,
    MULTI: tl.constexpr, ND: tl.constexpr, MASS: tl.constexpr, OPEN_DT: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_DT: tl.constexpr, K_MT: tl.constexpr, K_PARTS: tl.constexpr,
    K_WIDE: tl.constexpr, K_LAST: tl.constexpr, K_VEC: tl.constexpr, K_CHANNEL: tl.constexpr,
    K_BIAS: tl.constexpr, K_STORED: tl.constexpr, KDS: tl.constexpr, KHS: tl.constexpr,
    KSS: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_DT: tl.constexpr, V_MT: tl.constexpr, V_PARTS: tl.constexpr,
    V_WIDE: tl.constexpr, V_LAST: tl.constexpr, V_VEC: tl.constexpr, V_CHANNEL: tl.constexpr,
    V_BIAS: tl.constexpr, V_STORED: tl.constexpr, VDS: tl.constexpr, VHS: tl.constexpr,
    VSS: tl.constexpr,
):
    """See `decode_triton.paged_decode`. kd .. vz, ok, ov: byte offsets of this layer's planes in a
    slab (data, high bits, scale, zero; open keys and values); KDS .. VSS: bytes per block and head.
    """
    h, sp, b = tl.program_id(0) % H, tl.program_id(1), tl.program_id(0) // H
    KW: tl.constexpr = D // K_PARTS
    VW: tl.constexpr = D // V_PARTS
    K_ZERO: tl.constexpr = K_STORED or K_BIAS != 0
    V_ZERO: tl.constexpr = V_STORED or V_BIAS != 0
    PER_TOKEN: tl.constexpr = V_KIND != DENSE and not V_CHANNEL
    SHUFFLE: tl.constexpr = V_KIND == INT and not MULTI and TILE % (16 * WARPS) == 0
    j = tl.arange(0, ND)[None, None, :]
    order, plain = token_order(TILE, WARPS, SHUFFLE), tl.arange(0, TILE)
    query = q_ptr + (b * H + h) * G * D
    q0 = load_query(query, 0, KW, D, G, GP, ND)
    q1 = load_query(query, K_PARTS - 1, KW, D, G, GP, ND)
    if not K_CHANNEL:
        b0, b1, undo, lift = query_operands(q0, q1, 1.0, 1.0, 1.0, 1.0, K_KIND, K_MT, K_PARTS)
    m = tl.full([GP], -1e30, tl.float32)
    lsum = tl.zeros([TILE, GP], tl.float32)
    zsum = tl.zeros([TILE, GP], tl.float32)
    acc0 = tl.zeros([VW, GP, ND], tl.float32)
    acc1 = tl.zeros([VW, GP, ND], tl.float32)
    blocks = tl.load(n_blocks + b)
    tiles = tl.cdiv(blocks * S, TILE) if MULTI else blocks * TPB
    per = tl.cdiv(tiles, splits)
    lo = sp * per
    hi = tl.minimum(lo + per, tiles)
    row = table + b.to(tl.int64) * max_blocks
    # Before a tile stand its block id, its slab's address and its scales, each found through the
    # one before. Each is fetched a tile ahead of its use, so that no tile waits for the chain.
    index, t, seen = place(lo, order, blocks, TILE, S, TPB, MULTI)
    block = tl.load(row + index)
    slab, slot = tl.load(base + block // P), (block % P).to(tl.int64)
    sk0, zk0, sk1, zk1 = side_scales(
        slab, slot, h, ks, kz, t, seen, K_KIND, K_CHANNEL, K_BIAS, K_STORED, KW, K_PARTS, H, KSS
    )
    sv0, zv0, sv1, zv1 = side_scales(
        slab, slot, h, vs, vz, t, seen, V_KIND, V_CHANNEL, V_BIAS, V_STORED, VW, V_PARTS, H, VSS
    )
    k_at, k_up = head_address(slab, slot, kd, h, H, KDS), head_address(slab, slot, kh, h, H, KHS)
    v_at, v_up = head_address(slab, slot, vd, h, H, VDS), head_address(slab, slot, vh, h, H, VHS)
    block = tl.load(row + place(lo + 1, order, blocks, TILE, S, TPB, MULTI)[0])
    slab, slot = tl.load(base + block // P), (block % P).to(tl.int64)
    ahead = tl.load(row + place(lo + 2, order, blocks, TILE, S, TPB, MULTI)[0])
    for i in range(lo, hi):
        _, t, seen = place(i + 1, order, blocks, TILE, S, TPB, MULTI)
        next_sk0, next_zk0, next_sk1, next_zk1 = side_scales(
            slab, slot, h, ks, kz, t, seen, K_KIND, K_CHANNEL, K_BIAS, K_STORED, KW, K_PARTS, H, KSS
        )
        next_sv0, next_zv0, next_sv1, next_zv1 = side_scales(
            slab, slot, h, vs, vz, t, seen, V_KIND, V_CHANNEL, V_BIAS, V_STORED, VW, V_PARTS, H, VSS
        )
        _, t, seen = place(i, order, blocks, TILE, S, TPB, MULTI)
        _, vt, v_seen = place(i, plain, blocks, TILE, S, TPB, MULTI)
        if K_CHANNEL:
            b0, b1, undo, lift = query_operands(
                q0, q1, sk0[None, None, :], zk0[None, None, :], sk1[None, None, :],
                zk1[None, None, :], K_KIND, K_MT, K_PARTS,
            )
        x, _ = products(
            k_at, k_up, t, seen, b0, b1, K_KIND, K_BITS, K_DT, K_PARTS, K_WIDE, K_LAST, D, S,
            K_VEC, MULTI, 0,
        )
        x = grouped(x, GP, ND).to(tl.float32) * (undo * scale)[None, :, :]
        if K_CHANNEL:
            s = tl.sum(x + (lift * scale)[None, :, :], 2)
        elif K_KIND != DENSE:
            s = tl.sum(x, 2) * sk0[:, None]
            if K_ZERO:
                s += zk0[:, None] * tl.sum(lift * scale, 1)[None, :]
        else:
            s = tl.sum(x, 2)
        s = tl.where(seen[:, None], s, -float("inf"))
        # Probabilities are taken relative to the tile's own maximum of p * value scale: the digits
        # keep 16 bits of each tile, however small its share of the whole.
        high = s
        if PER_TOKEN:
            high = s + fast_log2(sv0)[:, None]
        tile_max = tl.max(high, 0)
        p = tl.exp2(s - tile_max[None, :])
        weight = p
        if PER_TOKEN:
            weight = tl.exp2(high - tile_max[None, :])
        pc = in_order(columns(weight * reach(V_KIND), V_KIND, V_MT, ND), WARPS, SHUFFLE)
        o0, o1 = products(
            v_at, v_up, vt, v_seen, pc, pc, V_KIND, V_BITS, V_DT, V_PARTS, V_WIDE, V_LAST, D, S,
            V_VEC, MULTI, 1,
        )
        new = tl.maximum(m, tile_max)
        keep, gain = tl.exp2(m - new), tl.exp2(tile_max - new)
        m = new
        lsum = lsum * keep[None, :] + p * gain[None, :]
        if V_ZERO and not V_CHANNEL:
            zsum = zsum * keep[None, :] + p * (zv0[:, None] * gain[None, :])
        o0, o1 = grouped(o0, GP, ND), grouped(o1, GP, ND)
        if V_CHANNEL:
            o0 = rescale(o0, sv0, zv0, p, j, V_ZERO)
            o1 = rescale(o1, sv1, zv1, p, j, V_ZERO)
        acc0 = absorb(acc0, o0, keep, gain)
        if V_PARTS == 2:
            acc1 = absorb(acc1, o1, keep, gain)
        if MASS:
            CELLS: tl.constexpr = TILE // S if MULTI else 1
            keep_cells(
                cell_lse + (b * H + h) * G * max_blocks * TPB, in_order(p, WARPS, SHUFFLE),
                tile_max, i * CELLS, max_blocks * TPB, blocks * TPB, CELLS, G,
            )
        sk0, zk0, sk1, zk1 = next_sk0, next_zk0, next_sk1, next_zk1
        sv0, zv0, sv1, zv1 = next_sv0, next_zv0, next_sv1, next_zv1
        k_at, k_up = head_address(slab, slot, kd, h, H, KDS), head_address(slab, slot, kh, h, H, KHS)
        v_at, v_up = head_address(slab, slot, vd, h, H, VDS), head_address(slab, slot, vh, h, H, VHS)
        slab, slot = tl.load(base + ahead // P), (ahead % P).to(tl.int64)
        ahead = tl.load(row + place(i + 3, order, blocks, TILE, S, TPB, MULTI)[0])
    l = tl.sum(lsum, 0)
    lift = tl.sum(zsum, 0)[None, :]
    out0 = join_digits(acc0, j, V_KIND) * (1.0 / reach(V_KIND)) + lift
    out1 = join_digits(acc1, j, V_KIND) * (1.0 / reach(V_KIND)) + lift
    if sp == splits - 1:
        count = tl.load(open_len + b)
        if count > 0:
            own = tl.load(open_slot + b)
            size: tl.constexpr = OPEN_DT.primitive_bitwidth // 8
            k = open_address(open_base, own, OPEN_P, ok, h, H, S * D * size, OPEN_DT)
            v = open_address(open_base, own, OPEN_P, ov, h, H, S * D * size, OPEN_DT)
            m, l, out0, out1 = open_tail(
                query, k, v, count, m, l, out0, out1, scale, VW, V_PARTS, D, G, GP, OPEN_DT, 32
            )
    g, w = tl.arange(0, GP), tl.arange(0, VW)
    inverse = 1.0 / tl.maximum(l, 1e-37)
    at = ((b * H + h) * splits + sp) * G + g
    tl.store(part_lse + at, tl.where(l > 0, m + tl.log2(l), -float("inf")), mask=g < G)
    at = part_out + at[None, :] * D + w[:, None]
    tl.store(at, out0 * inverse[None, :], mask=(g < G)[None, :])
    if V_PARTS == 2:
        tl.store(at + VW, out1 * inverse[None, :], mask=(g < G)[None, :])
