"""The codecs: dense, FP8 and packed integers."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.format.base import Codec, Plane, check_axis, heads_first, resolve_axis
from kvlab.kernel import quantize_ref as ref

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def scale_plane(axis: str, slots: int, heads: int, dim: int) -> Plane:
    """One fp16 number per head and channel, or per head and token."""
    width = dim if resolve_axis(axis, slots) == "channel" else slots
    return Plane((heads, width), torch.float16)


def reduced_dim(axis: str, slots: int) -> int:
    """Which dim of [N, H, S, D] one scale spans."""
    return -2 if resolve_axis(axis, slots) == "channel" else -1


def laid(x: Tensor, slots_last: bool) -> Tensor:
    """[N, H, S, W] <-> [N, H, W, S] where a codec stores a channel's tokens side by side.

    A matrix unit reads 8-bit operands along the reduced dim only, and values are reduced over
    tokens: stored this way they go from memory to the unit with no shuffle.
    """
    return x.transpose(-1, -2).contiguous() if slots_last else x


def data_shape(slots: int, heads: int, width: int, slots_last: bool) -> tuple[int, int, int]:
    return (heads, width, slots) if slots_last else (heads, slots, width)


def spread(scale: Tensor, axis: str, slots: int) -> Tensor:
    """Stored scale [N, H, D or S] -> fp32, broadcast over [N, H, S, D]."""
    return scale.float().unsqueeze(reduced_dim(axis, slots))


class Dense(Codec):
    """No quantization: the tensor in `dtype` (float32, float16 or bfloat16)."""

    has_kernel = True
    scaled = False

    def __init__(self, dtype: str = "bfloat16"):
        if dtype not in DTYPES:
            raise BadInput("format.dtype", dtype, f"must be one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self.bits = 8 * self.dtype.itemsize

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        return {"data": Plane((heads, slots, dim), self.dtype)}

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        return {"data": x.transpose(1, 2).to(self.dtype).contiguous()}

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return planes["data"].transpose(1, 2).to(dtype)

    def __repr__(self) -> str:
        return f"dense/{str(self.dtype).removeprefix('torch.')}"


class Fp8(Codec):
    """FP8 e4m3 with an fp16 scale (https://arxiv.org/abs/2209.05433), chosen from the block's data.

    axis: what one scale covers: `token` (one token of one head), `channel` (one channel of one
        head within the block), or `auto`.
    centred: where scales belong to channels, what is stored is the distance to the middle of the
        channel (`middle_of`), which is kept beside it as the zero: e4m3 is finest there.
    slots_last: store [H, D, S] instead of [H, S, D]; what the decode kernel wants of values.
    """

    bits = 8
    has_kernel = True

    def __init__(self, axis: str = "token", slots_last: bool = False, centred: bool = False):
        self.axis, self.slots_last = check_axis(axis), slots_last
        self.centred = centred
        if centred and axis == "token":
            raise BadInput("format.centred", True, "takes the middle of a channel, and axis=token "
                           "has no scale of a channel's own; take axis=auto or centred=false")

    def has_zero(self, slots: int) -> bool:
        """Whether a block of `slots` tokens keeps its channels' middles."""
        return self.centred and self.axis_of(slots) == "channel"

    def axis_of(self, slots: int) -> str:
        """What one scale covers in a block of `slots` tokens: `channel` or `token`."""
        return resolve_axis(self.axis, slots)

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        shape = data_shape(slots, heads, dim, self.slots_last)
        data = Plane(shape, torch.float8_e4m3fn)
        scale = scale_plane(self.axis, slots, heads, dim)
        return {"data": data, "scale": scale} | ({"zero": scale} if self.has_zero(slots) else {})

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        x, extra = heads_first(x), {}
        if self.has_zero(x.shape[2]):
            extra["zero"] = ref.middle_of(x, -2)
            x = x - extra["zero"].float().unsqueeze(-2)
        data, scale = ref.quantize_fp8(x, reduced_dim(self.axis, x.shape[2]))
        return {"data": laid(data, self.slots_last), "scale": scale} | extra

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        data = laid(planes["data"], self.slots_last).float()
        x = data * spread(planes["scale"], self.axis, data.shape[2])
        if "zero" in planes:
            x = x + spread(planes["zero"], self.axis, data.shape[2])
        return x.to(dtype).transpose(1, 2)

    def __repr__(self) -> str:
        centred = "/centred" if self.centred else ""
        return f"fp8/{self.axis}{centred}" + ("/slots" if self.slots_last else "")


class Packed(Codec):
    """Unsigned codes of `bits` bits, really packed; 3 bits are a plane of two bits and a plane of
    one. slots_last: store [H, D*bits/8, S]; what the decode kernel wants of values.
    """

    slots_last = False
    even = True

    @property
    def bit_planes(self) -> dict[str, tuple[int, int]]:
        """Plane name -> (shift of its bits in the code, bits in the plane)."""
        return {"data": (0, 2), "high": (2, 1)} if self.bits == 3 else {"data": (0, self.bits)}

    def code_planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        """Planes of the codes alone; `BadInput` for a `dim` that cannot be packed."""
        per_byte = max(8 // bits for _, bits in self.bit_planes.values())
        if dim % per_byte:
            raise BadInput(
                "format", f"int{self.bits}",
                f"cannot pack head_dim {dim}: it must be a multiple of {per_byte}; "
                "take int8, fp8 or bf16 for this model",
            )
        return {
            name: Plane(data_shape(slots, heads, dim * bits // 8, self.slots_last), torch.uint8)
            for name, (_, bits) in self.bit_planes.items()
        }

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes [N, H, S, D] (uint8) -> their planes."""
        return {
            name: laid(ref.pack((codes >> shift) & (2**bits - 1), bits), self.slots_last)
            for name, (shift, bits) in self.bit_planes.items()
        }

    def unpack(self, planes: dict[str, Tensor]) -> Tensor:
        """Inverse of `pack`."""
        return sum(
            ref.unpack(laid(planes[name], self.slots_last), bits) << shift
            for name, (shift, bits) in self.bit_planes.items()
        )


class Int(Packed):
    """Packed integers: keys per channel within a block, values per token, as KIVI and KVQuant do.

    KIVI https://arxiv.org/abs/2402.02750, KVQuant https://arxiv.org/abs/2401.18079. Differs from
    KIVI: the group is the block, keys are quantized after RoPE, and the unquantized residual is the
    open tail (less than one block), not a fixed 128 tokens.

    bits: 8, 4, 3 or 2.
    axis: `channel`, `token` or `auto` (channel from 16 tokens a block on).
    symmetric: no zero point; costs accuracy where a channel's mean is far from zero.
    """

    has_kernel = True

    def __init__(
        self, bits: int, axis: str = "auto", symmetric: bool = False, slots_last: bool = False
    ):
        if bits not in (8, 4, 3, 2):
            raise BadInput("format.bits", bits, "must be 8, 4, 3 or 2")
        self.bits, self.axis, self.symmetric = bits, check_axis(axis), symmetric
        self.slots_last = slots_last

    def axis_of(self, slots: int) -> str:
        return resolve_axis(self.axis, slots)

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        data, scale = self.code_planes(slots, heads, dim), scale_plane(self.axis, slots, heads, dim)
        return data | {"scale": scale} | ({} if self.symmetric else {"zero": scale})

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        dim, x = reduced_dim(self.axis, x.shape[1]), heads_first(x)
        if self.symmetric:
            codes, scale = ref.quantize_symmetric(x, self.bits, dim)
            extra = {"scale": scale}
        else:
            codes, scale, zero = ref.quantize_asymmetric(x, self.bits, dim)
            extra = {"scale": scale, "zero": zero}
        return self.pack(codes) | extra

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = self.unpack(planes)
        slots = codes.shape[2]
        scale = spread(planes["scale"], self.axis, slots)
        if self.symmetric:
            x = (codes.float() - 2 ** (self.bits - 1)) * scale
        else:
            x = codes.float() * scale + spread(planes["zero"], self.axis, slots)
        return x.to(dtype).transpose(1, 2)

    def __repr__(self) -> str:
        layout = "/slots" if self.slots_last else ""
        return f"int{self.bits}/{self.axis}/{'sym' if self.symmetric else 'asym'}{layout}"
