"""Where a tile's tokens, blocks and scales are: the addresses and orders of the decode kernel.

F is a `sides.Frame`, C a `sides.Side`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernel.codes_triton import DENSE, typed


@triton.jit
def head_address(slab, slot, off, h, H: tl.constexpr, HEAD: tl.constexpr):
    """Byte address of head `h` in a plane with HEAD bytes per head and block."""
    return slab + slot * (HEAD * H) + (off + h * HEAD)


@triton.jit
def token_order(r, SHUFFLE: tl.constexpr, F: tl.constexpr):
    """Token of row `r` of the score tile.

    In the matrix unit's result a thread holds rows r, r+8, r+64, ...; packing the bytes of
    neighbouring tokens into one word wants those rows to be neighbours. Loading keys in this order
    and calling `in_order` on the probabilities makes them so, at no cost.
    """
    if SHUFFLE:
        REPS: tl.constexpr = F.tile // (16 * F.warps)
        warp, rep = r // 16 % F.warps, r // (16 * F.warps)
        r = ((warp * 8 + r % 8) * REPS + rep) * 2 + r // 8 % 2
    return r


@triton.jit
def in_order(x, SHUFFLE: tl.constexpr, F: tl.constexpr):
    """[TILE, N] in `token_order` -> in the order of the tokens, laid out by rows of tokens."""
    if SHUFFLE:
        REPS: tl.constexpr = F.tile // (16 * F.warps)
        y = tl.reshape(x, [REPS, F.warps, 2, 8, x.shape[1]])
        y = tl.reshape(tl.permute(y, [4, 1, 3, 0, 2]), [x.shape[1], x.shape[0]])
        x = tl.trans(y)
    return x


@triton.jit
def place(i, order, blocks, F: tl.constexpr):
    """Block index of tile `i` (one, or one per token), slots of its tokens, which tokens exist."""
    if F.multi:
        token = i * F.tile + order
        index, t = token // F.S, token % F.S
        seen = index < blocks
    else:
        index, t = i // F.per_block, (i % F.per_block) * F.tile + order
        seen = t < F.S
    return tl.minimum(index, tl.maximum(blocks - 1, 0)), t, seen


@triton.jit
def load_scales(at, zero_at, offsets, mask, C: tl.constexpr):
    """fp16 scales and what a code of 0 stands for, as fp32."""
    scale = tl.load(typed(at, tl.float16) + offsets, mask=mask, other=1.0).to(tl.float32)
    zero = scale * C.bias
    if C.zero:
        stored = tl.load(typed(zero_at, tl.float16) + offsets, mask=mask, other=0.0)
        zero += stored.to(tl.float32)
    return scale, zero


@triton.jit
def stack(a, b):
    """[M], [M] -> [2 M]."""
    return tl.reshape(tl.permute(tl.join(a, b), [1, 0]), [2 * a.shape[0]])


@triton.jit
def load_run(at, zero_at, first, known, N: tl.constexpr, SHUFFLE: tl.constexpr,
             F: tl.constexpr, C: tl.constexpr):
    """Scales and zeros `first` .. first + N, in `token_order` if asked; those below `known`.

    In two halves where there is one element per thread: a load of fewer elements than threads may
    be made in the layout of its use, a larger one passes through shared memory, at two barriers.
    """
    M: tl.constexpr = N // 2 if 32 * F.warps <= N else N
    r = tl.arange(0, M)
    t = first + token_order(r, SHUFFLE, F)
    s, z = load_scales(at, zero_at, t, t < known, C)
    if N > M:
        t = first + token_order(M + r, SHUFFLE, F)
        s1, z1 = load_scales(at, zero_at, t, t < known, C)
        s, z = stack(s, s1), stack(z, z1)
    return s, z


@triton.jit
def side_scales(
    slab, slot, h, off, zero_off, i, blocks, live, SHUFFLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr,
):
    """Scales and zeros of tile `i`, two tuples: per token one [TILE], per channel a [W] per part.

    live: 1, or 0 where nothing may be read.
    """
    PARTS: tl.constexpr = C.parts
    at = head_address(slab, slot, off, h, F.H, C.scale)
    zero_at = head_address(slab, slot, zero_off, h, F.H, C.scale)
    W: tl.constexpr = F.D // C.parts
    if C.kind == DENSE:
        scales, zeros = (tl.full([], 1.0, tl.float32),), (tl.full([], 0.0, tl.float32),)
    elif C.channel:
        scales, zeros = (), ()
        for part in tl.static_range(PARTS):
            s, z = load_run(at, zero_at, part * W, F.D * live, W, False, F, C)
            scales, zeros = scales + (s,), zeros + (z,)
    elif F.multi:
        _, t, seen = place(i, tl.arange(0, F.tile), blocks, F)
        s, z = load_scales(at, zero_at, t, seen, C)
        scales, zeros = (s,), (z,)
    else:
        first = i % F.per_block * F.tile
        s, z = load_run(at, zero_at, first, F.S * live, F.tile, SHUFFLE, F, C)
        scales, zeros = (s,), (z,)
    return scales, zeros
