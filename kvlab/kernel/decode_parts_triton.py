"""The pieces of the split decode kernel: operands, products with stored tiles, the open tail.

Shapes: TILE tokens of one block (MULTI: of neighbouring blocks), W data columns (bytes of a packed
row; PARTS of them make D), G query heads of one key/value head padded to GP, ND digits per head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import (
    DENSE,
    GROUPED,
    INT,
    NATIVE,
    digits,
    join_products,
    load_tile,
    narrow_code,
    reach,
    rotate,
    signed_byte,
    whole_codes,
)
from kvlab.kernel.decode_groups_triton import group_operands, load_packed


@triton.jit
def load_query(q, PARTS: tl.constexpr, F: tl.constexpr):
    """The group's query heads in parts, each fp32 [GP, ND, W], once per digit; `q`: first head."""
    W: tl.constexpr = F.D // PARTS
    g, j = tl.arange(0, F.GP)[:, None, None], tl.arange(0, F.digits)[None, :, None]
    at = q + g * F.D + tl.arange(0, W)[None, None, :] + j * 0
    parts = ()
    for i in tl.static_range(PARTS):
        parts = parts + (tl.load(at + i * W, mask=g < F.G, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def zero_parts(PARTS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """PARTS zero tensors [A, B]."""
    y = ()
    for _ in tl.static_range(PARTS):
        y = y + (tl.zeros([A, B], tl.float32),)
    return y


@triton.jit
def normalizer(top, KIND: tl.constexpr):
    """Factor that brings magnitudes up to `top` into the digits' reach; a power of two where it is
    not INT."""
    if KIND == DENSE:
        y = tl.full(top.shape, 1.0, tl.float32)
    elif KIND != INT:
        power = (tl.maximum(top, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000)
        y = 128.0 / power.to(tl.float32, bitcast=True)
    else:
        y = reach(INT) / tl.maximum(top, 1e-30)
    return y


@triton.jit
def columns(x, KIND: tl.constexpr, DT: tl.constexpr, ND: tl.constexpr):
    """[M, GP] within reach -> [M, GP * ND] digits in the type the matrix unit multiplies.

    The new dim comes by `reshape`: then a thread's neighbouring elements stay neighbours along M,
    the summed dim, and go to shared memory and back as words instead of bytes. From 16 columns on
    Hopper's group-wide products take them; Triton cannot compile those with it.
    """
    if x.shape[1] * ND < 16:
        x = tl.reshape(x, [x.shape[0], x.shape[1], 1])
    else:
        x = x[:, :, None]
    y = digits(x, tl.arange(0, ND)[None, None, :], KIND, DT)
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
def operands(addr, high, t, mask, TOKEN_DIM: tl.constexpr, F: tl.constexpr, C: tl.constexpr):
    """The stored tile as left sides of products, one per part: [TILE, W] or [W, TILE]."""
    PARTS: tl.constexpr = C.parts
    if C.kind == INT and C.bits < 8:
        x, y = load_packed(addr, high, t, mask, F, TOKEN_DIM, C)
        if C.wide:
            parts = (whole_codes(x, y, TOKEN_DIM, C),)
        else:
            parts = ()
            for i in tl.static_range(PARTS):
                parts = parts + (narrow_code(x, y, i, C),)
    else:
        x = load_tile(
            addr, t, tl.arange(0, F.D), mask, F.D, C.dtype, C.run, C.slots_last, F.S, F.multi,
            TOKEN_DIM,
        )
        parts = (signed_byte(x) if C.kind == INT else x.to(C.multiply),)
    return parts


@triton.jit
def key_products(addr, high, t, mask, b, scales, zeros, F: tl.constexpr, C: tl.constexpr):
    """Stored keys times the query's digits `b` (one right side per part): [TILE, N]."""
    PARTS: tl.constexpr = C.parts
    if C.kind == GROUPED:
        a = group_operands(addr, high, t, mask, scales, zeros, 0, F, C)
    else:
        a = operands(addr, high, t, mask, 0, F, C)
    y = multiply(a[0], b[0], None, C.kind)
    for i in tl.static_range(1, PARTS):
        y = multiply(a[i], b[i], y, C.kind)
    return y


@triton.jit
def value_products(addr, high, t, mask, b, scales, zeros, F: tl.constexpr, C: tl.constexpr):
    """Stored values times the probabilities' digits `b`: fp32 [W, GP] per part."""
    PARTS: tl.constexpr = C.parts
    y = ()
    if C.kind == GROUPED:
        a = group_operands(addr, high, t, mask, scales, zeros, 1, F, C)
    else:
        a = operands(addr, high, t, mask, 1, F, C)
    for i in tl.static_range(PARTS):
        x = grouped(multiply(a[i], b, None, C.kind), F.GP, F.digits)
        y = y + (join_products(x, C.kind),)
    return y


@triton.jit
def grouped(x, GP: tl.constexpr, ND: tl.constexpr):
    """[M, GP * ND] -> [M, GP, ND]."""
    return tl.reshape(x, [x.shape[0], GP, ND])


@triton.jit
def absorb(acc, parts, keep, gain, PARTS: tl.constexpr):
    """Running values [W, GP] per part and a tile's products -> the new running values."""
    y = ()
    for i in tl.static_range(PARTS):
        y = y + (acc[i] * keep[None, :] + parts[i] * gain[None, :],)
    return y


@triton.jit
def four_turned(a, b, c, d):
    """Sums of four with the signs of the Hadamard matrix."""
    a, b, c, d = a + b, a - b, c + d, c - d
    return a + c, b + d, a - c, b - d


@triton.jit
def turned_back(parts, PARTS: tl.constexpr):
    """Outputs [W, GP] per part, of values that were stored rotated -> the same, as they were.

    A turn of all PARTS * W channels is one of the channels of each part and one of the parts.
    """
    y = ()
    for i in tl.static_range(PARTS):
        y = y + (tl.trans(rotate(tl.trans(parts[i]))) * PARTS**-0.5,)
    if PARTS == 2:
        y = y[0] + y[1], y[0] - y[1]
    if PARTS == 4:
        y = four_turned(y[0], y[1], y[2], y[3])
    if PARTS == 8:
        a = four_turned(y[0], y[1], y[2], y[3])
        b = four_turned(y[4], y[5], y[6], y[7])
        y = (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3],
             a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3])  # fmt: skip
    return y
