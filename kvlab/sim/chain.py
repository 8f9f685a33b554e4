"""Chained block ids made from what a prompt is made of: equal prefixes get equal ids."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np


class Chain:
    """A prompt that grows by named pieces, cut into blocks of `block_size` tokens.

    A block is its parent and the pieces of text in it. `table` holds the ids given so far; chains
    that share it share prefixes.
    """

    def __init__(self, table: dict[tuple, int], block_size: int):
        self.table, self.block_size = table, block_size
        self.tokens = 0
        self._ids: list[int] = []
        self._content: list[tuple[Hashable, int, int]] = []
        self._room = block_size

    def add(self, name: Hashable, length: int) -> None:
        """`length` tokens that are the same wherever the name is the same."""
        start = 0
        while start < length:
            count = min(self._room, length - start)
            self._content.append((name, start, count))
            start, self._room = start + count, self._room - count
            if not self._room:
                self._ids.append(self._id())
                self._content, self._room = [], self.block_size
        self.tokens += length

    def ids(self) -> list[int]:
        """The ids so far, the last one of a partial block where there is one."""
        return [*self._ids, self._id()] if self._content else list(self._ids)

    def _id(self) -> int:
        parent = self._ids[-1] if self._ids else -1
        return self.table.setdefault((parent, *self._content), len(self.table))


class TokenBlocks:
    """Ids of the whole blocks of token sequences, exact: a block is its parent and its tokens.

    A sequence that begins as the last one of its session did costs only what is new.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._table: dict[tuple[int, bytes], int] = {}
        self._last: dict[Hashable, tuple[list[np.ndarray], list[int]]] = {}

    def ids(self, session: Hashable, parts: list[np.ndarray]) -> list[int]:
        """parts: int32 token arrays; the same objects stand for the same text."""
        before, ids = self._last.get(session, ([], []))
        same = 0
        while same < min(len(before), len(parts)) and before[same] is parts[same]:
            same += 1
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        found = ids[: sum(map(len, parts[:same])) // self.block_size]
        for start in range(len(found), len(tokens) // self.block_size):
            piece = tokens[start * self.block_size : (start + 1) * self.block_size].tobytes()
            parent = found[-1] if found else -1
            found.append(self._table.setdefault((parent, piece), len(self._table)))
        self._last[session] = parts, found
        return found
