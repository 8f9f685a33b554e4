"""Plain data and errors that every room shares; imports nothing of kvlab.

Shape legend, used in every docstring:
    L layers, N blocks, S slots in a block, T tokens in this call, B rows of a batch,
    Hq query heads, H key/value heads, D head width (Dk of keys, Dv of values, where they may
    differ). K and V are [..., H, D], keys after RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from typing import NamedTuple

BlockId = int
SeqId = int


class KvlabError(Exception):
    """Any condition that kvlab reports to its user in one paragraph."""


class BadInput(KvlabError):
    """A value the user gave cannot be used; the text names key, value and remedy."""

    def __init__(self, key: str, value: object, remedy: str):
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}={value}: {remedy}")


class OutOfBlocks(KvlabError):
    """The ledger has fewer free blocks than were asked for."""

    def __init__(self, asked: int, free: int, capacity: int):
        self.asked, self.free, self.capacity = asked, free, capacity
        super().__init__(
            f"out of blocks: {asked} asked, {free} free of {capacity}; "
            "free a sequence, raise the budget or choose an eviction policy"
        )


class OutOfHost(KvlabError):
    """Host memory has no place for blocks that would have to leave the device."""

    def __init__(self, asked: int, held: int, limit: int):
        self.asked, self.held, self.limit = asked, held, limit
        super().__init__(
            f"out of host memory: {asked} more bytes asked, {held} held, at most {limit} allowed; "
            "raise offload.cap_gb, store fewer bits (format=int4) or close a sequence"
        )


class RunFailed(KvlabError):
    """What all other numbers of a run are compared with could not be measured."""


def first_seen(position, window: int | None):
    """The first position that a query at `position` sees; numbers and tensors alike.

    window: the last so many positions, the query's own included; None: all; negative: chunked
    attention (Llama 4), which starts anew at every multiple of -window.
    """
    if window is None:
        return 0 * position
    return position // -window * -window if window < 0 else position - window + 1


class LayerShape(NamedTuple):
    """What one layer stores of a token, and how far back its queries see.

    kv_heads: key/value heads; k_width, v_width: elements of a head's key and of its value.
    window: the model's own sliding window, or its chunks if negative, see `first_seen`; None: all
        of the past.
    softcap: logits are softly capped at this value (Gemma 2); None: not at all.
    """

    kv_heads: int
    k_width: int
    v_width: int
    window: int | None = None
    softcap: float | None = None

    @property
    def stored(self) -> LayerShape:
        """What is stored, whatever attention makes of it."""
        return self._replace(window=None, softcap=None)

    @property
    def elements(self) -> int:
        """Key and value elements of one token."""
        return self.kv_heads * (self.k_width + self.v_width)

    def seen(self, tokens: int) -> int:
        """Of `tokens` tokens, those that the newest of them sees."""
        return tokens - max(0, first_seen(tokens - 1, self.window))


@dataclass(frozen=True, init=False)
class CacheGeometry:
    """The shape of one cache: what a block of every layer must hold.

    `CacheGeometry(layers, query_heads, kv_heads, head_dim, block_size)` has equal layers, and
    `CacheGeometry.of(shapes, query_heads, block_size)` any. Layers of one shape may form a layer
    group (`KVFormat.groups`); a group's own geometry is `part(layers)`, and has a `shape`.
    """

    shapes: tuple[LayerShape, ...]
    query_heads: int
    block_size: int

    def __init__(
        self, layers: int, query_heads: int, kv_heads: int, head_dim: int, block_size: int
    ):
        numbers = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in numbers.items():
            _at_least_one(name, value)
        shapes = (LayerShape(kv_heads, head_dim, head_dim),) * layers
        self._set(shapes, query_heads, block_size)

    @classmethod
    def of(
        cls, shapes: Sequence[LayerShape], query_heads: int, block_size: int
    ) -> CacheGeometry:
        """The geometry of layers that may differ. Raises `BadInput`."""
        _at_least_one("layers", len(shapes))
        for name in ("kv_heads", "k_width", "v_width"):
            _at_least_one(name, min(getattr(shape, name) for shape in shapes))
        _at_least_one("window", min(shape.seen(1) for shape in shapes))
        new = object.__new__(cls)
        new._set(tuple(shapes), query_heads, block_size)
        return new

    def _set(self, shapes: tuple[LayerShape, ...], query_heads: int, block_size: int) -> None:
        _at_least_one("query_heads", query_heads)
        for heads in {shape.kv_heads for shape in shapes}:
            if query_heads % heads:
                raise BadInput(
                    "geometry.query_heads", query_heads, f"must be a multiple of {heads}"
                )
        if not 1 <= block_size <= 256:
            raise BadInput("cache.block_size", block_size, "must lie between 1 and 256 tokens")
        for name, value in zip(("shapes", "query_heads", "block_size"),
                               (shapes, query_heads, block_size)):
            object.__setattr__(self, name, value)

    @property
    def layers(self) -> int:
        return len(self.shapes)

    @property
    def shape(self) -> LayerShape:
        """The one shape of all layers. Raises `KvlabError` where they differ."""
        if len(set(self.shapes)) > 1:
            raise KvlabError("these layers have no shape in common; ask each layer group for its")
        return self.shapes[0]

    @property
    def stored(self) -> LayerShape:
        """What all layers store, whatever they see of it. Raises `KvlabError` where it differs."""
        found = {shape.stored for shape in self.shapes}
        if len(found) > 1:
            raise KvlabError("layers of unlike heads or head widths cannot be stored as one prefix")
        return found.pop()

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of keys and values alike. Raises `KvlabError` where they differ."""
        if self.shape.k_width != self.shape.v_width:
            raise KvlabError("keys and values of these layers differ in width")
        return self.shape.k_width

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.query_heads // self.kv_heads

    def part(self, layers: Sequence[int]) -> CacheGeometry:
        """The geometry of some of the layers."""
        return self.of([self.shapes[layer] for layer in layers], self.query_heads, self.block_size)

    @property
    def elements_per_token(self) -> int:
        """Key and value elements that one token leaves in all layers."""
        return sum(shape.elements for shape in self.shapes)

    @property
    def elements_per_block(self) -> int:
        return self.elements_per_token * self.block_size


