"""The pieces of the split decode kernel: operands, products with stored tiles, the open tail.

Shapes: TILE tokens of one block (MULTI: of neighbouring blocks), W data columns (bytes of a packed
row; PARTS of them make D), G query heads of one key/value head padded to GP, ND digits per head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import (
    DENSE,
    FP8,
    INT,
    NATIVE,
    digits,
    load_codes,
    load_tile,
    reach,
    signed_byte,
    take_bits,
)


@triton.jit
def load_query(
    q, part, W: tl.constexpr, D: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, ND: tl.constexpr
):
    """One part of the group's query heads, fp32 [GP, ND, W], once per digit; `q`: first head."""
    d, g = part * W + tl.arange(0, W)[None, None, :], tl.arange(0, GP)[:, None, None]
    at = q + g * D + d + tl.arange(0, ND)[None, :, None] * 0
    return tl.load(at, mask=g < G, other=0.0).to(tl.float32)


@triton.jit
def normalizer(top, KIND: tl.constexpr):
    """Factor that brings magnitudes up to `top` into the digits' reach; a power of two for FP8."""
    if KIND == DENSE:
        y = tl.full(top.shape, 1.0, tl.float32)
    elif KIND == FP8:
        power = (tl.maximum(top, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000)
        y = 128.0 / power.to(tl.float32, bitcast=True)
    else:
        y = reach(INT) / tl.maximum(top, 1e-30)
    return y


@triton.jit
def columns(x, KIND: tl.constexpr, DT: tl.constexpr, ND: tl.constexpr):
    """[M, GP] within reach -> [M, GP * ND] digits in the type the matrix unit multiplies."""
    y = digits(x[:, :, None], tl.arange(0, ND)[None, None, :], KIND, DT)
    y = tl.broadcast_to(y, [x.shape[0], x.shape[1], ND])
    return tl.reshape(y, [x.shape[0], x.shape[1] * ND])


@triton.jit
def query_columns(x, KIND: tl.constexpr, DT: tl.constexpr):
    """[GP, ND, W] within reach -> digits [W, GP * ND]. Laid out by rows of W: the matrix unit takes
    8-bit operands four neighbours at a time along W."""
    y = digits(x, tl.arange(0, x.shape[1])[None, :, None], KIND, DT)
    return tl.trans(tl.reshape(y, [x.shape[0] * x.shape[1], x.shape[2]]))


@triton.jit
def multiply(a, b, acc, KIND: tl.constexpr):
    """a @ b (+ acc): int32 for codes, fp32 otherwise; exact products for codes and fp32."""
    if KIND == INT:
        y = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif not NATIVE and b.dtype == tl.bfloat16:  # the interpreter would multiply the bits
        y = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        y = tl.dot(a, b, acc, input_precision="ieee")
    return y


@triton.jit
def products(
    addr, high, t, mask, b0, b1, TOKEN_DIM: tl.constexpr, F: tl.constexpr, C: tl.constexpr
):
    """Stored tile times columns, before scales: [TILE, N] for keys, two of [W, N] for values.

    Keys (TOKEN_DIM 0) sum over their parts: b0, b1 are the query's. Values (TOKEN_DIM 1) have one
    right side, b0, and one result per part; with one part both results are the same.
    """
    NONE: tl.constexpr = None
    if C.wide:
        x = load_codes(addr, high, t, mask, F.D, F.S, F.multi, TOKEN_DIM, C)
        y0 = multiply(x, b0, NONE, INT)
        y1 = y0
    else:
        W: tl.constexpr = F.D // C.parts
        w = tl.arange(0, W)
        x = load_tile(
            addr, t, w, mask, W, C.dtype, C.run, C.slots_last, F.S, F.multi, TOKEN_DIM
        )
        if C.parts == 2:
            y0 = multiply(take_bits(x, 0, 15), b0, NONE, INT)
            if TOKEN_DIM == 0:
                y0 = multiply(take_bits(x, 4, 15), b1, y0, INT)
                y1 = y0
            else:
                y1 = multiply(take_bits(x, 4, 15), b0, NONE, INT)
        else:
            if C.kind == INT:
                x = signed_byte(x)
            y0 = multiply(x.to(b0.dtype), b0, NONE, C.kind)
            y1 = y0
    return y0, y1


@triton.jit
def grouped(x, GP: tl.constexpr, ND: tl.constexpr):
    """[M, GP * ND] -> [M, GP, ND]."""
    return tl.reshape(x, [x.shape[0], GP, ND])


@triton.jit
def absorb(acc, part, keep, gain):
    """Running values [W, GP, ND] and a tile's products -> the new running values."""
    return acc * keep[None, :, None] + part.to(tl.float32) * gain[None, :, None]


@triton.jit
def open_tail(query, k, v, count, m, l, out0, out1, scale, PARTS: tl.constexpr, F: tl.constexpr):
    """Adds the `count` tokens of an open block, dense [S, D] at `k` and `v`, to a partial result.

    m, l: running maximum (base 2) and sum [GP]; out0, out1: unnormalized parts [W, GP].
    """
    CHUNK: tl.constexpr = 32
    W: tl.constexpr = F.D // PARTS
    w, d = tl.arange(0, W), tl.arange(0, F.D)
    q = load_query(query, 0, F.D, F.D, F.G, F.GP, F.digits)
    qc = query_columns(q, DENSE, F.open_dtype)
    k, v = tl.multiple_of(k, 16), tl.multiple_of(v, 16)
    for start in range(0, count, CHUNK):
        t = start + tl.arange(0, CHUNK)
        seen = t < count
        kt = tl.load(k + t[:, None] * F.D + d[None, :], mask=seen[:, None], other=0.0)
        s = tl.sum(grouped(multiply(kt, qc, None, DENSE), F.GP, F.digits), 2) * scale
        s = tl.where(seen[:, None], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, 0))
        keep, p = tl.exp2(m - new), tl.exp2(s - new[None, :])
        m, l = new, l * keep + tl.sum(p, 0)
        pc = columns(p, DENSE, F.open_dtype, F.digits)
        at = v + t[None, :] * F.D + w[:, None]
        v0 = tl.load(at, mask=seen[None, :], other=0.0)
        o0 = tl.sum(grouped(multiply(v0, pc, None, DENSE), F.GP, F.digits), 2)
        out0 = out0 * keep[None, :] + o0
        if PARTS == 2:
            v1 = tl.load(at + W, mask=seen[None, :], other=0.0)
            o1 = tl.sum(grouped(multiply(v1, pc, None, DENSE), F.GP, F.digits), 2)
            out1 = out1 * keep[None, :] + o1
    return m, l, out0, out1


@triton.jit
def open_address(base, slot, off, h, F: tl.constexpr):
    """Pointer to head `h` of the open row `slot`."""
    HEAD: tl.constexpr = F.S * F.D * (F.open_dtype.primitive_bitwidth // 8)
    place = ((slot % F.open_P).to(tl.int64) * F.H + h) * HEAD + off
    address = tl.load(base + slot // F.open_P) + place
    return tl.multiple_of(address.to(tl.pointer_type(F.open_dtype)), 16)
