"""What the kernels know at compile time: the two sides of a format, and the frame they work in."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton.language as tl

from kvlab.core import BadInput
from kvlab.format import Codec, Dense, Fp8, Grouped, Int, KVFormat, Packed, Rotated
from kvlab.kernel.grouped_ref import reach

TYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv, torch.uint8: tl.uint8,
}
PLANES = ("data", "high", "scale", "zero", "unit", "mean")


class Side(NamedTuple):
    """Keys or values as stored, and how the decode kernel multiplies them."""

    kind: int  # 0 dense, 1 FP8, 2 integers, 3 integers in groups, as in codes_triton
    bits: int
    dtype: tl.dtype  # of the data plane
    multiply: tl.dtype  # operands of the matrix unit; FP8 goes through fp16, which loses nothing
    parts: int  # a byte holds this many dims, D / parts apart, multiplied one after another
    wide: bool  # no parts: a small head's codes are unpacked side by side first
    slots_last: bool
    run: int  # elements that lie together and 16-byte aligned along the data's unit stride
    channel: bool
    symmetric: bool
    zero: bool  # a stored zero point
    rotated: bool  # channels turned before they were stored
    group: int  # elements that share a scale, of kind 3
    centred: bool  # channels' means kept apart
    reach: float  # scales that a group's range holds at least
    search: bool  # sealing looks for the best clip
    bias: float  # a code of 0 as the decode kernel multiplies it, in scales
    data: int  # bytes of one head of one block in the data, high and scale planes
    high: int
    scale: int


class Frame(NamedTuple):
    """Sizes and choices of one decode kernel."""

    H: int  # key/value heads
    G: int  # query heads of each
    GP: int  # G rounded up to a power of two
    D: int
    S: int
    P: int  # blocks in a slab
    open_P: int
    warps: int
    tile: int  # tokens at a time
    per_block: int  # tiles of a block
    multi: bool  # a tile covers several blocks
    digits: int
    mass: bool
    per_head: bool  # each key/value head has a table of its own
    chained: bool  # kernels may be launched while the ones before them end
    fresh: bool  # this step's token comes beside the open block, all else was there long before
    tails: int  # programs that read an open block, each its share of slots
    open_dtype: tl.dtype
    fold: bool = False  # scales of small groups go to the query and the probabilities
    query_digits: int = 1  # fp16 numbers that a query is the sum of, with `fold`
    apart: int = 0  # first tokens that a row of the store of those kept apart has room for
    apart_P: int = 1
    least: int = 0  # tiles that a program of a long row takes, where there are many rows
    opened: int = 1  # open blocks that a row reads, one behind the other; it writes to the last


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def side(codec: Codec, prefix: str, planes: dict, slots: int, dim: int) -> Side:
    """`planes`: name -> PlaneView of one layer. Raises `BadInput` for a codec it does not know."""
    if isinstance(codec, Rotated):
        return side(codec.codec, prefix, planes, slots, dim)._replace(rotated=True)
    if not isinstance(codec, (Dense, Fp8, Int, Grouped)):
        raise BadInput("format", codec, "has no kernel; known codecs are Dense, Fp8, Int, Grouped")
    mine = {n: planes[prefix + n] for n in PLANES if prefix + n in planes}
    heads, data = mine["data"].shape[0], mine["data"]
    packed, grouped = isinstance(codec, Packed), isinstance(codec, Grouped)
    bits = codec.bits if packed else 0
    head = {n: p.block_stride_bytes // heads for n, p in mine.items()}
    symmetric, fp8 = isinstance(codec, Int) and codec.symmetric, isinstance(codec, Fp8)
    channel = not isinstance(codec, Dense) and codec.axis_of(slots) == "channel"
    parts = {4: 2, 3: 4, 2: 4}.get(bits, 1)
    if dim < (16 if grouped else 32) * parts:  # the least depth of a product of bytes is 32
        parts = 1
    wide = packed and bits != 8 and parts == 1
    group = codec.span(slots, dim) if grouped else 0
    if grouped and not channel and not wide:  # a part has one group's scales
        parts = max(parts, dim // max(group, 16))
    bias = (128 if bits == 8 else 0) - (2 ** (bits - 1) if symmetric else 0)
    return Side(
        kind=3 if grouped else 2 if bits else 1 if fp8 else 0, bits=bits, dtype=TYPES[data.dtype],
        multiply=tl.float16 if fp8 or grouped else TYPES[data.dtype], parts=parts, wide=wide,
        slots_last=getattr(codec, "slots_last", False),
        run=gcd(data.shape[2], 16 // data.dtype.itemsize), channel=channel,
        symmetric=symmetric, zero="zero" in mine and not grouped, rotated=False, group=group,
        centred="mean" in mine,
        reach=reach(bits) if grouped else 1.0, search=grouped and codec.search,
        bias=float(bias) if bits and not grouped else 0.0,
        data=head["data"], high=head.get("high", 0), scale=head.get("scale", 0),
    )


def sides(format: KVFormat, planes: dict, slots: int, dim: int) -> tuple[Side, Side]:
    """Keys and values of a format, from the planes of one layer."""
    return (
        side(format.key, "k_", planes, slots, dim), side(format.value, "v_", planes, slots, dim)
    )


def offsets(planes: dict) -> list[int]:
    """Bytes from a slab's start to this layer's key planes and value planes, 0 where none."""
    names = [prefix + n for prefix in ("k_", "v_") for n in PLANES]
    return [planes[n].offset_bytes if n in planes else 0 for n in names]
