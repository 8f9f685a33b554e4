"""How one sealed block is stored. Formats are stateless and own no memory."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab import kinds
from kvlab.core import BadInput, CacheGeometry, LayerShape


class Plane(NamedTuple):
    """One stored array of a block: `shape` per block, after the [L, N] of the pool."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Codec:
    """How one tensor of a block, its keys or its values, is stored.

    bits: payload bits of one element, without scales. has_kernel: whether the Triton kernels read
    and write its planes; torch does it elsewhere. scaled: whether an element's rounding depends
    on others. rotated: whether channels are turned before they are stored, see `Rotated`. even:
    whether codes are evenly spaced, so that one large element takes them from all of its scale.
    """

    bits: int
    has_kernel = False
    scaled = True
    rotated = False
    even = False

    def axis_of(self, slots: int) -> str:
        """What one scale covers in a block of `slots` tokens: `channel`, `token`, or "" (none)."""
        return ""

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        """Stored arrays of a block of `slots` tokens; `BadInput` for a `dim` it cannot pack."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        """`x` [N, S, H, D] -> the declared planes, each [N, *shape]."""
        raise NotImplementedError

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Planes [N, *shape] -> [N, S, H, D] in `dtype`."""
        raise NotImplementedError


@kinds.members("format")
class KVFormat:
    """A key codec and a value codec; every storage format is such a pair.

    Keys and values want different treatment: keys have outlier channels and enter the softmax,
    values do not (KIVI, https://arxiv.org/abs/2402.02750).

    sinks: of each sequence so many first tokens, at most a block, stay as they were computed and
        set no scales; `pool.Apart` keeps them. None of a format without scales.
    residual: a block is read as it was computed until so many newer tokens are there, whole blocks
        of them (KIVI's residual length); `cache/recent.py` keeps it. 0, the null member, reads a
        block as stored as soon as it is full.
    """

    def __init__(
        self, key: Codec, value: Codec, name: str = "", sinks: int = 0, residual: int = 0
    ):
        self.key, self.value = key, value
        self.name = name or f"k:{key!r} v:{value!r}"
        self.sinks, self.residual = sinks, residual
        if sinks < 0:
            raise BadInput("format.sinks", sinks, "must be 0 or more tokens")
        if sinks and not (key.scaled or value.scaled):
            raise BadInput("format.sinks", sinks, f"keeps first tokens from setting scales, and "
                           f"{self.name} has none; format.sinks=0")
        if residual < 0:
            raise BadInput("format.residual", residual, "must be 0 or more tokens")
        if residual and not (key.scaled or value.scaled):
            raise BadInput("format.residual", residual, f"keeps newest tokens from being rounded, "
                           f"and {self.name} stores them without scales as they are; "
                           "format.residual=0")

    def planes(self, g: CacheGeometry) -> dict[str, Plane]:
        """Plane name -> shape after [L, N] and dtype; scales included. Layers have one shape."""
        return self.planes_of(g.shape, g.block_size)

    def planes_of(self, shape: LayerShape, slots: int) -> dict[str, Plane]:
        """The same for a block of `slots` tokens in a layer of this shape."""
        sides = (("k_", self.key, shape.k_width), ("v_", self.value, shape.v_width))
        return {
            prefix + name: plane
            for prefix, codec, width in sides
            for name, plane in codec.planes(slots, shape.kv_heads, width).items()
        }

    def quantize(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """`k`, `v` [N, S, H, D] -> the declared planes."""
        keys = {"k_" + n: t for n, t in self.key.quantize(k).items()}
        return keys | {"v_" + n: t for n, t in self.value.quantize(v).items()}

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Planes -> `k`, `v` [N, S, H, D] in `dtype`."""
        side = {p: {n[2:]: t for n, t in planes.items() if n[:2] == p} for p in ("k_", "v_")}
        return self.key.dequantize(side["k_"], dtype), self.value.dequantize(side["v_"], dtype)

    def each(self, layers: int) -> list[KVFormat]:
        """The format of each layer of a model. Raises `BadInput` where there is none for one."""
        return [self] * layers

    def groups(self, g: CacheGeometry) -> list[tuple[int, ...]]:
        """Numbers of the layers of each shape and format, in the order in which these come."""
        names = (format.identity for format in self.each(g.layers))
        found: dict[tuple, list[int]] = {}
        for layer, key in enumerate(zip(g.shapes, names)):
            found.setdefault(key, []).append(layer)
        return [tuple(layers) for layers in found.values()]

    def block_bytes(self, g: CacheGeometry) -> int:
        """Bytes of one sealed block in all layers."""
        alike = Counter(zip(self.each(g.layers), g.shapes))
        return sum(count * p.nbytes for (format, shape), count in alike.items()
                   for p in format.planes_of(shape, g.block_size).values())  # fmt: skip

    def token_bits(self, g: CacheGeometry) -> int:
        """Payload bits of one token in all layers, without scales: what a name promises."""
        return sum(s.kv_heads * (s.k_width * f.key.bits + s.v_width * f.value.bits)
                   for f, s in zip(self.each(g.layers), g.shapes))  # fmt: skip

    def bits_per_element(self, g: CacheGeometry) -> float:
        """Stored bits for one key or value element, scales and zeros included."""
        return 8 * self.block_bytes(g) / g.elements_per_block

    @property
    def payload_bits(self) -> float:
        """Bits of one element on average, without scales and zeros: what a name promises."""
        return (self.key.bits + self.value.bits) / 2

    def check_blocks(self, slots: int) -> None:
        """Raises `BadInput` where blocks of `slots` tokens cannot keep what stays as computed."""
        if self.sinks > slots:
            raise BadInput("format.sinks", self.sinks, "first tokens must lie within a block, and "
                           f"cache.block_size={slots}; take larger blocks or format.sinks=0")
        if self.residual % slots:
            raise BadInput("format.residual", self.residual, "newest tokens stay in whole blocks, "
                           f"and cache.block_size={slots}; take a multiple of it, or 0")

    def caution(self, slots: int) -> str:
        """What is known to go wrong in blocks of `slots` tokens, "" where nothing is."""
        if not (self.key.even and self.key.axis_of(slots) == "token"):
            return ""
        cause = f"in blocks of {slots} tokens " if self.key.axis == "auto" else ""
        cure = "cache.block_size of 32 or more" if cause else "format.key.axis=channel"
        return (f"{self.name} scales keys by token {cause}, and outlier channels, as Qwen's keys "
                f"have, then take the codes of all others: {cure}".replace(" ,", ","))

    @property
    def identity(self) -> str:
        """What a hash chain or a stored prefix must agree on."""
        return self.stored + f" residual:{self.residual}" * bool(self.residual)

    @property
    def stored(self) -> str:
        """What a kernel that reads or writes sealed blocks depends on."""
        return f"k:{self.key!r} v:{self.value!r}" + f" sinks:{self.sinks}" * bool(self.sinks)

    def __repr__(self) -> str:
        return f"KVFormat({self.name})"


def heads_first(x: Tensor) -> Tensor:
    """[N, S, H, D] -> contiguous fp32 [N, H, S, D], the order in which blocks are stored."""
    return x.transpose(1, 2).float().contiguous()


def check_axis(axis: str) -> str:
    if axis not in ("channel", "token", "auto"):
        raise BadInput("format.axis", axis, "must be channel, token or auto")
    return axis


def resolve_axis(axis: str, slots: int) -> str:
    """`auto` means per channel where a block has enough tokens to share a scale, else per token."""
    return ("channel" if slots >= 16 else "token") if axis == "auto" else axis
