"""Channels turned before they are quantized: a codec around another one."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.format.base import Codec, Plane
from kvlab.kernel.quantize_ref import rotate


class Rotated(Codec):
    """A head's channels, multiplied with a Hadamard matrix before `codec` stores them.

    Each stored number is then a sum over all channels: no channel sticks out, and what is left is
    near a normal distribution, which few steps fit best (QuaRot, https://arxiv.org/abs/2404.00456).
    For values: attention's output is turned back once for each token, whatever the number of tokens
    read. Differs from QuaRot: nothing is folded into the weights, so any model will do.

    Reading turns back in fp32, and rounds to the compute dtype. Sealed again, a block has its codes
    again but where that rounding moves a scale by a step of fp16.

    codec: of the turned channels; the head width has to be a power of two.
    """

    rotated = True

    def __init__(self, codec: Codec):
        if codec.rotated:
            raise BadInput("format.codec", codec, "is rotated itself, and two turns are none")
        self.codec, self.bits = codec, codec.bits

    @property
    def has_kernel(self) -> bool:
        return self.codec.has_kernel

    @property
    def scaled(self) -> bool:
        return self.codec.scaled

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        if dim & (dim - 1):
            raise BadInput("format", repr(self), f"turns heads whose width is a power of two, and "
                           f"this model's is {dim}; take a format without rotation")
        return self.codec.planes(slots, heads, dim)

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        return self.codec.quantize(rotate(x.float()))

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return rotate(self.codec.dequantize(planes, torch.float32)).to(dtype)

    def __repr__(self) -> str:
        return f"rotated {self.codec!r}"
