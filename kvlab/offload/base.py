"""The null member of axis `offload`."""

from __future__ import annotations

from kvlab import kinds
from kvlab.blocks import NoStorage, NoTier


class NoShelf:
    """Takes nothing: what was evicted has no key."""

    keeps = False
    nbytes = device_nbytes = live = 0
    keys = ()

    def require(self, count: int) -> None:
        """There is always room for nothing."""

    def spill(self, blocks: list[int]) -> list[int]:
        return []

    def share(self, keys: list[int]) -> None:
        """No key can be asked for."""

    drop = share

    def check(self, keys: list[int]) -> None:
        """Nothing can be wrong."""


@kinds.members("offload")
class NoOffload:
    """Nowhere: an evicted block is gone."""

    name = "none"
    keeps = False  # whether an evicted block can still be read

    def build(self, pool) -> NoShelf:
        return NoShelf()

    def tier(self, storage: NoStorage) -> NoTier:
        """Where known prefixes wait that left the device; `storage` moves their bytes."""
        return NoTier()
