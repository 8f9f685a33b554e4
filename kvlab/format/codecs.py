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


def spread(scale: Tensor, axis: str, slots: int) -> Tensor:
    """Stored scale [N, H, D or S] -> fp32, broadcast over [N, H, S, D]."""
    return scale.float().unsqueeze(reduced_dim(axis, slots))


class Dense(Codec):
    """No quantization: the tensor in `dtype` (float32, float16 or bfloat16)."""

    def __init__(self, dtype: str = "bfloat16"):
        if dtype not in DTYPES:
            raise BadInput("format.dtype", dtype, f"must be one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]

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
    """

    def __init__(self, axis: str = "token"):
        self.axis = check_axis(axis)

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        data = Plane((heads, slots, dim), torch.float8_e4m3fn)
        return {"data": data, "scale": scale_plane(self.axis, slots, heads, dim)}

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        data, scale = ref.quantize_fp8(heads_first(x), reduced_dim(self.axis, x.shape[1]))
        return {"data": data, "scale": scale}

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        data = planes["data"].float()
        scale = spread(planes["scale"], self.axis, data.shape[2])
        return (data * scale).to(dtype).transpose(1, 2)

    def __repr__(self) -> str:
        return f"fp8/{self.axis}"


class Int(Codec):
    """Packed integers: keys per channel within a block, values per token, as KIVI and KVQuant do.

    KIVI https://arxiv.org/abs/2402.02750, KVQuant https://arxiv.org/abs/2401.18079. Differs from
    KIVI: the group is the block, keys are quantized after RoPE, and the unquantized residual is the
    open tail (less than one block), not a fixed 128 tokens.

    bits: 8, 4, 3 or 2, really packed; 3 bits are a plane of two bits and a plane of one.
    axis: `channel`, `token` or `auto` (channel from 16 tokens a block on).
    symmetric: no zero point; costs accuracy where a channel's mean is far from zero.
    """

    def __init__(self, bits: int, axis: str = "auto", symmetric: bool = False):
        if bits not in (8, 4, 3, 2):
            raise BadInput("format.bits", bits, "must be 8, 4, 3 or 2")
        self.bits, self.axis, self.symmetric = bits, check_axis(axis), symmetric

    def planes(self, slots: int, heads: int, dim: int) -> dict[str, Plane]:
        self._check(dim)
        scale = scale_plane(self.axis, slots, heads, dim)
        data = {
            name: Plane((heads, slots, dim * bits // 8), torch.uint8)
            for name, (_, bits) in self._bit_planes.items()
        }
        return data | {"scale": scale} | ({} if self.symmetric else {"zero": scale})

    def quantize(self, x: Tensor) -> dict[str, Tensor]:
        dim, x = reduced_dim(self.axis, x.shape[1]), heads_first(x)
        if self.symmetric:
            codes, scale = ref.quantize_symmetric(x, self.bits, dim)
            extra = {"scale": scale}
        else:
            codes, scale, zero = ref.quantize_asymmetric(x, self.bits, dim)
            extra = {"scale": scale, "zero": zero}
        return {
            name: ref.pack((codes >> shift) & (2**bits - 1), bits)
            for name, (shift, bits) in self._bit_planes.items()
        } | extra

    def dequantize(self, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = sum(
            ref.unpack(planes[name], bits) << shift
            for name, (shift, bits) in self._bit_planes.items()
        )
        slots = codes.shape[2]
        scale = spread(planes["scale"], self.axis, slots)
        if self.symmetric:
            x = (codes.float() - 2 ** (self.bits - 1)) * scale
        else:
            x = codes.float() * scale + spread(planes["zero"], self.axis, slots)
        return x.to(dtype).transpose(1, 2)

    @property
    def _bit_planes(self) -> dict[str, tuple[int, int]]:
        """Plane name -> (shift of its bits in the code, bits in the plane)."""
        return {"data": (0, 2), "high": (2, 1)} if self.bits == 3 else {"data": (0, self.bits)}

    def _check(self, dim: int) -> None:
        per_byte = max(8 // bits for _, bits in self._bit_planes.values())
        if dim % per_byte:
            raise BadInput(
                "format", f"int{self.bits}",
                f"cannot pack head_dim {dim}: it must be a multiple of {per_byte}; "
                "take int8, fp8 or bf16 for this model",
            )

    def __repr__(self) -> str:
        return f"int{self.bits}/{self.axis}/{'sym' if self.symmetric else 'asym'}"
