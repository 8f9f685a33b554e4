"""Dense tokens in the decode kernel: the open block, this step's own, those kept apart.

F is a `sides.Frame`, V the values' `sides.Side`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kvlab.kernel.codes_triton import DENSE
from kvlab.kernel.decode_parts_triton import (
    columns,
    grouped,
    load_query,
    multiply,
    query_columns,
    zero_parts,
)


@triton.jit
def tail_tile(k, v, t, known, F: tl.constexpr, V: tl.constexpr):
    """Tokens `t` of a dense open block [S, D] at `k`, `v`: keys [T, D], values in parts [W, T]."""
    PARTS: tl.constexpr = V.parts
    W: tl.constexpr = F.D // V.parts
    w, d = tl.arange(0, W), tl.arange(0, F.D)
    k, v = tl.multiple_of(k, 16), tl.multiple_of(v, 16)
    kt = tl.load(k + t[:, None] * F.D + d[None, :], mask=known[:, None], other=0.0)
    at, parts = v + t[None, :] * F.D + w[:, None], ()
    for i in tl.static_range(PARTS):
        parts = parts + (tl.load(at + i * W, mask=known[None, :], other=0.0),)
    return kt, parts


@triton.jit
def with_newest(kt, parts, k_new, v_new, here, V: tl.constexpr):
    """The tile with this step's token, [D] at `k_new` and `v_new`, where `here` [T] is set."""
    PARTS: tl.constexpr = V.parts
    W: tl.constexpr = parts[0].shape[0]
    w, d = tl.arange(0, W), tl.arange(0, kt.shape[1])
    kt, y = tl.where(here[:, None], tl.load(k_new + d)[None, :], kt), ()
    for i in tl.static_range(PARTS):
        y = y + (tl.where(here[None, :], tl.load(v_new + i * W + w)[:, None], parts[i]),)
    return kt, y


@triton.jit
def tail_attention(qc, kt, parts, seen, m, l, out, scale, F: tl.constexpr, V: tl.constexpr):
    """Adds a tile of an open block to a partial result; qc: the query's columns.

    m, l: running maximum (base 2) and sum [GP]; out: unnormalized parts [W, GP].
    """
    PARTS: tl.constexpr = V.parts
    s = tl.sum(grouped(multiply(kt, qc, None, DENSE), F.GP, F.digits), 2) * scale
    s = tl.where(seen[:, None], s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 0))
    keep, p = tl.exp2(m - new), tl.exp2(s - new[None, :])
    pc, y = columns(p, DENSE, F.open_dtype, F.digits), ()
    for i in tl.static_range(PARTS):
        o = tl.sum(grouped(multiply(parts[i], pc, None, DENSE), F.GP, F.digits), 2)
        y = y + (out[i] * keep[None, :] + o,)
    return new, l * keep + tl.sum(p, 0), y


