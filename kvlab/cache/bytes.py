"""What stands behind the block ids of a layer group: pool, sources, and the host."""

from __future__ import annotations

from torch import Tensor

from kvlab.blocks import BlockLedger, NoStorage
from kvlab.cache.origins import Origins
from kvlab.cache.recent import Recent
from kvlab.cache.repack import choosing
from kvlab.pool import BlockPool
from kvlab.source import Sources


class GroupBytes(NoStorage):
    """Carries out what the request protocol says, in tensors; it decides nothing.

    fresh: blocks sealed since the last step ended.
    """

    opens_single = True

    def __init__(self, ledger: BlockLedger, pool: BlockPool, spec, inv_freq: Tensor | None):
        super().__init__()
        self.pool, self.recent = pool, Recent(pool)
        self.watch, self.chooser = choosing(ledger, pool, spec, inv_freq, self.recent)
        self.sources = Sources(spec, pool, self.tables, inv_freq)
        self.host, self.entries = self.sources.host, self.sources.entries
        self.origins, self.fresh = Origins(pool), []

    @property
    def exact(self) -> bool:
        return self.pool.exact

    # ---- a step

    def take(self, step):
        opened = step.writing if step.single else step.rest
        if opened is not None and opened != step.tail:
            self.pool.open_block(opened)
        step.recent = self.recent.places(step.seq)
        if step.sealing:
            self.pool.commit(step.stored, self.begins(step))
            if not step.single:
                step.sealing_ids = self.pool.ids(step.stored)
                self.recent.begin(step, len(step.sealing))
        self.sources.begin(step)

    def begins(self, step) -> bool:
        """Whether the first block that the step seals holds the first tokens of its sequence."""
        there = step.past < self.pool.block_size and step.sealing[:1] == step.stored[:1]
        return there and self.chooser.whole(step.seq)

    def undo(self, step):
        """The old tail was never overwritten below its fill."""
        self.watch.abort()
        self.sources.abort(step)
        self.recent.abort(step)
        self.pool.drop(step.own)
        if step.tail is not None and step.sealing:
            self.pool.unseal([step.tail])

    def seal(self, step):
        self.sources.commit(step)
        if not step.sealing:
            return
        if step.single:
            self.pool.seal_open(step.sealing)
        elif step.tail is not None:
            self.pool.close_block(step.tail)
        self.recent.commit(step)
        self.fresh += step.stored

    # ---- sequences

    def open(self, seq):
        self.sources.open(seq)
        self.origins.open(seq)
        self.recent.open(seq)

    def close(self, seq):
        self.sources.close(seq)
        self.origins.close(seq)
        self.recent.close(seq)
        self.chooser.close(seq)

    def fork(self, parent, child):
        self.sources.fork(parent, child)
        self.origins.fork(parent, child)
        self.recent.fork(parent, child)
        self.chooser.fork(parent, child)

    def place(self, seq, length):
        return self.chooser.place(seq, length)

    def crop(self, seq, whole, fill):
        length = whole * self.pool.block_size + fill
        self.origins.crop(seq, whole, fill)
        self.recent.forget(seq, whole + bool(fill))
        self.chooser.crop(seq, length)
        self.sources.crop(seq, length)

    def copy_tail(self, tail, block, fill):
        layers = range(self.pool.geometry.layers)
        self.pool.open_block(block, (self.pool.read_open(n, tail, fill) for n in layers))

    def lift(self, seq, index, block, fill):
        """Exact for dense formats and in the residual, within one rounding for others, which
        `Origins` keeps at one."""
        computed = self.recent.lift(seq, index, fill)
        if computed is not None:
            return computed
        read, id = self.host.tables.source(seq, index) if block is None else (self.pool.read, block)
        contents = self.origins.contents(seq, index, fill, lambda layer: read(layer, [id]))
        if block is None:
            self.host.tables.forget(seq, index)
        return contents

    def put_down(self, seq, index, block, contents):
        self.pool.open_block(block, contents)
        self.origins.keep(seq, index, contents)

    # ---- blocks that leave and come back

    def require(self, count):
        self.host.shelf.require(count)

    def spill(self, blocks, holes):
        return self.host.leave(blocks, holes, self.tables)

    def fetch(self, keys, blocks):
        self.host.shelf.fetch(keys, blocks)

    def let_go(self, keys):
        self.host.shelf.drop(keys)

    def has(self, seq, index):
        return self.host.tables.key(seq, index) is not None

    def recall(self, wanted, blocks):
        self.host.tables.fetch(wanted, blocks)
        self.fresh += blocks

    def drop(self, blocks):
        self.watch.forget(blocks)
        self.pool.drop(blocks)

    def expire(self, seq, indices, blocks):
        self.entries.spill(seq, indices, blocks)
        for index in indices:
            self.recent.forget(seq, index, index + 1)

    def leave_behind(self, seq, blocks):
        self.host.tables.let_go(seq, blocks)

    def prune(self):
        self.origins.prune(self.tables, self.host.tables)
