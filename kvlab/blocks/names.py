"""Contents that have names already, as the block ids of a trace: no tokens, nothing to compare."""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Sequence

from kvlab.blocks.chain import Chain
from kvlab.core import BlockId


class Names:
    """Whole blocks of a sequence by name, with the interface of `Chain` that lookups need."""

    __slots__ = ("block_size", "_names")
    changes = 0

    def __init__(self, names: list[int], block_size: int):
        self._names, self.block_size = names, block_size

    @property
    def tokens(self) -> int:
        return len(self._names) * self.block_size

    def __len__(self) -> int:
        return len(self._names)

    def names(self, stop: int | None = None) -> list[int]:
        return self._names if stop is None else self._names[:stop]

    def raw(self, index: int) -> bytes:
        """Nothing: equal names are equal blocks."""
        return b""


class NameIndex:
    """Which block holds which name: `PrefixIndex` where names can be trusted. O(1) a block."""

    def __init__(self):
        self._where: dict[int, BlockId] = {}
        self._names: dict[BlockId, int] = {}
        self.changes = self.added = 0

    def lookup(self, chain: Names | Chain) -> list[BlockId | None]:
        """Block of each whole block, None where it is not held."""
        return list(map(self._where.get, chain.names()))

    def add(self, chain: Names | Chain, logical: Sequence[int], ids: list[BlockId]) -> None:
        """Make known that `ids[n]` holds whole block `logical[n]`; nothing may be known there."""
        names = picked(chain.names(), logical)
        self._where.update(zip(names, ids))
        self._names.update(zip(ids, names))
        self.changes += 1
        self.added += 1

    def drop(self, ids: Iterable[BlockId]) -> list[int]:
        """Forget blocks; the names of those that were known, in order."""
        known = self._names
        names = [known.pop(id) for id in ids if id in known]
        for name in names:
            del self._where[name]
        self.changes += 1
        return names

    def content(self, id: BlockId) -> tuple[int, bytes]:
        """Name and token bytes of a known block."""
        return self._names[id], b""

    @property
    def blocks(self) -> KeysView[BlockId]:
        """All known blocks; changes with the index."""
        return self._names.keys()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, id: BlockId) -> bool:
        return id in self._names

    def check(self) -> None:
        """Raise AssertionError unless both directions agree."""
        assert {id: name for name, id in self._where.items()} == self._names


def picked(items: list, logical: Sequence[int]) -> list:
    """items[i] for each of `logical`: a slice where these fall one by one, as they mostly do."""
    if isinstance(logical, range) and logical.step == -1:
        return items[logical.stop + 1 : logical.start + 1][::-1]
    return [items[i] for i in logical]


def leading(found: list) -> int:
    """How many blocks are held before the first gap."""
    return found.index(None) if None in found else len(found)
