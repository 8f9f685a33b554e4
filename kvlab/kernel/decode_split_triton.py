"""The split decode kernel: one program reads one stretch of one sequence for one key/value head.

Base-2 throughout: `scale` comes multiplied with log2(e). A program leaves a normalized output and
its log-sum-exp; `decode_triton` merges them. The range of a program follows from the lengths on
the device, so the grid depends on nothing that changes between replays of a captured graph.

In the signatures F is a `sides.Frame`, C, K and V are a `sides.Side`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvlab.kernel.codes_triton import (
    DENSE,
    GROUPED,
    INT,
    NATIVE,
    fast_log2,
    reach,
)
from kvlab.kernel.decode_fold_triton import fold_part
from kvlab.kernel.decode_groups_triton import add_means, group_scales, group_unit
from kvlab.kernel.decode_join_triton import merge_parts
from kvlab.kernel.decode_open_triton import apart_count, open_part
from kvlab.kernel.decode_parts_triton import (
    absorb,
    columns,
    key_products,
    load_query,
    turned_back,
    value_products,
    zero_parts,
)
from kvlab.kernel.decode_place_triton import head_address, in_order, place, side_scales, token_order
from kvlab.kernel.decode_scores_triton import (
    finish,
    keep_cells,
    logits,
    query_operands,
    rescale,
)


@triton.constexpr_function
def floor_power(n):
    return 1 << max(0, n.bit_length() - 1)


@triton.jit
def prefetch(at, BYTES: tl.constexpr):
    """Asks for about BYTES at an address to be brought into the second cache."""
    if NATIVE:
        LINES: tl.constexpr = floor_power(BYTES // 128)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at + tl.arange(0, LINES) * 128],
            dtype=tl.int32, is_pure=False, pack=1,
        )


@triton.jit
def scales_ahead(
    slab, slot, h, off, zero_off, i, blocks, live, SHUFFLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr,
):
    """`side_scales` of tile `i`; of small groups where they lie: their scales have to be loaded
    beside the codes, to get the layout of a product's operand."""
    if C.kind == GROUPED:
        y = (slab, slot), ()
    else:
        y = side_scales(slab, slot, h, off, zero_off, i, blocks, live, SHUFFLE, F, C)
    return y


