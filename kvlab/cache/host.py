"""Known prefixes that left the device and wait in host memory."""

from __future__ import annotations

from typing import NamedTuple

from kvlab.core import BlockId
from kvlab.offload import OutOfHost


class Waiting(NamedTuple):
    """A block in host memory: its key there, and its tokens, as bytes."""

    key: int
    tokens: bytes


class HostPrefixes:
    """Contents of evicted blocks by their chained names; what left the device first goes first.

    shelf: the host half of the layer group's pool; without offload it takes nothing.
    """

    def __init__(self, shelf):
        self.shelf = shelf
        self._waiting: dict[int, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def keys(self) -> list[int]:
        """Keys that are held here."""
        return [waiting.key for waiting in self._waiting.values()]

    def make_room(self, count: int) -> bool:
        """Have host memory for `count` more blocks, at the cost of what has waited longest."""
        while True:
            try:
                self.shelf.require(count)
                return True
            except OutOfHost:
                if not self._waiting:
                    return False
                self.drop(next(iter(self._waiting)))

    def put(self, leaving: dict[BlockId, tuple[int, bytes]], keys: dict[BlockId, int]) -> None:
        """Keep blocks (name, tokens) that were spilled under `keys`, in the order they left."""
        for block, (name, tokens) in leaving.items():
            if block in keys:
                self.shelf.share([keys[block]])
                self.give(name, tokens, keys[block])

    def give(self, name: int, tokens: bytes, key: int) -> None:
        """Keep a block that the caller held."""
        self.drop(name)
        self._waiting[name] = Waiting(key, tokens)

    def has(self, name: int, tokens: bytes) -> bool:
        return name in self._waiting and self._waiting[name].tokens == tokens

    def take(self, name: int) -> int:
        """The key of a block that moves back; the caller holds it now."""
        return self._waiting.pop(name).key

    def drop(self, name: int) -> None:
        """Forget a content; one that is not here is no error."""
        if name in self._waiting:
            self.shelf.drop([self.take(name)])

    def clear(self) -> None:
        for name in list(self._waiting):
            self.drop(name)