@triton.jit
def dense_address(base, slot, off, h, SLOTS: tl.constexpr, P: tl.constexpr, F: tl.constexpr):
    """Pointer to head `h` of row `slot` of a store of SLOTS dense tokens a row, P rows a slab."""
    HEAD: tl.constexpr = SLOTS * F.D * (F.open_dtype.primitive_bitwidth // 8)
    place = ((slot % P).to(tl.int64) * F.H + h) * HEAD + off
    address = tl.load(base + slot // P) + place
    return tl.multiple_of(address.to(tl.pointer_type(F.open_dtype)), 16)


@triton.jit
def open_tile(base, rows, ok, ov, start, stored, h, F: tl.constexpr, V: tl.constexpr):
    """Tokens [start, start + 32) of head `h` in the open blocks `rows`, `stored` in all."""
    t = start + tl.arange(0, 32)
    known = t < stored
    if F.S % 32 == 0:  # they lie in one of the blocks
        place = tl.minimum(start // F.S, F.opened - 1)
        row = tl.load(rows + place)
        k = dense_address(base, row, ok, h, F.S, F.open_P, F)
        v = dense_address(base, row, ov, h, F.S, F.open_P, F)
        kt, parts = tail_tile(k, v, t - place * F.S, known, F, V)
    else:
        PARTS: tl.constexpr = V.parts
        W: tl.constexpr = F.D // V.parts
        w, d = tl.arange(0, W), tl.arange(0, F.D)
        row = tl.load(rows + t // F.S, mask=known, other=0)
        k = dense_address(base, row, ok, h, F.S, F.open_P, F) + t % F.S * F.D
        v = dense_address(base, row, ov, h, F.S, F.open_P, F) + t % F.S * F.D
        kt = tl.load(k[:, None] + d[None, :], mask=known[:, None], other=0.0)
        parts = ()
        for i in tl.static_range(PARTS):
            at = v[None, :] + (i * W + w)[:, None]
            parts = parts + (tl.load(at, mask=known[None, :], other=0.0),)
    return kt, parts


@triton.jit
def apart_count(base, row, begins, off, h, F: tl.constexpr):
    """How many first tokens head `h` has in row `row` of those kept apart; 0 unless `begins`."""
    slab = tl.load(base + row // F.apart_P)
    at = slab + off + ((row % F.apart_P) * F.H + h) * 4
    return tl.load(at.to(tl.pointer_type(tl.int32)), mask=begins, other=0)


@triton.jit
def apart_part(qc, base, row, count, ak, av, h, scale, F: tl.constexpr, V: tl.constexpr):
    """Partial result over `count` tokens of row `row`; qc: the query's columns."""
    CHUNK: tl.constexpr = 32
    GP: tl.constexpr = F.GP
    W: tl.constexpr = F.D // V.parts
    m, l = tl.full([GP], -1e30, tl.float32), tl.zeros([GP], tl.float32)
    out = zero_parts(V.parts, W, GP)
    k = dense_address(base, row, ak, h, F.apart, F.apart_P, F)
    v = dense_address(base, row, av, h, F.apart, F.apart_P, F)
    for start in range(0, count, CHUNK):
        t = start + tl.arange(0, CHUNK)
        kt, parts = tail_tile(k, v, t, t < count, F, V)
        m, l, out = tail_attention(qc, kt, parts, t < count, m, l, out, scale, F, V)
    return m, l, out


@triton.jit
def open_part(
    query, k_new, v_new, open_base, open_slot, open_len, ok, ov, part, b, h, scale,
    apart_base, apart_row, apart_here, apart_lse, ak, av, F: tl.constexpr, V: tl.constexpr,
):
    """Partial result over share `part` of a row's open blocks. With F.fresh the last token comes
    from `k_new`, `v_new` [B, H, D] and is put into the last of them.

    With F.apart the first share has `apart_here` tokens kept apart, too; the log2 of their sum goes
    to `apart_lse` with F.mass.
    """
    CHUNK: tl.constexpr = 32
    STRIDE: tl.constexpr = F.tails * 32
    GP: tl.constexpr = F.GP
    W: tl.constexpr = F.D // V.parts
    MOST: tl.constexpr = F.S * F.opened
    count, rows = tl.load(open_len + b), open_slot + b * F.opened
    stored = count - 1 if F.fresh else count
    last = tl.minimum(tl.maximum(stored, 0) // F.S, F.opened - 1)  # the block of the newest token
    own = tl.load(rows + last)
    k = dense_address(open_base, own, ok, h, F.S, F.open_P, F)
    v = dense_address(open_base, own, ov, h, F.S, F.open_P, F)
    at, d = (b * F.H + h) * F.D, tl.arange(0, F.D)
    m, l = tl.full([GP], -1e30, tl.float32), tl.zeros([GP], tl.float32)
    out = zero_parts(V.parts, W, GP)
    t = part * CHUNK + tl.arange(0, CHUNK)
    if F.opened == 1:
        kt, parts = tail_tile(k, v, t, t < stored, F, V)
    else:
        kt, parts = open_tile(open_base, rows, ok, ov, part * CHUNK, stored, h, F, V)
    if F.chained and F.fresh:
        gdc_wait()
    qc = query_columns(load_query(query, 1, F)[0], DENSE, F.open_dtype)
    if F.apart:
        here = tl.where(part == 0, apart_here, 0)
        m, l, out = apart_part(qc, apart_base, apart_row, here, ak, av, h, scale, F, V)
        if F.mass:
            g, sum = tl.arange(0, GP), tl.where(l > 0, m + tl.log2(l), -float("inf"))
            known = g < tl.where(part == 0, F.G, 0)
            tl.store(apart_lse + (b * F.H + h) * F.G + g, sum, mask=known)
    for start in range(part * CHUNK, count, STRIDE):
        if start > part * CHUNK:
            t = start + tl.arange(0, CHUNK)
            if F.opened == 1:
                kt, parts = tail_tile(k, v, t, t < stored, F, V)
            else:
                kt, parts = open_tile(open_base, rows, ok, ov, start, stored, h, F, V)
        if F.fresh:
            kt, parts = with_newest(kt, parts, k_new + at, v_new + at, t == stored, V)
        m, l, out = tail_attention(qc, kt, parts, t < count, m, l, out, scale, F, V)
    if F.fresh:  # noqa: SIM102 - the outer one is known at compile time
        if (part == stored // CHUNK % F.tails) & (stored >= 0) & (stored < MOST):
            tl.store(k + (stored - last * F.S) * F.D + d, tl.load(k_new + at + d))
            tl.store(v + (stored - last * F.S) * F.D + d, tl.load(v_new + at + d))
    return m, l, out
