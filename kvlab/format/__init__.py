"""AXIS format: how a sealed block is stored."""

from kvlab import axes
from kvlab.format.base import Codec, KVFormat, Plane
from kvlab.format.codecs import Dense, Fp8, Int, Packed
from kvlab.format.grouped import Grouped
from kvlab.format.rotated import Rotated

__all__ = ["Codec", "Dense", "Fp8", "Grouped", "Int", "KVFormat", "NAMES", "Packed", "Plane",
           "Rotated", "by_name", "shipped"]  # fmt: skip


NAMES = tuple(axes.names("format"))
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def by_name(name: str, **settings) -> KVFormat:
    """The format of this name, or made at this dotted path, with its defaults but for `settings`.
    BadInput lists the known ones."""
    return axes.by_name("format", name, **settings)


def shipped(name: str, key: str, value: str, sinks: int = 0) -> KVFormat:
    """One of our own formats from the names of its codecs, as the table of axes has them."""
    return KVFormat(_codec(key, {}), _codec(value, {"slots_last": True}), name=name, sinks=sinks)


def _codec(name: str, side: dict) -> Codec:
    """Values are scaled by token and stored for sums over slots. Keys of 8 bits need no zero point;
    below, a channel's mean would eat the few steps. A name that ends in g has small groups
    and, where there are few codes, turned values."""
    if name in _DTYPES:
        return Dense(_DTYPES[name])
    if name == "fp8":
        return Fp8(**side)
    bits = int(name.removeprefix("int").removesuffix("g"))
    if name.endswith("g"):
        own = {"axis": "token"} | side if side else {"centred": True}
        codec = Grouped(bits, search=bits < 4, **own)
        return Rotated(codec) if side and bits < 4 else codec
    return Int(bits, symmetric=bits == 8, **({"axis": "token"} | side if side else {}))
