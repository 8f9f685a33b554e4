"""Codes of small groups in the decode kernel: made fp16 numbers in registers, in the block's unit.

A digit of the query or of a probability would have to be scaled for every group; here a stored
element takes about one and a half instructions instead, however many query heads there are. fp16
holds a code times its scale (both e4m3 numbers of few digits) to half of 2^-11.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import NATIVE, lane, load_bytes, typed, whole_codes
from kvlab.kernel.decode_place_triton import head_address


@triton.constexpr_function
def magic(bits):
    """A code in the top bits of a half's low byte, below this number's high byte: code + this."""
    return 2 ** (10 - (8 - bits))


@triton.constexpr_function
def halves_asm(bits, part):
    """Part `part` of four packed bytes -> four halves code * scale + zero, two to a register."""
    up = 8 - (2 if bits == 3 else bits) * (part + 1)
    high = {4: 0x54545454, 3: 0x50505050, 2: 0x4C4C4C4C}[bits]
    if bits == 3:  # two bits to 5 and 6, the third, which lies at 2 part, to 7
        move = f"shl.b32 t, $2, {up - 1};" if up else "shr.b32 t, $2, 1;"
        code = f"""{move} shl.b32 u, $3, {7 - 2 * part};
        lop3.b32 t, t, u, 0x60606060, 0xe4; and.b32 t, t, 0xe0e0e0e0;"""
        s, z = ("$4", "$5"), ("$6", "$7")
    else:
        mask = {4: 0xF0F0F0F0, 2: 0xC0C0C0C0}[bits]
        code = f"shl.b32 t, $2, {up}; and.b32 t, t, {mask};"
        s, z = ("$3", "$4"), ("$5", "$6")
    return f"""{{ .reg .b32 t, u, a, b; {code}
    prmt.b32 a, t, {high}, 0x5140; prmt.b32 b, t, {high}, 0x7362;
    fma.rn.f16x2 $0, a, {s[0]}, {z[0]}; fma.rn.f16x2 $1, b, {s[1]}, {z[1]}; }}"""


@triton.jit
def halves(x, y, s, z, PART: tl.constexpr, BITS: tl.constexpr):
    """Part PART of packed bytes `x` (3 bits: and `third_bits` `y`) -> fp16 code * s + zero, where
    `z` is the zero less `magic` scales."""
    s, z = tl.broadcast_to(s, x.shape), tl.broadcast_to(z, x.shape)
    if NATIVE:
        if BITS == 3:
            out = tl.inline_asm_elementwise(
                halves_asm(BITS, PART), "=r,=r,r,r,r,r,r,r", [x, y, s, z], dtype=tl.float16,
                is_pure=True, pack=4,
            )
        else:
            out = tl.inline_asm_elementwise(
                halves_asm(BITS, PART), "=r,=r,r,r,r,r,r", [x, s, z], dtype=tl.float16,
                is_pure=True, pack=4,
            )
    else:
        if BITS == 3:
            code = ((x >> (2 * PART)) & 3) | (((y >> (2 * PART)) & 1) << 2)
        else:
            code = (x >> (BITS * PART)) & (2**BITS - 1)
        code = code.to(tl.float32) + magic(BITS)
        out = (code * s.to(tl.float32) + z.to(tl.float32)).to(tl.float16)
    return out


@triton.jit
def group_offsets(t, part, TOKEN_DIM: tl.constexpr, F: tl.constexpr, C: tl.constexpr):
    """Where the scales of part `part` and tokens `t` lie in a head's plane, and the places of them
    that exist: along what differs within the part, or [TILE, W] (TOKEN_DIM 1: [W, TILE])."""
    W: tl.constexpr = F.D // C.parts
    w = part * W + tl.arange(0, W)
    if C.channel and F.tile <= C.group:
        off = tl.min(t, 0) // C.group * F.D + w
        off, known = lane(off, 1 - TOKEN_DIM), lane(w < F.D, 1 - TOKEN_DIM)
    elif C.channel:
        off = lane(t // C.group, TOKEN_DIM) * F.D + lane(w, 1 - TOKEN_DIM)
        known = lane(t < F.S, TOKEN_DIM) & lane(w < F.D, 1 - TOKEN_DIM)
    elif C.group >= W:
        off, known = lane(part * W // C.group * F.S + t, TOKEN_DIM), lane(t < F.S, TOKEN_DIM)
    else:
        off = lane(w // C.group, 1 - TOKEN_DIM) * F.S + lane(t, TOKEN_DIM)
        known = lane(t < F.S, TOKEN_DIM) & lane(w < F.D, 1 - TOKEN_DIM)
    return off, known


@triton.jit
def group_scales(
    block, h, off, zero_off, unit_off, mean_off, i, TOKEN_DIM: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr,
):
    """Of tile `i`, whose `block` is a slab's address and a slot in it: scales of each part, ready
    to be broadcast, then the block's unit; zeros less `magic` scales, then channel means, each per
    part."""
    PARTS: tl.constexpr = C.parts
    W: tl.constexpr = F.D // C.parts
    slab, slot = block
    at = head_address(slab, slot, off, h, F.H, C.scale)
    zero_at = head_address(slab, slot, zero_off, h, F.H, C.scale)
    t = i % F.per_block * F.tile + tl.arange(0, F.tile)
    scales, zeros = (), ()
    for part in tl.static_range(PARTS):
        place, known = group_offsets(t, part, TOKEN_DIM, F, C)
        s = tl.load(typed(at, tl.float8e4nv) + place, mask=known, other=0.0).to(tl.float16)
        z = tl.load(typed(zero_at, tl.float8e4nv) + place, mask=known, other=0.0).to(tl.float16)
        scales, zeros = scales + (s,), zeros + (z - s * magic(C.bits),)
    at = typed(head_address(slab, slot, unit_off, h, F.H, 2), tl.float16)
    scales = scales + (tl.load(at).to(tl.float32),)
    if C.centred:
        at = typed(head_address(slab, slot, mean_off, h, F.H, 2 * F.D), tl.float16)
        w = tl.arange(0, W)
        for part in tl.static_range(PARTS):
            mean = tl.load(at + part * W + w)
            zeros = zeros + (mean,)
    return scales, zeros


@triton.jit
def load_packed(
    addr, high, t, mask, F: tl.constexpr, TOKEN_DIM: tl.constexpr, C: tl.constexpr
):
    """`load_bytes` of all bytes of a token."""
    W: tl.constexpr = F.D * (2 if C.bits == 3 else C.bits) // 8
    return load_bytes(addr, high, t, tl.arange(0, W), mask, F, TOKEN_DIM, C)


@triton.jit
def group_operands(
    addr, high, t, mask, scales, zeros, TOKEN_DIM: tl.constexpr, F: tl.constexpr, C: tl.constexpr
):
    """The tile as left sides of products, fp16 in the block's unit, one per part."""
    PARTS: tl.constexpr = C.parts
    W: tl.constexpr = F.D // C.parts
    PER: tl.constexpr = 4 if C.bits < 4 else 2
    RUNS: tl.constexpr = max(1, PARTS // PER)  # parts that lie side by side in a row of bytes
    if C.wide:
        x, y = load_packed(addr, high, t, mask, F, TOKEN_DIM, C)
        LAST: tl.constexpr = PER - 1
        SHIFT: tl.constexpr = 8 - (2 if C.bits == 3 else C.bits)
        code = whole_codes(x, y, TOKEN_DIM, C)
        parts = (halves(code << SHIFT, (code >> 2) << 6, scales[0], zeros[0], LAST, C.bits),)
    else:
        runs, parts = (), ()
        for i in tl.static_range(RUNS):
            w = i * W + tl.arange(0, W)
            runs = runs + (load_bytes(addr, high, t, w, mask, F, TOKEN_DIM, C),)
        for i in tl.static_range(PARTS):
            x, y = runs[i % RUNS]
            parts = parts + (halves(x, y, scales[i], zeros[i], i // RUNS, C.bits),)
    return parts


@triton.jit
def group_unit(q, unit, scales, zeros, scale, C: tl.constexpr):
    """What turns products of a block's keys with the query's digits into logits, [GP, ND]: in
    column 0 their factor, in column 1 what the channels' means add. unit: the digits' own."""
    PARTS: tl.constexpr = C.parts
    j = tl.arange(0, q[0].shape[1])[None, :]
    lift = unit * 0.0
    if C.centred:
        total = 0.0
        for i in tl.static_range(PARTS):
            total += q[i] * zeros[PARTS + i].to(tl.float32)[None, None, :]
        lift = tl.sum(total, 2) * scale
    return tl.where(j == 0, unit * scales[PARTS], lift)


@triton.jit
def add_means(parts, zeros, total, C: tl.constexpr):
    """A tile's products [W, GP] per part and the channels' means times `total` [GP]."""
    PARTS: tl.constexpr = C.parts
    y = ()
    for i in tl.static_range(PARTS):
        y = y + (parts[i] + zeros[PARTS + i].to(tl.float32)[:, None] * total[None, :],)
    return y
