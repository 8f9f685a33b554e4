"""Sequences of a layer group that share blocks: how one becomes two, and what a crop of one takes.

All of it or nothing.
"""

from __future__ import annotations

from collections import Counter

from kvlab.blocks import Chain
from kvlab.core import BlockId, SeqId


class Forks:
    """The part of `Holding` that forks, and makes room where forks are cut."""

    def fork(self, parent: SeqId, child: SeqId, chain: Chain | None = None) -> None:
        """`child` shares sealed blocks of `parent` and copies its open tail, for which there is
        room. An error of the allocator leaves everything as it was.
        """
        self.open(child)
        try:
            self._inherit(parent, child, chain)
        except BaseException:  # an interrupt, too
            self.close(child, done=False)
            raise

    def _inherit(self, parent: SeqId, child: SeqId, chain: Chain | None) -> None:
        source, table = self.tables[parent], self.tables[child]
        fill = source.length % self.block_size
        self.share.fork(parent, child, chain)
        self.sliding.fork(parent, child)
        self.sources.fork(parent, child)
        shared = source.ids[:-1] if fill else list(source.ids)
        held = [b for b in shared if b is not None]
        self.ledger.pin(held)
        self.borrowed[child].update(held)
        table.append(shared)
        if fill:
            table.append([self._copy_tail(source.ids[-1], fill)])
        table.length = source.length  # the last block is full or a copy of the same tail
        self.origins.fork(parent, child)
        self.chooser.fork(parent, child)

    def _copy_tail(self, tail: BlockId, fill: int) -> BlockId:
        (block,) = self.allocate(None, 1)
        layers = range(self.pool.geometry.layers)
        try:
            self.pool.open_block(block, (self.pool.read_open(n, tail, fill) for n in layers))
        except BaseException:
            self.pool.drop([block])
            self.ledger.free([block])
            raise
        return block

    def make_crop_room(self, lengths: dict[SeqId, int]) -> None:
        """Make room for the open copies of the sealed blocks that these crops cut, in this order.

        A crop gives its blocks back before it takes one, but what another sequence holds does not
        come free. Raises `OutOfBlocks` before anything has changed.
        """
        given: Counter[BlockId] = Counter()
        kept, short, most = [], 0, 0
        for seq, length in lengths.items():
            ids = self.tables[seq].ids[length // self.block_size :]
            held = [b for b in ids if b is not None]
            cuts = self._reopens(seq, length)
            freed = [b for b in held[self._stays_open(seq, length) :] if self._frees(seq, b, given)]
            short += cuts - len(freed)
            most = max(most, short)
            kept += freed + held[:cuts]  # what is still to be read, and what is counted on
        self.ledger.pin(kept)
        try:
            self.make_room(most)
        finally:
            self.ledger.unpin(kept)

    def _stays_open(self, seq: SeqId, length: int) -> bool:
        """Whether a crop ends within the open tail, which stays where it is."""
        fill, old = length % self.block_size, self.tables[seq].length
        same = length // self.block_size == old // self.block_size
        return bool(fill and old % self.block_size and same)

    def _reopens(self, seq: SeqId, length: int) -> bool:
        return length % self.block_size > 0 and not self._stays_open(seq, length)

    def _frees(self, seq: SeqId, block: BlockId, given: Counter[BlockId]) -> bool:
        """Whether `block` is free once `seq` lets go of it as others have; counts that in."""
        meta = self.ledger.meta(block)
        owned = block in self.borrowed[seq] or not self.share.owns(block)
        given[block] += owned + (block in self.pinned[seq])
        return given[block] == meta.pins + (not meta.doomed)
