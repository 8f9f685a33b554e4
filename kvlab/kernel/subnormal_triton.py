"""Packed codes as operands of fp16 products: subnormal numbers, made by a mask.

A code in the low bits of a half stands for code * 2^-24, which the matrix unit multiplies exactly.
So four stored elements take two to six instructions and no conversion: bytes are widened to halves,
and each part of a byte keeps its place, which whoever multiplies accounts for (`place_of`).

F is a `sides.Frame`, C a `sides.Side`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import NATIVE, third_bits

LEAST_HALF = tl.constexpr(2.0**-24)  # what the lowest bit of a half counts


@triton.constexpr_function
def masks_asm(bits):
    """Four packed bytes -> all their codes as halves, two to a register, part by part; the code of
    part i keeps its place within the byte."""
    parts = 4 if bits < 4 else 2
    outs, ins = 2 * parts, f"${2 * parts}"
    text = "{ .reg .b32 a, b, c, d, t;"
    text += f" prmt.b32 a, {ins}, 0, 0x4140; prmt.b32 b, {ins}, 0, 0x4342;"
    if bits == 3:  # the third bit of part i lies at 2 i and belongs at 2 i + 2
        high = f"${outs + 1}"
        text += f" prmt.b32 c, {high}, 0, 0x4140; prmt.b32 d, {high}, 0, 0x4342;"
        text += " shl.b32 c, c, 2; shl.b32 d, d, 2;"
    step = 4 if bits == 4 else 2
    for i in range(parts):
        for n in range(2):
            x, y, out = "ab"[n], "cd"[n], f"${2 * i + n}"
            low = ((2**step - 1) << (step * i)) * 0x10001
            if bits == 3:
                above = (4 << (step * i)) * 0x10001
                text += f" and.b32 t, {y}, {above}; lop3.b32 {out}, {x}, {low}, t, 0xea;"
            else:
                text += f" and.b32 {out}, {x}, {low};"
    return text + " }"


@triton.constexpr_function
def constraints_of(bits):
    return ",".join(["=r"] * (8 if bits < 4 else 4) + ["r"] * (2 if bits == 3 else 1))


@triton.jit
def placed(x, y, PART: tl.constexpr, BITS: tl.constexpr):
    """Part PART of bytes as fp16 numbers, in the interpreter."""
    STEP: tl.constexpr = 4 if BITS == 4 else 2
    code = (x.to(tl.int32) >> (STEP * PART)) & (2**STEP - 1)
    if BITS == 3:
        code |= ((y.to(tl.int32) >> (2 * PART)) & 1) << 2
    return (code.to(tl.float32) * (LEAST_HALF * 2 ** (STEP * PART))).to(tl.float16)


@triton.jit
def subnormals(x, y, BITS: tl.constexpr):
    """Packed bytes (3 bits: and the `third_bits` that belong to them) -> their codes, a tensor of
    fp16 numbers for each part; those of part i are 2^(bits * i - 24) of the code (3 bits: 2^(2 i -
    24))."""
    if BITS == 4:
        if NATIVE:
            z = tl.inline_asm_elementwise(
                masks_asm(BITS), constraints_of(BITS), [x], dtype=(tl.float16, tl.float16),
                is_pure=True, pack=4)
        else:
            z = placed(x, y, 0, BITS), placed(x, y, 1, BITS)
    else:
        if NATIVE:
            z = tl.inline_asm_elementwise(
                masks_asm(BITS), constraints_of(BITS), [x, y] if BITS == 3 else [x],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4)
        else:
            z = (placed(x, y, 0, BITS), placed(x, y, 1, BITS), placed(x, y, 2, BITS),
                 placed(x, y, 3, BITS))
    return z


@triton.jit
def packed_tile(at, t, w, mask, DOWN: tl.constexpr, ALONG: tl.constexpr, RUN: tl.constexpr):
    """Bytes [.., T, W] of a head's plane; t [.., T, 1] and w [.., 1, W] in steps of DOWN, ALONG.
    mask: over w; None: all."""
    p = at.to(tl.pointer_type(tl.uint8))
    p = tl.multiple_of(p, RUN) + (t * DOWN + w * ALONG)
    if mask is None:
        y = tl.load(p)
    else:
        y = tl.load(p, mask=mask, other=0)
    return y


@triton.jit
def small_tile(at, places):
    """e4m3 numbers of a head's plane, as fp16; runs of 16 places are aligned."""
    p = tl.multiple_of(at.to(tl.pointer_type(tl.float8e4nv)), 16)
    return tl.load(p + places).to(tl.float16)


@triton.jit
def part_operands(at, up, t, TOKEN_DIM: tl.constexpr, F: tl.constexpr, C: tl.constexpr):
    """Stored codes of tokens `t` as fp16 numbers, one tensor for each part, in order.

    t: [SUB, T, 1]; or with TOKEN_DIM 1 [1, T].
    """
    PARTS: tl.constexpr = C.parts
    W: tl.constexpr = F.D // C.parts
    PER: tl.constexpr = 4 if C.bits < 4 else 2
    RUNS: tl.constexpr = C.parts // PER  # parts that lie side by side in a row of bytes
    ROW: tl.constexpr = F.D // PER
    HIGH: tl.constexpr = F.D // 8
    UNIT: tl.constexpr = F.S if C.slots_last else 1
    LOW_SLOT: tl.constexpr = 1 if C.slots_last else ROW
    HIGH_SLOT: tl.constexpr = 1 if C.slots_last else HIGH
    HIGH_RUN: tl.constexpr = C.run if C.slots_last else min(C.run, HIGH)
    runs = ()
    for i in tl.static_range(RUNS):
        w = i * W + tl.arange(0, W)
        w = w[:, None] if TOKEN_DIM else w[None, None, :]
        x = packed_tile(at, t, w, None, LOW_SLOT, UNIT, C.run)
        y = x
        if C.bits == 3:  # of two loads, each of one half: positions are no operand's to have
            lower = packed_tile(up, t, w % HIGH, w // HIGH % 2 == 0, HIGH_SLOT, UNIT, HIGH_RUN)
            upper = packed_tile(up, t, w % HIGH, w // HIGH % 2 == 1, HIGH_SLOT, UNIT, HIGH_RUN)
            y = third_bits(lower, upper)
        runs = runs + (subnormals(x, y, C.bits),)
    parts = ()
    for i in tl.static_range(PARTS):
        parts = parts + (runs[i % RUNS][i // RUNS],)
    return parts


@triton.constexpr_function
def place_of(part, parts, bits):
    """Power of two by which part `part` of the operands is too large, beside 2^-24."""
    per = 4 if bits < 4 else 2
    return 2.0 ** ((4 if bits == 4 else 2) * (part // (parts // per)))
