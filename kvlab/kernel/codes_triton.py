"""Device functions shared by the kernels: where a block lies, what its bytes mean, digits.

Digits: a matrix unit multiplies bytes by bytes, and with one query token most of its columns are
idle. So a query (or a probability) is written as the sum of a few 8-bit numbers, one per column,
and the stored bytes are multiplied as they are; the columns are added afterwards. Integer products
are exact, so 16 bits of the query survive where a conversion of every stored element would not
fit into the instruction budget.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel import interpret

NATIVE = tl.constexpr(not interpret.ACTIVE)  # inline PTX exists only where there is a GPU
DENSE, FP8, INT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GROUPED = tl.constexpr(3)  # integers whose scales belong to small groups

# 1.5 * 2^23: adding it leaves an integer in a float's low bits; the extra 128 rounds the high byte.
MAGIC = tl.constexpr(12582912.0 + 128.0)
TOP = tl.constexpr(32512.0)  # largest value of two signed bytes with a high byte up to 127


@triton.constexpr_function
def log2_of(n):
    return n.bit_length() - 1


@triton.jit
def take_bits(x, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Bytes -> (byte >> SHIFT) & MASK, two instructions for four bytes (one if SHIFT is 0)."""
    if NATIVE:  # the constants come as packed operands; the assembler folds them
        shift, mask = tl.full(x.shape, SHIFT, tl.int8), tl.full(x.shape, MASK, tl.int8)
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 t, n; and.b32 n, $2, 0xff; shr.u32 t, $1, n; and.b32 $0, t, $3; }",
            "=r,r,r,r", [x, shift, mask], dtype=tl.int8, is_pure=True, pack=4,
        )
    else:
        y = ((x >> SHIFT) & MASK).to(tl.int8)
    return y


@triton.constexpr_function
def third_asm():
    return "{ .reg .b32 t; shr.b32 t, $2, 1; lop3.b32 $0, $1, t, 0x55555555, 0xa8; }"


@triton.jit
def third_bits(lower, upper):
    """Bytes of third bits of the lower and of the upper half of the dims of all parts, zero
    elsewhere -> the bit of part i at 2 i."""
    if NATIVE:
        y = tl.inline_asm_elementwise(third_asm(), "=r,r,r", [lower, upper], dtype=tl.int8,
                                      is_pure=True, pack=4)
    else:
        y = ((lower | (upper >> 1)) & 0x55).to(tl.int8)
    return y


@triton.jit
def third_bit(x, y, LOW: tl.constexpr, ABOVE: tl.constexpr):
    """Two bits of `x` above LOW and the bit of `y` above ABOVE (2 or more; 0: bit 0) -> codes."""
    if NATIVE:
        low, mask = tl.full(x.shape, LOW, tl.int8), tl.full(x.shape, 3, tl.int8)
        if ABOVE == 0:
            z = tl.inline_asm_elementwise(
                """{ .reg .b32 u; shl.b32 u, $2, 2; lop3.b32 u, $1, u, $3, 0xe4;
                and.b32 $0, u, 0x07070707; }""",
                "=r,r,r,r", [x, y, mask], dtype=tl.int8, is_pure=True, pack=4,
            )
        else:
            above = tl.full(y.shape, ABOVE - 2, tl.int8)
            z = tl.inline_asm_elementwise(
                """{ .reg .b32 n, t, u; and.b32 n, $3, 0xff; shr.u32 t, $1, n;
                and.b32 n, $4, 0xff; shr.u32 u, $2, n; lop3.b32 u, t, u, $5, 0xe4;
                and.b32 $0, u, 0x07070707; }""",
                "=r,r,r,r,r,r", [x, y, low, above, mask], dtype=tl.int8, is_pure=True, pack=4,
            )
    else:
        z = (((x >> LOW) & 3) | (((y >> ABOVE) & 1) << 2)).to(tl.int8)
    return z


@triton.jit
def narrow_code(x, y, PART: tl.constexpr, C: tl.constexpr):
    """Part PART of packed bytes `x`; with 3 bits the third comes from `third_bits` `y`."""
    BITS: tl.constexpr = 2 if C.bits == 3 else C.bits
    if C.bits == 3:
        z = third_bit(x, y, PART * 2, PART * 2)
    else:
        z = take_bits(x, PART * BITS, 2**BITS - 1)
    return z