def check_number(
    key: str, value: object, least: float = 1, most: float = inf, *, whole: bool = True,
    above: bool = False, null: bool = False,
) -> None:
    """Raises `BadInput` unless `value` is a finite number from `least` to `most`.

    whole: an integer. above: more than `least`. null: or None.
    """
    kind = Integral if whole else Real
    if null and value is None:
        return
    number = isinstance(value, kind) and not isinstance(value, bool) and isfinite(value)
    if number and least <= value <= most and not (above and value == least):
        return
    what = "a whole number" if whole else "a finite number"
    bounds = f", more than {least}" if above else f", at least {least}" * (least > -inf)
    end = "" if most == inf else f" and at most {most}"
    raise BadInput(key, value, f"must be {what}{bounds}{end}" + ", or null" * null)


def checked_seed(key: str, seed: int) -> int:
    """A seed that every generator takes, and no two draw alike from. Raises `BadInput`."""
    check_number(key, seed, 0, 2**32 - 1)
    return int(seed)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise BadInput(f"geometry.{name}", value, "must be at least 1")


class Measurement(NamedTuple):
    """One number of a run. `low`..`high` is a 95 % interval, `count` what it rests on."""

    name: str
    value: float
    unit: str
    better: str | None = None  # "higher" | "lower" | None
    low: float | None = None
    high: float | None = None
    count: int | None = None


class Variant(NamedTuple):
    """One point of the composed space: a readable name, its settings, and how to build it."""

    name: str
    params: dict
    spec: object = None
