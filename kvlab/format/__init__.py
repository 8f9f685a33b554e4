"""AXIS format: how a sealed block is stored."""

from kvlab import axes
from kvlab.format.base import Codec, KVFormat, Plane
from kvlab.format.codecs import Dense, Fp8, Int
from kvlab.format.rotated import Rotated

__all__ = ["Codec", "Dense", "Fp8", "Int", "KVFormat", "NAMES", "Plane", "Rotated", "by_name",
           "shipped"]


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
    below, a channel's mean would eat the few steps."""
    if name in _DTYPES:
        return Dense(_DTYPES[name])
    if name == "fp8":
        return Fp8(**side)
    bits = int(name.removeprefix("int"))
    return Int(bits, symmetric=bits == 8, **({"axis": "token"} | side if side else {}))
