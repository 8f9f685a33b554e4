"""AXIS format: how a sealed block is stored."""

from kvlab.format.base import Codec, KVFormat, Plane
from kvlab.format.by_layer import ByLayer
from kvlab.format.codecs import Dense, Fp8, Int, Packed
from kvlab.format.grouped import Grouped
from kvlab.format.names import CODECS, NAMES, by_name, paired, shipped
from kvlab.format.rotated import Rotated

__all__ = ["ByLayer", "CODECS", "Codec", "Dense", "Fp8", "Grouped", "Int", "KVFormat", "NAMES",
           "Packed", "Plane", "Rotated", "by_name", "paired", "shipped"]  # fmt: skip