@triton.jit
def spread_bits(x, y, C: tl.constexpr):
    """Packed bytes [A, B] -> codes as bytes [A, B, parts]; part i is the i-th run of dims."""
    if C.bits == 4:
        z = tl.join(narrow_code(x, y, 0, C), narrow_code(x, y, 1, C))
    else:  # join adds the fastest dim: 0 and 2 first, so that the parts end in order
        even = tl.join(narrow_code(x, y, 0, C), narrow_code(x, y, 2, C))
        odd = tl.join(narrow_code(x, y, 1, C), narrow_code(x, y, 3, C))
        z = tl.reshape(tl.join(even, odd), [x.shape[0], x.shape[1], 4])
    return z


@triton.jit
def signed_byte(x):
    """Unsigned codes 0..255 -> code - 128 as signed bytes."""
    if NATIVE:
        y = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        y = (x ^ 128).to(tl.int8, bitcast=True)
    return y


@triton.jit
def fast_log2(x):
    """log2 of a positive normal number, to about 2^-22."""
    if NATIVE:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _round_bits(x, LOST: tl.constexpr):
    """fp32 with its last LOST bits rounded off, to nearest even; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + (2 ** (LOST - 1) - 1) + ((bits >> LOST) & 1)) & -(2**LOST)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def narrow(x, DT: tl.constexpr):
    """fp32 -> DT, to nearest even; the interpreter's own casts are not."""
    if not NATIVE and tl.bfloat16 == DT:
        x = _round_bits(x, 16)
    elif not NATIVE and tl.float8e4nv == DT:
        small = ((x * 512.0 + 12582912.0) - 12582912.0) / 512.0  # below 2^-6: multiples of 2^-9
        small = tl.where(small == 0, x * 0.0, small)  # keeps the sign of a zero
        x = tl.where(tl.abs(x) < 0.015625, small, _round_bits(x, 20))
    return x.to(DT)


@triton.jit
def int_digits(x, j):
    """|x| <= TOP -> column 0: the high signed byte, other columns: the low one (weights 256, 1)."""
    bits = (x + MAGIC).to(tl.int32, bitcast=True)
    return ((bits >> tl.where(j == 0, 8, 0)) ^ tl.where(j == 0, 0, 128)).to(tl.int8)


