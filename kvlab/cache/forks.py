"""How a sequence of a layer group becomes two: all of it or nothing."""

from __future__ import annotations

from kvlab.blocks import Chain
from kvlab.core import BlockId, SeqId


class Forks:
    """The part of `Holding` that forks."""

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
        self.away.fork(parent, child)
        self.digests.fork(parent, child)
        shared = source.ids[:-1] if fill else list(source.ids)
        held = [b for b in shared if b is not None]
        self.ledger.pin(held)
        self.borrowed[child].update(held)
        table.append(shared)
        if fill:
            table.append([self._copy_tail(source.ids[-1], fill)])
        table.length = source.length  # the last block is full or a copy of the same tail

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
