"""A sequence's blocks in logical order, and where its tokens lie."""

from __future__ import annotations

from typing import NamedTuple

from kvlab.core import BadInput, BlockId, KvlabError


class SlotRun(NamedTuple):
    """Consecutive slots of one block."""

    block_id: BlockId
    first_slot: int
    count: int


class HoleError(KvlabError):
    """Tokens were asked for whose block was evicted."""


class BlockTable:
    """Block `i` holds tokens [i * block_size, (i + 1) * block_size); an evicted one leaves a hole.

    ids      block of each logical index, None for a hole
    length   tokens written so far; the last block may be partly filled, further blocks empty
    changes  counts what was done to `ids`, so that copies of them know when they are stale
    """

    __slots__ = ("block_size", "ids", "length", "changes")

    def __init__(self, block_size: int):
        if block_size < 1:
            raise BadInput("cache.block_size", block_size, "must be at least 1 token")
        self.block_size = block_size
        self.ids: list[BlockId | None] = []
        self.length = 0
        self.changes = 0

    @property
    def room(self) -> int:
        """Tokens that fit behind `length` in the blocks at hand."""
        return len(self.ids) * self.block_size - self.length

    @property
    def holes(self) -> list[int]:
        """Logical indices of evicted blocks."""
        return [index for index, id in enumerate(self.ids) if id is None]

    def missing(self, tokens: int) -> int:
        """Blocks to allocate before `tokens` more can be written."""
        return -(-max(0, tokens - self.room) // self.block_size)

    def append(self, ids: list[BlockId], tokens: int = 0) -> None:
        """Add blocks at the end, and `tokens` as by `grow` (a prefix hit brings both)."""
        self.ids.extend(ids)
        self.changes += bool(ids)
        self.grow(tokens)

    def grow(self, tokens: int) -> None:
        """Count tokens as written; BadInput if the blocks at hand cannot hold them."""
        if not 0 <= tokens <= self.room:
            raise BadInput(
                "tokens", tokens, f"the table has room for 0 to {self.room}; append blocks"
            )
        self.length += tokens

    def punch(self, index: int) -> BlockId:
        """Make a hole at a logical index; returns the block that was there."""
        id = self.ids[index]
        if id is None:
            raise HoleError(f"block {index} of the sequence is a hole already")
        self.ids[index] = None
        self.changes += 1
        return id

    def fill(self, index: int, id: BlockId) -> None:
        """Close the hole at a logical index: its block came back under another id."""
        if self.ids[index] is not None:
            raise BadInput("index", index, "is no hole")
        self.ids[index] = id
        self.changes += 1

    def slots(self, start: int, count: int) -> list[SlotRun]:
        """Where tokens [start, start + count) lie, in order; they need not be written yet.

        Raises HoleError where a block was evicted, BadInput beyond the blocks at hand.
        """
        end = start + count
        if start < 0 or count < 0 or end > len(self.ids) * self.block_size:
            raise BadInput("tokens", f"[{start}, {end})", f"the table ends at {self._end}")
        runs = []
        while start < end:
            index, slot = divmod(start, self.block_size)
            if self.ids[index] is None:
                raise HoleError(f"tokens from {start} on lie in block {index}, which was evicted")
            taken = min(self.block_size - slot, end - start)
            runs.append(SlotRun(self.ids[index], slot, taken))
            start += taken
        return runs

    def touched(self, ranges: list[tuple[int, int]]) -> set[BlockId]:
        """The blocks that any of the half-open token `ranges` touches."""
        indices = {i for begin, end in self.spans(ranges) for i in range(begin, end)}
        return {self.ids[i] for i in indices if self.ids[i] is not None}

    def spans(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The same ranges in logical blocks, half-open, a block counting if it is touched."""
        return [(begin // self.block_size, -(-end // self.block_size)) for begin, end in ranges]

    def truncate(self, length: int) -> list[BlockId]:
        """Forget tokens from `length` on; returns the blocks without any of the rest, tail first.

        A block that keeps some tokens stays; it must not be sealed if it is to be written again.
        """
        if not 0 <= length <= self.length:
            raise BadInput("length", length, f"must lie between 0 and {self.length}")
        keep = -(-length // self.block_size)
        gone = [id for id in reversed(self.ids[keep:]) if id is not None]
        del self.ids[keep:]
        self.length = length
        self.changes += 1
        return gone

    @property
    def _end(self):
        return len(self.ids) * self.block_size

    def __len__(self):
        return len(self.ids)
