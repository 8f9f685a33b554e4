"""Loads and stores of a thread's own, by inline assembly where there is a GPU.

Triton looks at all that hangs together with each load and store it knows of: of hundreds in one
straight program it takes minutes to compile. None of these has a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import NATIVE, typed


@triton.jit
def read_number(at, DT: tl.constexpr):
    """Numbers at pointers, as fp32."""
    if NATIVE and DT.primitive_bitwidth == 16:
        word = tl.inline_asm_elementwise(
            "{ .reg .b16 t; ld.global.b16 t, [$1]; cvt.u32.u16 $0, t; }", "=r,l",
            [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )
        y = word.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
    else:
        y = tl.load(at).to(tl.float32)
    return y


@triton.jit
def read_words(at):
    """Four 32-bit words at byte addresses that are multiples of 16."""
    if NATIVE:
        words = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )
    else:
        p = typed(at, tl.int32)
        words = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    return words


@triton.jit
def write_byte(at, y):
    """The low byte of int32 numbers to pointers."""
    if NATIVE:
        tl.inline_asm_elementwise(
            "{ .reg .b16 t; cvt.u16.u32 t, $2; st.global.b8 [$1], t; mov.b32 $0, 0; }", "=r,l,r",
            [at.to(tl.int64), y], dtype=tl.int32, is_pure=False, pack=1,
        )
    else:
        tl.store(at, y.to(tl.uint8))
