"""What a kernel must know at compile time about the two sides of a format, keys and values."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton.language as tl

from kvlab.core import BadInput
from kvlab.format import Codec, Dense, Fp8, Int, KVFormat
from kvlab.format.base import resolve_axis

TYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv, torch.uint8: tl.uint8,
}
PLANES = ("data", "high", "scale", "zero")


class Side(NamedTuple):
    """One side of a format as stored; `head_bytes`: bytes of a head in data, high and scale."""

    kind: int  # 0 dense, 1 FP8, 2 integers, as in codes_triton
    bits: int
    dtype: torch.dtype
    slots_last: bool
    channel: bool
    symmetric: bool
    head_bytes: tuple[int, int, int]
    offsets: tuple[int, int, int, int]  # of data, high, scale and zero in the slab, this layer
    run: int  # elements that lie together and 16-byte aligned along the data's unit stride

    @property
    def bias(self) -> float:
        """What to add to a scaled code; the decode kernel takes bytes as code - 128."""
        return (-(2.0 ** (self.bits - 1)) if self.symmetric else 0.0) if self.bits else 0.0


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def side(codec: Codec, prefix: str, planes: dict, slots: int) -> Side:
    """`planes`: name -> PlaneView of one layer. Raises `BadInput` for a codec it does not know."""
    if not isinstance(codec, (Dense, Fp8, Int)):
        raise BadInput("format", codec, "has no kernel; known codecs are Dense, Fp8 and Int")
    mine = {n: planes[prefix + n] for n in PLANES if prefix + n in planes}
    heads, bits = mine["data"].shape[0], getattr(codec, "bits", 0)
    return Side(
        kind=0 if isinstance(codec, Dense) else 2 if bits else 1, bits=bits,
        dtype=mine["data"].dtype, slots_last=getattr(codec, "slots_last", False),
        channel=not isinstance(codec, Dense) and resolve_axis(codec.axis, slots) == "channel",
        symmetric=bool(bits) and codec.symmetric,
        head_bytes=tuple(
            mine[n].block_stride_bytes // heads if n in mine else 0 for n in PLANES[:3]
        ),
        offsets=tuple(mine[n].offset_bytes if n in mine else 0 for n in PLANES),
        run=gcd(mine["data"].shape[2], 16 // mine["data"].dtype.itemsize),
    )


def sides(format: KVFormat, planes: dict, slots: int) -> tuple[Side, Side]:
    """Keys and values of a format, from the planes of one layer."""
    return side(format.key, "k_", planes, slots), side(format.value, "v_", planes, slots)
