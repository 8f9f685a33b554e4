"""The codec with a scale for every small group of elements."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.format.base import Plane, check_axis, heads_first
from kvlab.format.codecs import Packed
from kvlab.kernel import grouped_ref as ref

LEAST = 8  # elements of a group: of fewer, the scales would weigh as much as the codes


class Grouped(Packed):
    """Packed integers with one scale and zero for each `group` of elements: keys along the tokens
    of a channel, values along the channels of a token (KIVI, https://arxiv.org/abs/2402.02750).

    Differs from KIVI: scales and zeros take 8 bits each, in units of one power of two for a head's
    block (as double quantization does, https://arxiv.org/abs/2305.14314); codes are made with the
    stored ones.

    bits: 4, 3 or 2, packed as `Int` does.
    axis: `channel` (groups of tokens), `token` (groups of channels) or `auto`: channel from 16
        tokens a block on.
    group: elements of a group, a power of two from 8 on. Where it does not divide the block's
        tokens or the head's channels, the largest power of two that does is taken, 8 at least.
    scales: `fp8` (e4m3 under an fp16 unit) or `fp16`.
    centred: where scales belong to channels, each channel's mean over the block is kept apart, in
        fp16.
    search: a group's range is clipped where that lessens its squared error.
    slots_last: as of `Int`.
    """

    def __init__(
        self, bits: int, axis: str = "auto", group: int = 32, scales: str = "fp8",
        centred: bool = False, search: bool = False, slots_last: bool = False,
    ):
        if bits not in (4, 3, 2):
            raise BadInput("format.bits", bits, "must be 4, 3 or 2 where groups have scales")
        self.bits, self.axis, self.slots_last = bits, check_axis(axis), slots_last
        if group < LEAST or group & (group - 1):
            raise BadInput("format.group", group, f"must be a power of two, {LEAST} at least")
        if scales not in ("fp8", "fp16"):
            raise BadInput("format.scales", scales, "must be fp8 or fp16")
        if centred and axis == "token":
            raise BadInput("format.centred", True, "takes a channel's mean, and axis=token has no "
                           "scale of a channel's own; take axis=auto or centred=false")
        self.group, self.scales, self.centred, self.search = group, scales, centred, search

    @property
    def has_kernel(self) -> bool:
        """With scales of 16 bits a number may lie beyond the fp16 that the kernels compute in."""
        return self.scales == "fp8"

    def axis_of(self, slots: int) -> str:
        if self.axis != "auto":
            return self.axis
        return "channel" if slots >= 16 and gcd(slots, self.group) >= LEAST else "token"

    def has_mean(self, slots: int) -> bool:
        """Whether a block of `slots` tokens keeps its channels' means apart."""
        return self.centred and self.axis_of(slots) == "channel"

    def span(self, slots: int, dim: int) -> int:
        """Elements of a group in a block of `slots` tokens and heads of `dim` channels. Raises
        `BadInput` where no power of two from 8 on divides them."""
        channel = self.axis_of(slots) == "channel"
        found = gcd(slots if channel else dim, self.group)
        if found < LEAST and channel:
            raise BadInput("cache.block_size", slots, "must be a multiple of 8, better of "
                           f"{self.group}, where groups of a channel's tokens have scales")
        if found < LEAST:
            raise BadInput("format", f"int{self.bits}/group{self.group}", f"finds no groups of 8 "
                           f"or more in head_dim {dim}; take int4, fp8 or bf16 for this model")
        return found

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        held = self.code_planes(slots, heads, dim)
        span, channel = self.span(slots, dim), self.axis_of(slots) == "channel"
        shape = (heads, slots // span, dim) if channel else (heads, dim // span, slots)
        scale = Plane(shape, torch.float8_e4m3fn if self.scales == "fp8" else torch.float16)
        held |= {"scale": scale, "zero": scale}
        if self.scales == "fp8":
            held["unit"] = Plane((heads,), torch.float16)
        if self.has_mean(slots):
            held["mean"] = Plane((heads, dim), torch.float16)
        return held

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        x, extra, unit = heads_first(x), {}, None
        if self.has_mean(x.shape[-2]):
            extra["mean"] = ref.centre_of(x)
            x = x - extra["mean"].float().unsqueeze(-2)
        if self.scales == "fp8":
            extra["unit"] = ref.unit_of(x)
            unit = extra["unit"].float()[..., None, None]
        codes, scale, zero = ref.quantize_groups(self._cut(x), self.bits, unit, self.search)
        codes = self._joined(codes, x.shape[-2])
        return self.pack(codes) | {"scale": scale, "zero": zero} | extra

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = self.unpack(planes)
        scale, zero = (planes[name].float() for name in ("scale", "zero"))
        if self.scales == "fp8":
            unit = planes["unit"].float()[..., None, None]
            scale, zero = scale * unit, zero * unit
        x = self._cut(codes.float()) * scale.unsqueeze(-1) + zero.unsqueeze(-1)
        x = self._joined(x, codes.shape[-2])
        if "mean" in planes:
            x = x + planes["mean"].float().unsqueeze(-2)
        return x.to(dtype).transpose(1, 2)

    def _cut(self, x: Tensor) -> Tensor:
        """[N, H, S, D] -> groups last, in the order of the scales: [N, H, S/g, D, g] by channel,
        [N, H, D/g, S, g] by token."""
        slots, span = x.shape[-2], self.span(*x.shape[-2:])
        if self.axis_of(slots) == "channel":
            return x.unflatten(-2, (slots // span, span)).transpose(-1, -2)
        return x.unflatten(-1, (x.shape[-1] // span, span)).transpose(-3, -2)

    def _joined(self, x: Tensor, slots: int) -> Tensor:
        """The inverse of `_cut`, contiguous."""
        if self.axis_of(slots) == "channel":
            return x.transpose(-1, -2).flatten(-3, -2).contiguous()
        return x.transpose(-3, -2).flatten(-2).contiguous()

    def __repr__(self) -> str:
        told = [f"int{self.bits}/{self.axis}/group{self.group}/{self.scales}"]
        told += [name for name in ("centred", "search") if getattr(self, name)]
        return "/".join(told) + ("/slots" if self.slots_last else "")
