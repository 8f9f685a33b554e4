"""What a block costs: bytes by model shape and format, and the prefill FLOPs that a hit saves.

Formulas only, so that a simulation needs no torch. The layout they follow is that of `format/`:
data planes [H, S, D], fp16 scales (and zeros) per channel [H, D] or per token [H, S].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from kvlab import axes
from kvlab.budget import Equal, blocks_in
from kvlab.core import BadInput, CacheGeometry, LayerShape


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs to know of a model; `parameters` drive the dense part of FLOPs.

    shapes: of each layer, where they differ; the other numbers of layers are then those of the
    first.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: float
    shapes: tuple[LayerShape, ...] = ()

    @classmethod
    def of(cls, g: CacheGeometry, parameters: float) -> ModelShape:
        """The shape that a cache was made for."""
        first = g.shapes[0]
        return cls(
            g.layers, g.query_heads, first.kv_heads, first.k_width, parameters, g.shapes
        )

    def layer(self, number: int) -> LayerShape:
        """The shape of one layer."""
        same = LayerShape(self.kv_heads, self.head_dim, self.head_dim)
        return self.shapes[number] if self.shapes else same

    @property
    def by_shape(self) -> dict[LayerShape, int]:
        """How many layers have each shape."""
        return Counter(self.shapes) if self.shapes else {self.layer(0): self.layers}

    def prefill_flops(self, tokens: np.ndarray) -> np.ndarray:
        """FLOPs to prefill the first `tokens` tokens: 2 per parameter and token, and causal
        attention's 4 per token, visible token, layer, query head and head dimension."""
        tokens = np.asarray(tokens, dtype=float)
        flops = 2.0 * self.parameters * tokens
        for shape, layers in self.by_shape.items():
            pairs = 2 * seen_pairs(tokens, shape.window)
            each = float(layers * self.query_heads * (shape.k_width + shape.v_width))
            flops = flops + each * pairs
        return flops


SHAPES = {
    "llama-3.1-8b": ModelShape(32, 32, 8, 128, 8.03e9),
    "llama-3.1-70b": ModelShape(80, 64, 8, 128, 70.6e9),
    "qwen3-0.6b": ModelShape(28, 16, 8, 128, 0.6e9),
    "qwen3-8b": ModelShape(36, 32, 8, 128, 8.19e9),
}


def seen_pairs(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of a query and a token that it sees, of the first `tokens` tokens; see `first_seen`."""
    if window is None:
        return tokens * (tokens + 1) / 2
    size = float(abs(window))
    if window < 0:
        whole, rest = np.divmod(tokens, size)
        return whole * size * (size + 1) / 2 + rest * (rest + 1) / 2
    within = np.minimum(tokens, size)
    return within * (within + 1) / 2 + (tokens - within) * within


@dataclass(frozen=True)
class Codec:
    """Bits of one stored element: `bits` of data plus fp16 numbers shared along `axis`.

    axis "channel": one per (head, dimension), shared by the S tokens of a block; "token": one per
    (head, token), shared by the D dimensions; "auto": channel from 16 tokens a block on.
    group: not fp16 numbers for all of those, but two of 8 bits for each so many of them (0: all),
    an fp16 unit for the head's block, and per channel an fp16 mean; see `kvlab.format.Grouped`.
    centred: one number more where they are shared along channels.
    """

    bits: int
    numbers: int = 0
    axis: str = "token"
    group: int = 0
    centred: bool = False

    def bits_per_element(self, block_size: int, head_dim: int) -> float:
        channel = self.axis == "channel" or (self.axis == "auto" and block_size >= 16)
        if self.group:
            channel = channel and gcd(block_size, self.group) >= 8
            span = gcd(block_size if channel else head_dim, self.group)
            once = 1 / head_dim + (1.0 if channel else 0.0)
            return self.bits + 16.0 / span + 16.0 * once / block_size
        numbers = self.numbers + (self.centred and channel)
        return self.bits + 16.0 * numbers / (block_size if channel else head_dim)


def _codec(name: str, axis: str) -> Codec:
    """By the name that the table of axes has: dense ones (fp16) share nothing, 8 bits are symmetric
    (a scale), fewer bits asymmetric (a scale and a zero); a last g says that groups have them, a
    last c that keys have a middle too."""
    bits = int(name.lstrip("bfpint").rstrip("gc"))
    if name.endswith("g"):
        return Codec(bits, axis=axis, group=32)
    if name.startswith("int"):
        return Codec(bits, 1 if bits == 8 else 2, axis)
    return Codec(bits, int(bits == 8), axis if name == "fp8c" else "token", centred=name == "fp8c")


FORMATS = {
    name: (_codec(member.given["key"], "auto"), _codec(member.given["value"], "token"))
    for name, member in axes.TABLE["format"].members.items() if member.given
}


def bits_per_element(format: str, block_size: int = 64, head_dim: int = 128) -> float:
    """Mean stored bits of a key or value element, scales included."""
    key, value = (codec.bits_per_element(block_size, head_dim) for codec in codecs(format))
    return (key + value) / 2


def codecs(format: str) -> tuple[Codec, Codec]:
    """Those of keys and values. Raises `BadInput` for an unknown format."""
    if format not in FORMATS:
        raise BadInput("format", format, f"known: {', '.join(FORMATS)}")
    return FORMATS[format]


def token_bytes(format: str, shape: ModelShape, block_size: int = 64) -> float:
    """Bytes that one cached token takes in all layers."""
    return sum(n * layer_bytes(format, one, block_size) for one, n in shape.by_shape.items())


def layer_bytes(format: str, shape: LayerShape, block_size: int) -> float:
    """Bytes that one cached token takes in one layer."""
    key, value = codecs(format)
    bits = (shape.k_width * key.bits_per_element(block_size, shape.k_width)
            + shape.v_width * value.bits_per_element(block_size, shape.v_width))  # fmt: skip
    return shape.kv_heads * bits / 8


def group_blocks(
    budget_bytes: float, format: str, shape: ModelShape, block_size: int, budget: Equal,
    groups: Sequence[Sequence[int]],
) -> list[int]:
    """How many blocks of `block_size` tokens each layer group may hold of a divided budget.

    groups: numbers of the layers in each. Raises `BadInput` where one would get none.
    """
    each = [block_size * sum(layer_bytes(format, shape.layer(i), block_size) for i in layers)
            for layers in groups]  # fmt: skip
    return blocks_in(budget, int(budget_bytes), groups, each)


def blocks_for(budget_bytes: float, trace_block: int, per_token: float) -> int:
    """How many blocks of `trace_block` tokens a budget holds."""
    return int(budget_bytes // (trace_block * per_token))


def shape_by_name(name: str | dict | ModelShape) -> ModelShape:
    """A known shape, or one given by its five numbers."""
    if isinstance(name, ModelShape):
        return name
    if isinstance(name, dict):
        return ModelShape(**name)
    if name not in SHAPES:
        raise BadInput("shape", name, f"known: {', '.join(SHAPES)}; or give its five numbers")
    return SHAPES[name]
