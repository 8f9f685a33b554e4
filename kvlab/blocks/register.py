"""The ids of a ledger: a record for each, made at first use and then kept, and which are free."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from kvlab.blocks.states import FREE, OPEN, BlockStateError
from kvlab.core import BlockId
from kvlab.policy import BlockMeta


class Register:
    """metas: the record of each id. freed: heap of the free ids among them."""

    __slots__ = ("metas", "freed")

    def __init__(self):
        self.metas: list[BlockMeta] = []
        self.freed: list[BlockId] = []

    @property
    def held(self) -> int:
        """Ids that are not free."""
        return len(self.metas) - len(self.freed)

    def find(self, id: BlockId) -> BlockMeta | None:
        return self.metas[id] if 0 <= id < len(self.metas) else None

    def all(self, ids: Sequence[BlockId], verb: str) -> list[BlockMeta]:
        """The records of `ids`. Raises `BlockStateError` where there is none, or it is free."""
        metas, found = self.metas, []
        known = len(metas)
        for id in ids:
            meta = metas[id] if 0 <= id < known else None
            if meta is None or not meta.state:
                raise BlockStateError(verb, meta, id)
            found.append(meta)
        return found

    def only(self, state: int, ids: Sequence[BlockId], verb: str) -> list[BlockMeta]:
        """The same of blocks that are all in this state."""
        metas, found = self.metas, []
        known = len(metas)
        for id in ids:
            meta = metas[id] if 0 <= id < known else None
            if meta is None or meta.state != state:
                raise BlockStateError(verb, meta, id)
            found.append(meta)
        return found

    def take(self, count: int, owner) -> list[BlockId]:
        """Open so many blocks, lowest free ids first."""
        metas, freed = self.metas, self.freed
        if count < len(freed):
            ids = [heappop(freed) for _ in range(count)]
        else:
            ids, self.freed = sorted(freed), []
            for id in range(len(metas), len(metas) + count - len(ids)):
                metas.append(BlockMeta(id))
                ids.append(id)
        for id in ids:
            meta = metas[id]
            meta.state, meta.owner = OPEN, owner
        return ids

    def exchange(self, gone: list[BlockId], count: int) -> list[BlockId]:
        """Blocks `gone` are free, then `count` are taken, lowest ids first: these, highest first.
        Their states are the caller's to write."""
        if self.freed or len(gone) < count:
            self.give(gone)
            return self.take(count, None)[::-1]
        return sorted(gone, reverse=True)

    def give(self, ids: list[BlockId]) -> None:
        """These are free again."""
        metas, freed = self.metas, self.freed
        for id in ids:
            metas[id].state = FREE
        if freed:
            for id in ids:
                heappush(freed, id)
        else:
            self.freed = sorted(ids)
