"""Which blocks of which sequence lie in host memory."""

from __future__ import annotations

from kvlab.blocks import BlockTable
from kvlab.core import BlockId, SeqId
from kvlab.offload import NoShelf


class HostTables:
    """A second table for each sequence: host keys of a shelf where its first table has holes.

    Without offload no table ever gets a key. size: tokens of a block.
    """

    def __init__(self, shelf: NoShelf, size: int):
        self.shelf, self.size = shelf, size
        self.of: dict[SeqId, BlockTable] = {}

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        self.of[seq] = BlockTable(self.size)

    def close(self, seq: SeqId) -> None:
        self.shelf.drop(held(self.of.pop(seq)))

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child` holds what its parent holds; nothing is copied."""
        self.shelf.share(held(self.of[parent]))
        self.of[child].append(self.of[parent].ids)

    def crop(self, seq: SeqId, length: int) -> None:
        table, blocks = self.of[seq], -(-length // self.size)
        gone = [key for key in table.ids[blocks:] if key is not None]
        del table.ids[blocks:]
        table.changes += 1
        self.shelf.drop(gone)

    # ---- blocks leave and come back

    def forget(self, seq: SeqId, index: int) -> None:
        """Block `index` of `seq` is on the device again."""
        self.shelf.drop([self.of[seq].punch(index)])

    def let_go(self, seq: SeqId, blocks: int) -> None:
        """Forget the first `blocks` blocks of `seq`: nobody reads them again."""
        for index in range(min(blocks, len(self.of[seq].ids))):
            if self.of[seq].ids[index] is not None:
                self.forget(seq, index)

    def fetch(self, wanted: list[tuple[SeqId, int]], blocks: list[BlockId]) -> None:
        """Copy blocks (sequence, index) to the device; they are no longer away."""
        if wanted:
            self.shelf.fetch([self.of[seq].ids[index] for seq, index in wanted], blocks)
            for place in wanted:
                self.forget(*place)

    def key(self, seq: SeqId, index: int) -> int | None:
        ids = self.of[seq].ids
        return ids[index] if index < len(ids) else None

    def places(self, seq: SeqId, table: BlockTable, count: int) -> list[int]:
        """Where the first `count` blocks lie: device block, -2 - host key, or -1 if nowhere."""
        found = [-1 if block is None else block for block in table.ids[:count]]
        for index, key in enumerate(self.of[seq].ids[:count]):
            if key is not None:
                found[index] = -2 - key
        return found

    def source(self, seq: SeqId, index: int):
        """The function that reads block `index` of `seq`, and the id it takes."""
        return self.shelf.read, self.of[seq].ids[index]

    def note(self, seq: SeqId, index: int, key: int) -> None:
        """Block `index` of `seq` is that of `key`, which has one more who holds it."""
        table = self.of[seq]
        table.ids.extend([None] * (index + 1 - len(table.ids)))
        table.ids[index] = key
        table.changes += 1
        self.shelf.share([key])

    @property
    def blocks(self) -> int:
        """Blocks in host memory."""
        return self.shelf.live

    def check(self, waiting: list[int]) -> None:
        """Raise AssertionError unless tables and `waiting` hold exactly the keys that live."""
        self.shelf.check(waiting + [k for table in self.of.values() for k in held(table)])


def held(table: BlockTable) -> list[int]:
    """What is not a hole."""
    return [id for id in table.ids if id is not None]