@triton.jit
def sealed_part(
    query, cell_lse, base, table, max_blocks, blocks, lo, hi, b, h, scale, hidden,
    kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm, F: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):
    """Partial result over tiles lo .. hi of a row's `blocks` sealed blocks, but for the first
    `hidden` tokens of the first of them."""
    TILE: tl.constexpr = F.tile
    GP: tl.constexpr = F.GP
    W: tl.constexpr = F.D // V.parts
    PER_TOKEN: tl.constexpr = V.kind != DENSE and V.kind != GROUPED and not V.channel
    PER_TILE: tl.constexpr = K.channel and K.kind != GROUPED  # the query is scaled for each
    ZERO: tl.constexpr = PER_TOKEN and (V.zero or V.bias != 0)
    WHOLE: tl.constexpr = F.tile % (16 * F.warps) == 0
    SHUFFLE: tl.constexpr = V.kind == INT and not F.multi and WHOLE
    CELLS: tl.constexpr = F.tile // F.S if F.multi else 1
    plain = tl.arange(0, TILE)
    order = token_order(plain, SHUFFLE, F)
    m = tl.full([GP], -1e30, tl.float32)
    lsum = tl.zeros([TILE, GP], tl.float32)
    zsum = tl.zeros([TILE, GP], tl.float32)
    acc = zero_parts(V.parts, W, GP)
    line = b * F.H + h if F.per_head else b
    row = table + line.to(tl.int64) * max_blocks
    # Before a tile stand its block id, its slab's address and its scales, each found through the
    # one before. Each is fetched a tile ahead of its use, so that no tile waits for the chain.
    live = tl.minimum(blocks, 1)  # 0: an empty row, whose table may hold anything
    block = tl.load(row + place(lo, order, blocks, F)[0]) * live
    slab, slot = tl.load(base + block // F.P), (block % F.P).to(tl.int64)
    k_scales, k_zeros = scales_ahead(slab, slot, h, ks, kz, lo, blocks, live, SHUFFLE, F, K)
    v_scales, v_zeros = scales_ahead(slab, slot, h, vs, vz, lo, blocks, live, SHUFFLE, F, V)
    k_at = head_address(slab, slot, kd, h, F.H, K.data)
    k_up = head_address(slab, slot, kh, h, F.H, K.high)
    v_at = head_address(slab, slot, vd, h, F.H, V.data)
    v_up = head_address(slab, slot, vh, h, F.H, V.high)
    if F.chained and F.fresh and not F.multi:
        prefetch(k_at, K.data)
        prefetch(v_at, V.data)
    block = tl.load(row + place(lo + 1, order, blocks, F)[0]) * live
    slab, slot = tl.load(base + block // F.P), (block % F.P).to(tl.int64)
    ahead = tl.load(row + place(lo + 2, order, blocks, F)[0]) * live
    if F.chained and F.fresh:  # what is above was there before the kernel before
        gdc_wait()
    q = load_query(query, K.parts, F)
    if not PER_TILE:
        digits, unit = query_operands(q, q, q, scale, False, K)
        own = unit
    for i in range(lo, hi):
        next_k = scales_ahead(slab, slot, h, ks, kz, i + 1, blocks, 1, SHUFFLE, F, K)
        next_v = scales_ahead(slab, slot, h, vs, vz, i + 1, blocks, 1, SHUFFLE, F, V)
        _, t, seen = place(i, order, blocks, F)
        if F.apart:
            seen = seen & (i * F.tile + order >= hidden)
        _, vt, v_seen = place(i, plain, blocks, F)
        if K.kind == GROUPED:
            k_scales, k_zeros = group_scales(k_scales, h, ks, kz, ku, km, i, 0, F, K)
        if V.kind == GROUPED:
            v_scales, v_zeros = group_scales(v_scales, h, vs, vz, vu, vm, i, 1, F, V)
        if PER_TILE:
            digits, unit = query_operands(q, k_scales, k_zeros, scale, True, K)
        if K.kind == GROUPED:
            unit = group_unit(q, own, k_scales, k_zeros, scale, K)
        x = key_products(k_at, k_up, t, seen, digits, k_scales, k_zeros, F, K)
        s = logits(x, unit, k_scales[0], k_zeros[0], seen, F, K)
        # Probabilities are taken relative to the tile's own maximum of p * value scale: the digits
        # keep 16 bits of each tile, however small its share of the whole.
        high = s + fast_log2(v_scales[0])[:, None] if PER_TOKEN else s
        if V.kind == GROUPED:
            high += fast_log2(v_scales[V.parts])
        tile_max = tl.max(high, 0)
        if F.apart:  # all of a tile may be hidden
            tile_max = tl.maximum(tile_max, -1e30)
        p = tl.exp2(s - tile_max[None, :])
        weight = p * v_scales[0][:, None] if PER_TOKEN else p
        if V.kind == GROUPED:
            weight = p * v_scales[V.parts]
        pc = columns(weight * reach(V.kind), V.kind, V.multiply, F.digits)
        pc = in_order(pc, SHUFFLE, F)
        o = value_products(v_at, v_up, vt, v_seen, pc, v_scales, v_zeros, F, V)
        new = tl.maximum(m, tile_max)
        keep, gain = tl.exp2(m - new), tl.exp2(tile_max - new)
        m = new
        lsum = lsum * keep[None, :] + p * gain[None, :]
        if ZERO:
            zsum = zsum * keep[None, :] + p * (v_zeros[0][:, None] * gain[None, :])
        if V.kind == GROUPED:
            if V.centred:
                o = add_means(o, v_zeros, tl.sum(p, 0) * reach(V.kind), V)
        elif V.channel:
            o = rescale(o, v_scales, v_zeros, p, V)
        acc = absorb(acc, o, keep, gain, V.parts)
        if F.mass:
            keep_cells(
                cell_lse + (b * F.H + h) * F.G * max_blocks * F.per_block,
                in_order(p, SHUFFLE, F), tile_max, i * CELLS, max_blocks * F.per_block,
                blocks * F.per_block, CELLS, F.G,
            )
        k_scales, k_zeros = next_k
        v_scales, v_zeros = next_v
        k_at = head_address(slab, slot, kd, h, F.H, K.data)
        k_up = head_address(slab, slot, kh, h, F.H, K.high)
        v_at = head_address(slab, slot, vd, h, F.H, V.data)
        v_up = head_address(slab, slot, vh, h, F.H, V.high)
        slab, slot = tl.load(base + ahead // F.P), (ahead % F.P).to(tl.int64)
        ahead = tl.load(row + place(i + 3, order, blocks, F)[0])
    out = finish(acc, tl.sum(zsum, 0)[None, :], V)
    return m, tl.sum(lsum, 0), turned_back(out, V.parts) if V.rotated else out


@triton.jit(do_not_specialize=["max_blocks", "splits", "alike"])  # they change from call to call
def decode_split_kernel(
    q_ptr, k_new, v_new, part_out, part_lse, cell_lse, out_ptr, lse_ptr, arrivals, base, table,
    n_blocks, open_base, open_slot, open_len, max_blocks, splits, alike, scale,
    kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm, ok, ov, apart_base, apart_row, first,
    apart_lse, ak, av, an,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, JOIN: tl.constexpr,
):
    """See `decode_triton.paged_decode`. kd .. vm, ok, ov: byte offsets of this layer's planes in a
    slab (data, high bits, scale, zero, unit, mean of keys and values; open keys and values);
    ak, av, an: of keys, values and counts of tokens kept apart.

    Programs of a row and head: F.tails for its open block, then at most `splits` for the sealed
    ones, `alike` of them unless the row is long; what exceeds a row's tiles leaves at once. With
    JOIN the last to finish merges them.
    """
    if F.chained:
        gdc_launch_dependents()
        if not F.fresh:
            gdc_wait()
    PARTS: tl.constexpr = V.parts
    W: tl.constexpr = F.D // V.parts
    pair, part = tl.program_id(0), tl.program_id(1)
    h, b = pair % F.H, pair // F.H
    query = q_ptr + pair * F.G * F.D
    blocks = tl.load(n_blocks + (pair if F.per_head else b))
    tiles = tl.cdiv(blocks * F.S, F.tile) if F.multi else blocks * F.per_block
    per = tl.cdiv(tiles, splits)
    if F.least:  # as many programs as rows alike would get, and more for one that is longer
        per = tl.maximum(per, tl.minimum(tl.cdiv(tiles, alike), F.least))
    parts = F.tails + tl.cdiv(tiles, tl.maximum(per, 1))
    g = tl.arange(0, F.GP)
    at = (pair * (splits + F.tails) + part) * F.G + g
    if part >= parts:
        if not JOIN:
            if F.chained and F.fresh:  # the kernel before may still read what it left there
                gdc_wait()
            tl.store(part_lse + at, tl.full([F.GP], -float("inf"), tl.float32), mask=g < F.G)
        return
    row, hidden = 0, 0
    if F.apart:
        row = tl.load(apart_row + b)
        line = pair if F.per_head else b
        there = blocks > 0
        begin = tl.load(table + line.to(tl.int64) * max_blocks, mask=there, other=-1)
        begins = there & (begin == tl.load(first + b))
        hidden = apart_count(apart_base, row, begins, an, h, F)
    if part < F.tails:
        m, l, out = open_part(
            query, k_new, v_new, open_base, open_slot, open_len, ok, ov, part, b, h, scale,
            apart_base, row, hidden, apart_lse, ak, av, F, V,
        )
    elif F.fold:
        lo = (part - F.tails) * per
        m, l, out = fold_part(
            query, cell_lse, base, table, max_blocks, blocks, lo, tl.minimum(lo + per, tiles), b, h,
            scale, hidden, kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, F, K, V,
        )
    else:
        lo = (part - F.tails) * per
        m, l, out = sealed_part(
            query, cell_lse, base, table, max_blocks, blocks, lo, tl.minimum(lo + per, tiles), b, h,
            scale, hidden, kd, kh, ks, kz, ku, km, vd, vh, vs, vz, vu, vm, F, K, V,
        )
    w = tl.arange(0, W)
    inverse = 1.0 / tl.maximum(l, 1e-37)
    tl.store(part_lse + at, tl.where(l > 0, m + tl.log2(l), -float("inf")), mask=g < F.G)
    at = part_out + at[None, :] * F.D + w[:, None]
    for i in tl.static_range(PARTS):
        tl.store(at + i * W, out[i] * inverse[None, :], mask=(g < F.G)[None, :])
    if JOIN:
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == parts - 1:
            tl.store(arrivals + pair, 0)
            begin_at = pair * (splits + F.tails) * F.G
            merge_parts(part_out + begin_at.to(tl.int64) * F.D, part_lse + begin_at, out_ptr,
                        lse_ptr, pair, parts, F)
