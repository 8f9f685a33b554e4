"""The null member of axis `offload`, and what a full host says."""

from __future__ import annotations

from kvlab.core import KvlabError


class OutOfHost(KvlabError):
    """Host memory has no place for blocks that would have to leave the device."""

    def __init__(self, asked: int, held: int, limit: int):
        self.asked, self.held, self.limit = asked, held, limit
        super().__init__(
            f"out of host memory: {asked} more bytes asked, {held} held, at most {limit} allowed; "
            "raise offload.cap_gb, store fewer bits (format=int4) or close a sequence"
        )


class NoShelf:
    """Takes nothing: what was evicted has no key."""

    keeps = False
    nbytes = device_nbytes = live = 0

    def require(self, count: int) -> None:
        """There is always room for nothing."""

    def spill(self, blocks: list[int]) -> list[int]:
        return []

    def share(self, keys: list[int]) -> None:
        """No key can be asked for."""

    drop = share

    def check(self, keys: list[int]) -> None:
        """Nothing can be wrong."""


class NoOffload:
    """Nowhere: an evicted block is gone."""

    name = "none"
    keeps = False  # whether an evicted block can still be read

    def build(self, pool) -> NoShelf:
        return NoShelf()
