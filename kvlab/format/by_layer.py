"""A format for each layer, where layers do not bear the same."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvlab.core import BadInput, CacheGeometry, KvlabError, LayerShape
from kvlab.format.base import KVFormat, Plane
from kvlab.format.names import by_name, paired

RUN = re.compile(r"(?P<name>[^*]+?)(?P<run>\*(?P<count>\d*))?")


class ByLayer(KVFormat):
    """Layers differ in what rounding their keys and values does to a model's output, so bits are
    best spent where they count (KVTuner, https://arxiv.org/abs/2502.04420). `job=sensitivity`
    measures it and finds the list for a number of bytes.

    layers: formats in the order of the layers: a name (`int8`), a pair of codecs `KEYS/VALUES`
        (`int4g/int2g`) or a `KVFormat`; `NAME*3` is three layers of it, and one `NAME*` is as many
        as the others leave. sinks: first tokens kept as computed in every layer that has scales,
        see `KVFormat`; null: as each named format has it, and none in pairs. residual: newest
        tokens read as computed in every layer that has scales.

    Layers of one shape and format are a layer group, with tables and a ledger of its own: a policy
    chooses for each group from its own scores.
    """

    name = "by_layer"

    def __init__(
        self, layers: Sequence = ("int8*2", "int4*"), sinks: int | None = None, residual: int = 0
    ):
        self.told = list(layers)
        self.runs = [_run(entry, sinks, residual) for entry in layers]
        if not self.runs:
            raise BadInput("format.layers", [], "names no format; write [int8*2,int4*]")
        if sum(count is None for _, count in self.runs) > 1:
            raise BadInput("format.layers", self.told, "says twice to take what is left; one NAME* "
                           "only")
        self.sinks = max(format.sinks for format, _ in self.runs)
        self.residual = max(format.residual for format, _ in self.runs)
        if residual and not self.residual:
            raise BadInput("format.residual", residual, "keeps newest tokens from being rounded, "
                           f"and no layer of {self.told} has scales; format.residual=0")

    def each(self, layers: int) -> list[KVFormat]:
        named = sum(count or 0 for _, count in self.runs)
        whole = all(count is not None for _, count in self.runs)
        if named > layers or (whole and named < layers):
            raise BadInput("format.layers", self.told, f"names {named} layers and the model has "
                           f"{layers}; NAME*3 is three layers of it, NAME* all that are left")
        rest = layers - named
        return [format for format, count in self.runs
                for _ in range(rest if count is None else count)]  # fmt: skip

    def planes_of(self, shape: LayerShape, slots: int) -> dict[str, Plane]:
        raise self._mixed()

    def planes(self, g: CacheGeometry) -> dict[str, Plane]:
        raise self._mixed()

    def quantize(self, k, v):
        raise self._mixed()

    def dequantize(self, planes, dtype):
        raise self._mixed()

    def _mixed(self) -> KvlabError:
        return BadInput("format", self.name, "has a format for each layer, and one for all is "
                        "wanted here")

    @property
    def payload_bits(self) -> float:
        raise self._mixed()

    def caution(self, slots: int) -> str:
        return "; ".join(dict.fromkeys(filter(None, (f.caution(slots) for f, _ in self.runs))))

    @property
    def identity(self) -> str:
        runs = (f"{'' if count is None else count}*({format.identity})"
                for format, count in self.runs)  # fmt: skip
        return "by layer " + " ".join(runs)


def _run(
    entry: str | KVFormat, sinks: int | None, residual: int
) -> tuple[KVFormat, int | None]:
    """A format and the number of layers that have it; None: as many as are left."""
    if isinstance(entry, KVFormat):
        return entry, 1
    found = RUN.fullmatch(entry) if isinstance(entry, str) else None
    if found is None:
        raise BadInput("format.layers", entry, "is no format; write NAME, NAME*3 or NAME*")
    format = _named(found["name"], sinks, residual)
    return format, 1 if found["run"] is None else int(found["count"]) if found["count"] else None


def _named(name: str, sinks: int | None, residual: int) -> KVFormat:
    if "/" in name:
        return paired(name, sinks or 0, residual)
    format = by_name(name)
    if isinstance(format, ByLayer):
        raise BadInput("format.layers", name, "is a list of layers itself")
    scaled = format.key.scaled or format.value.scaled
    told = {"residual": residual} | ({} if sinks is None else {"sinks": sinks})
    return by_name(name, **told) if scaled else format