@triton.jit
def float_digits(x, j, MASK: tl.constexpr, DT: tl.constexpr):
    """x -> two columns of type DT whose sum is x; MASK keeps the sign, exponent and DT's bits."""
    first = (x.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
    return tl.where(j == 0, first, tl.where(j == 1, x - first, 0.0)).to(DT)


@triton.jit
def digits(x, j, KIND: tl.constexpr, DT: tl.constexpr):
    """Columns `j` of `x`, which must lie within `reach(KIND)`, as operands of the matrix unit."""
    if KIND == INT:
        y = int_digits(x, j)
    elif tl.bfloat16 == DT:
        y = float_digits(x, j, -0x10000, DT)
    elif tl.float16 == DT:
        y = float_digits(x, j, -0x2000, DT)
    else:
        y = tl.where(j == 0, x, 0.0)
    return y


@triton.jit
def reach(KIND: tl.constexpr):
    """Largest magnitude that `digits` takes."""
    top: tl.constexpr = 1.0 if KIND == DENSE else (TOP if KIND == INT else 256.0)
    return top


@triton.jit
def join_products(x, KIND: tl.constexpr):
    """Products per column [M, GP, ND] -> fp32 [M, GP], the sum with the columns' weights: 1, for
    bytes 256 and 1. Codes are summed in int32, which 256 products of bytes do not fill."""
    if KIND == INT:
        j = tl.arange(0, x.shape[2])[None, None, :]
        y = tl.sum(x << tl.where(j == 0, 8, 0), 2)
    else:
        y = tl.sum(x, 2)
    return y.to(tl.float32)


@triton.jit
def rotate(x):
    """fp32 [T, D] -> each row times the Hadamard matrix over sqrt(D); the bits of
    `quantize_ref.rotate` where products and sums are not fused."""
    T: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    ROUNDS: tl.constexpr = log2_of(D)
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(tl.reshape(x, [T, D // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [T, D])
    return x * D**-0.5


@triton.jit
def typed(addr, DT: tl.constexpr):
    """Byte address (int64) -> pointer."""
    return addr.to(tl.pointer_type(DT))


@triton.jit
def lane(x, TOKEN_DIM: tl.constexpr):
    """A vector over tokens or data columns as a row or a column of the tile."""
    return x[:, None] if TOKEN_DIM == 0 else x[None, :]


@triton.jit
def tile_pointer(addr, rows, cols, DT: tl.constexpr, DOWN: tl.constexpr, ALONG: tl.constexpr,
                 VEC: tl.constexpr):
    """Pointers [rows, cols] from byte address `addr`, aligned to VEC elements.

    The hint sits on the cast itself: on the result of a call it would be lost.
    """
    p = addr.to(tl.pointer_type(DT))
    p = tl.multiple_of(p, VEC * (DT.primitive_bitwidth // 8))
    return p + rows[:, None] * DOWN + cols[None, :] * ALONG


@triton.jit
def load_tile(
    addr, t, w, mask, W: tl.constexpr, DT: tl.constexpr, RUN: tl.constexpr,
    SLOTS_LAST: tl.constexpr, S: tl.constexpr, MULTI: tl.constexpr, TOKEN_DIM: tl.constexpr,
    columns=None,
):
    """Stored elements of tokens `t` and columns `w`, [T, W] or, with TOKEN_DIM 1, [W, T]; zeros
    where `mask` (of tokens) or `columns` is not set.

    addr: int64 byte address of the head's tile, one, or with MULTI one per token; RUN: elements
    that lie together and aligned along the axis of unit stride.
    """
    size: tl.constexpr = DT.primitive_bitwidth // 8
    SLOT: tl.constexpr = 1 if SLOTS_LAST else W
    UNIT: tl.constexpr = S if SLOTS_LAST else 1
    off = lane(t, TOKEN_DIM) * SLOT + lane(w, 1 - TOKEN_DIM) * UNIT
    if MULTI:
        p = (lane(addr, TOKEN_DIM) + off * size).to(tl.pointer_type(DT))
        if (TOKEN_DIM == 0) == SLOTS_LAST:  # the run lies along the tile's first dim
            p = tl.max_contiguous(tl.multiple_of(p, [RUN * size, 1]), [RUN, 1])
        else:
            p = tl.max_contiguous(tl.multiple_of(p, [1, RUN * size]), [1, RUN])
    else:
        p = addr.to(tl.pointer_type(DT))  # a hint on a call's result would be lost with the call
        p = tl.multiple_of(p, RUN * size) + off
    wanted = lane(mask, TOKEN_DIM)
    if columns is not None:
        wanted = wanted & lane(columns, 1 - TOKEN_DIM)
    return tl.load(p, mask=wanted, other=0 if DT.is_int() else 0.0)


@triton.jit
def load_bytes(
    addr, high, t, w, mask, F: tl.constexpr, TOKEN_DIM: tl.constexpr, C: tl.constexpr
):
    """Bytes `w` of packed codes of tokens `t`, [T, W] (TOKEN_DIM 1: [W, T]); for 3 bits also the
    `third_bits` of the bytes that hold them.

    addr, high: addresses of the head's tile in the `data` and the `high` plane.
    """
    W: tl.constexpr = F.D * (2 if C.bits == 3 else C.bits) // 8
    x = load_tile(
        addr, t, w, mask, W, C.dtype, C.run, C.slots_last, F.S, F.multi, TOKEN_DIM
    )
    y = x
    if C.bits == 3:  # bit n of byte j is dim n * D / 8 + j: each byte serves two of x
        V: tl.constexpr = F.D // 8
        RUN: tl.constexpr = C.run if C.slots_last else min(C.run, V)
        lower, upper = w // V % 2 == 0, w // V % 2 == 1
        y = third_bits(
            load_tile(high, t, w % V, mask, V, C.dtype, RUN, C.slots_last, F.S, F.multi, TOKEN_DIM,
                      lower),
            load_tile(high, t, w % V, mask, V, C.dtype, RUN, C.slots_last, F.S, F.multi, TOKEN_DIM,
                      upper))
    return x, y


@triton.jit
def whole_codes(x, y, TOKEN_DIM: tl.constexpr, C: tl.constexpr):
    """Packed bytes -> codes as bytes for all dims at once: slower, and right for every head_dim."""
    z = tl.permute(spread_bits(x, y, C), [2, 0, 1] if TOKEN_DIM else [0, 2, 1])
    A: tl.constexpr = z.shape[0] * z.shape[1] if TOKEN_DIM else z.shape[0]
    B: tl.constexpr = z.shape[2] if TOKEN_DIM else z.shape[1] * z.shape[2]
    return tl.reshape(z, [A, B])
