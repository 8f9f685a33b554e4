"""Formats and codecs by name."""

from __future__ import annotations

from kvlab import axes
from kvlab.core import BadInput
from kvlab.format.base import Codec, KVFormat
from kvlab.format.codecs import Dense, Fp8, Int
from kvlab.format.grouped import Grouped
from kvlab.format.rotated import Rotated

# Those that are one pair of codecs for all layers.
NAMES = tuple(n for n, member in axes.TABLE["format"].members.items() if member.given)
CODECS = ("fp32", "fp16", "bf16", "fp8", "fp8c", "int8", "int4", "int3", "int2", "int4g", "int3g",
          "int2g")  # fmt: skip
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def by_name(name: str, **settings) -> KVFormat:
    """The format of this name, or made at this dotted path, with its defaults but for `settings`.
    BadInput lists the known ones."""
    return axes.by_name("format", name, **settings)


def shipped(name: str, key: str, value: str, sinks: int = 0, residual: int = 0) -> KVFormat:
    """One of our own formats from the names of its codecs, as the table of axes has them."""
    return KVFormat(key_codec(key), value_codec(value), name, sinks, residual)


def paired(text: str, sinks: int = 0, residual: int = 0) -> KVFormat:
    """A format from `KEYS/VALUES`, the names of two codecs. Raises `BadInput` for unknown ones."""
    key, _, value = text.partition("/")
    for name in (key, value):
        if name not in CODECS:
            raise BadInput("format.layers", text, f"has no codec {name!r}; a pair is KEYS/VALUES, "
                           f"of {', '.join(CODECS)}")
    made = key_codec(key), value_codec(value)
    scaled = any(codec.scaled for codec in made)
    return KVFormat(*made, text, sinks * scaled, residual * scaled)


def key_codec(name: str) -> Codec:
    """Keys of 8 bits need no zero point; below, a channel's mean would eat the few steps. A name
    that ends in g has small groups, and clips where there are few codes; c: around channel means.
    """
    if name in _DTYPES:
        return Dense(_DTYPES[name])
    if name == "fp8c":
        return Fp8("auto", centred=True)
    if name == "fp8":
        return Fp8()
    bits = _bits(name)
    if name.endswith("g"):
        return Grouped(bits, centred=True, search=bits < 4)
    return Int(bits, symmetric=bits == 8)


def value_codec(name: str) -> Codec:
    """Values are scaled by token and stored for sums over slots. A name that ends in g has small
    groups and, where there are few codes, turned values."""
    if name in _DTYPES:
        return Dense(_DTYPES[name])
    if name in ("fp8", "fp8c"):
        return Fp8(slots_last=True)
    bits = _bits(name)
    if name.endswith("g"):
        codec = Grouped(bits, "token", search=bits < 4, slots_last=True)
        return Rotated(codec) if bits < 4 else codec
    return Int(bits, "token", symmetric=bits == 8, slots_last=True)


def _bits(name: str) -> int:
    return int(name.removeprefix("int").rstrip("g"))
