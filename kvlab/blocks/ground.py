"""What the parts of a layer group stand on: its ledger, its storage, its tables and claims."""

from __future__ import annotations

from kvlab.blocks.claim import Claim
from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.storage import Holes, NoStorage
from kvlab.blocks.table import BlockTable
from kvlab.core import BlockId, SeqId


class Ground:
    """ledger: who may use which block. storage: what stands behind the ids. tables: blocks of each
    sequence, which the storage reads, too. claims: what a sequence has beside its table."""

    def __init__(self, ledger: BlockLedger, block_size: int, storage: NoStorage | None = None):
        self.ledger, self.block_size = ledger, block_size
        self.storage = NoStorage() if storage is None else storage
        self.tables: dict[SeqId, BlockTable] = self.storage.tables
        self.claims: dict[SeqId, Claim] = {}

    def free(self, blocks: list[BlockId]) -> None:
        if blocks:
            self.ledger.free(blocks)
            self.storage.drop(blocks)

    def holes(self, victims: list[BlockId]) -> Holes:
        """Where running sequences lose these blocks."""
        leaving = set(victims)
        found = ((seq, [i for i, block in enumerate(table.ids) if block in leaving])
                 for seq, table in self.tables.items())
        return [(seq, indices) for seq, indices in found if indices]

    def punch(self, holes: Holes) -> None:
        for seq, indices in holes:
            for index in indices:
                self.tables[seq].punch(index)
