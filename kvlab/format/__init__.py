"""AXIS format: how a sealed block is stored."""

from kvlab import axes
from kvlab.format.base import Codec, KVFormat, Plane
from kvlab.format.codecs import Dense, Fp8, Int

__all__ = ["Codec", "Dense", "Fp8", "Int", "KVFormat", "NAMES", "Plane", "by_name", "shipped"]


def _ints(key_bits: int, value_bits: int):
    """Keys of 8 bits need no zero point; below, a channel's mean would eat the few steps."""
    return lambda: (
        Int(key_bits, symmetric=key_bits == 8),
        Int(value_bits, axis="token", symmetric=value_bits == 8, slots_last=True),
    )


_PAIRS = {
    "fp32": lambda: (Dense("float32"), Dense("float32")),
    "fp16": lambda: (Dense("float16"), Dense("float16")),
    "bf16": lambda: (Dense("bfloat16"), Dense("bfloat16")),
    "fp8": lambda: (Fp8(), Fp8(slots_last=True)),
    "int8": _ints(8, 8),
    "int4": _ints(4, 4),
    "int3": _ints(3, 3),
    "int2": _ints(2, 2),
    "k8v4": _ints(8, 4),
    "k4v2": _ints(4, 2),
    "k3v2": _ints(3, 2),
}
NAMES = tuple(_PAIRS)


def by_name(name: str) -> KVFormat:
    """The format of this name, or made at this dotted path. BadInput lists the known ones."""
    return axes.by_name("format", name)


def shipped(name: str) -> KVFormat:
    """One of our own formats, with its defaults; what the table of axes points to."""
    return KVFormat(*_PAIRS[name](), name=name)
