"""Contents that have names already, as the block ids of a trace: no tokens, nothing to compare."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, KeysView, Sequence
from itertools import repeat

from kvlab.blocks.chain import Chain, backwards, picked
from kvlab.core import BlockId


class Names:
    """Whole blocks of a sequence by name, with the interface of `Chain` that lookups need."""

    __slots__ = ("block_size", "_names", "_every")
    changes = 0

    def __init__(self, names: list[int], block_size: int, every: list[int] | None = None):
        """every: what was named, where some of it was named twice; a block is where it is named
        last, and found where it is named first."""
        self._names, self.block_size, self._every = names, block_size, every

    @property
    def tokens(self) -> int:
        return len(self._names) * self.block_size

    def __len__(self) -> int:
        return len(self._names)

    def names(self, stop: int | None = None) -> list[int]:
        return self._names if stop is None else self._names[:stop]

    def coming(self, logical: Sequence[int]) -> list[int]:
        """See `Chain.coming`."""
        if self._every is None:
            return backwards(self._names, logical)
        wanted = set(backwards(self._names, logical))
        return [name for name in reversed(self._every) if name in wanted]

    def lineage(self, logical: Sequence[int]) -> tuple[Sequence[int], list[int | None]]:
        """See `Chain.lineage`."""
        if self._every is None:
            return logical, picked([None, *self._names], logical)
        last = {name: depth for depth, name in enumerate(self._every)}
        depths = [last[self._names[i]] for i in logical]
        return depths, [self._every[depth - 1] if depth else None for depth in depths]

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
        names = [n for n in map(self._names.pop, ids, repeat(None)) if n is not None]
        deque(map(self._where.__delitem__, names), 0)  # as fast as a loop can be
        self.changes += 1
        return names

    def exchange(self, gone: list[int], new: list[BlockId], names: Sequence[int]) -> None:
        """`drop` the blocks whose names are `gone`, and `add` the blocks `new`, which they are
        among, by `names`."""
        deque(map(self._where.__delitem__, gone), 0)
        self._where.update(zip(names, new))
        self._names.update(zip(new, names))
        self.changes += 1

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
