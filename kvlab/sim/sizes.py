"""What a block costs: bytes by model shape and format, and the prefill FLOPs that a hit saves.

Formulas only, so that a simulation needs no torch. The layout they follow is that of `format/`:
data planes [H, S, D], fp16 scales (and zeros) per channel [H, D] or per token [H, S].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvlab import axes
from kvlab.core import BadInput


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs to know of a model; `parameters` drive the dense part of FLOPs."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: float

    def prefill_flops(self, tokens: np.ndarray) -> np.ndarray:
        """FLOPs to prefill the first `tokens` tokens: 2 per parameter and token, and causal
        attention's 4 per token, visible token, layer, query head and head dimension."""
        tokens = np.asarray(tokens, dtype=float)
        attention = 2.0 * self.layers * self.query_heads * self.head_dim
        return 2.0 * self.parameters * tokens + attention * tokens * (tokens + 1)


SHAPES = {
    "llama-3.1-8b": ModelShape(32, 32, 8, 128, 8.03e9),
    "llama-3.1-70b": ModelShape(80, 64, 8, 128, 70.6e9),
    "qwen3-0.6b": ModelShape(28, 16, 8, 128, 0.6e9),
    "qwen3-8b": ModelShape(36, 32, 8, 128, 8.19e9),
}


@dataclass(frozen=True)
class Codec:
    """Bits of one stored element: `bits` of data plus fp16 numbers shared along `axis`.

    axis "channel": one per (head, dimension), shared by the S tokens of a block; "token": one per
    (head, token), shared by the D dimensions; "auto": channel from 16 tokens a block on.
    """

    bits: int
    numbers: int = 0
    axis: str = "token"

    def bits_per_element(self, block_size: int, head_dim: int) -> float:
        channel = self.axis == "channel" or (self.axis == "auto" and block_size >= 16)
        return self.bits + 16.0 * self.numbers / (block_size if channel else head_dim)


def _codec(name: str, axis: str) -> Codec:
    """By the name that the table of axes has: dense ones (fp16) share nothing, 8 bits are symmetric
    (a scale), fewer bits asymmetric (a scale and a zero)."""
    bits = int(name.lstrip("bfpint"))
    if name.startswith("int"):
        return Codec(bits, 1 if bits == 8 else 2, axis)
    return Codec(bits, int(bits == 8))


FORMATS = {
    name: (_codec(member.given["key"], "auto"), _codec(member.given["value"], "token"))
    for name, member in axes.TABLE["format"].members.items()
}


def bits_per_element(format: str, block_size: int = 64, head_dim: int = 128) -> float:
    """Mean stored bits of a key or value element, scales included."""
    if format not in FORMATS:
        raise BadInput("format", format, f"known: {', '.join(FORMATS)}")
    key, value = (codec.bits_per_element(block_size, head_dim) for codec in FORMATS[format])
    return (key + value) / 2


def token_bytes(format: str, shape: ModelShape, block_size: int = 64) -> float:
    """Bytes that one cached token takes in all layers."""
    elements = 2 * shape.layers * shape.kv_heads * shape.head_dim
    return elements * bits_per_element(format, block_size, shape.head_dim) / 8


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
