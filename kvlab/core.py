"""Plain data and errors that every room shares; imports nothing of kvlab.

Shape legend, used in every docstring:
    L layers, N blocks, S slots in a block, T tokens in this call, B rows of a batch,
    Hq query heads, H key/value heads, D head width. K and V are [..., H, D], keys after RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class CacheGeometry:
    """The shape of one cache: what a block of every layer must hold."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    def __post_init__(self):
        for name in ("layers", "query_heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise BadInput(f"geometry.{name}", getattr(self, name), "must be at least 1")
        if self.query_heads % self.kv_heads:
            raise BadInput(
                "geometry.query_heads", self.query_heads, f"must be a multiple of {self.kv_heads}"
            )
        if not 1 <= self.block_size <= 256:
            raise BadInput("cache.block_size", self.block_size, "must lie between 1 and 256 tokens")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.query_heads // self.kv_heads

    @property
    def elements_per_token(self) -> int:
        """Key and value elements that one token leaves in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def elements_per_block(self) -> int:
        return self.elements_per_token * self.block_size


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
