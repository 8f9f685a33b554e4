"""A layer group: the layers that share block ids, one step at a time."""

from __future__ import annotations

from torch import Tensor

from kvlab.blocks import SEALED
from kvlab.cache.holding import Holding
from kvlab.core import BlockId, SeqId
from kvlab.source import Ask, Extent, Read, Sum, Token, merged


class LayerGroup(Holding):
    """What a step does in the layers that evict together."""

    def needs(self, seq: SeqId, count: int) -> list[int]:
        """Logical blocks to be allocated for `count` more tokens of `seq`."""
        return self.share.wanted(seq, *self._span(seq, count))

    def _span(self, seq: SeqId, count: int) -> tuple[int, int, int]:
        """Logical blocks [first, stop) that a step adds; below `whole` it computes them whole."""
        length, size = self.tables[seq].length, self.block_size
        whole = (length + count) // size if count > 1 else 0
        return -(-length // size), -(-(length + count) // size), whole

    def begin(self, seq: SeqId, count: int) -> Extent:
        """Find room for `count` new tokens of `seq`. Raises `OutOfBlocks`, or what the allocator
        raises; nothing changes then."""
        table, size = self.tables[seq], self.block_size
        past, fill = table.length, table.length % size
        full, rest_count = divmod(fill + count, size)
        tail = table.ids[-1] if fill else None
        new, adopted = self.share.take(seq, *self._span(seq, count))
        ids = ([tail] if fill else []) + new
        rest = ids[full] if rest_count else None
        e = Extent(seq, past, fill, count, tail, new, ids[:full], rest, rest_count, adopted)
        try:
            self._take_memory(e)
        except BaseException:  # the allocator's, too
            self.abort(e)
            raise
        return e

    def _take_memory(self, e: Extent) -> None:
        """All memory that the step's blocks need, now: `commit` must not fail."""
        opened = e.writing if e.single else e.rest
        if opened is not None and opened != e.tail:
            self.pool.open_block(opened)
        self.pool.sealed.commit(e.stored)
        if e.sealing and not e.single:
            e.sealing_ids = self.pool.ids(e.stored)
        self.sources.begin(e)

    def attend(self, ask: Ask) -> Tensor:
        """Attention of the step's queries over all sources, fp32 [Hq, T, Dv]; stores k and v."""
        self.sliding.check_reach(ask.extent.seq, ask.extent.past, ask.window)
        total = self.over_sources(ask)
        self.store(ask)
        out, lse = total.result()
        self.watch.layer(lse)
        self.sources.observe(ask, lse)
        return out

    def over_sources(self, ask: Ask) -> Sum:
        """The running result of all that there is to read."""
        total = Sum(self.pool.fused, ask.sinks)
        for source in self.sources.readers:
            for part in source.parts(ask):
                if part.blocks:
                    q = ask.q if part.queries is None else part.queries
                    self.watch.segment(part.blocks, q, part.keys, part.values, ask.scale)
                total.add(part.attend(ask))
        return total

    def look(self, ask: Ask) -> Tensor:
        """The same for queries of padding, `ask.before`: nothing is stored, no policy hears."""
        total = Sum(None, ask.sinks)
        for source in self.sources.readers:
            for part in source.parts(ask):
                total.add(part.attend(ask))
        return total.result()[0]

    def settled(self, ask: Token, reads: list[Read], sinks: Tensor | None) -> Tensor:
        """Parts of a decode step merged, [B, Hq, D]; policies and sources hear of them."""
        out, lse = merged(reads, self.sources.observed, sinks)
        for read in reads:
            self.watch.decoded(ask.tables, read.mass)
        if self.sources.observed:
            for row in range(len(ask.extents)):
                self.sources.observe(ask.row(row), lse[row, :, None])
        return out

    def check_window(self, window: int) -> None:
        """Raises `BadInput` where what is held cannot be read through a model's own window."""

    def commit(self, e: Extent) -> None:
        """Make the step's blocks part of the sequence."""
        table = self.tables[e.seq]
        table.append(e.new, e.count)
        table.changes += bool(e.sealing)
        self.sources.commit(e)
        if e.single:
            self.pool.seal_open(e.sealing)
        elif e.tail is not None and e.sealing:
            self.pool.close_block(e.tail)
        self.share.sealed(e)
        self.fresh += e.stored
        self._slide(e.seq)

    def end_step(self) -> None:
        """After all sequences of a step: what was attended to, and the policy's clock."""
        fresh, self.fresh = self.fresh, []
        self._bring(self.sources.tell(self.watch))
        self.watch.commit([b for b in fresh if self.ledger.state(b) == SEALED])
        self.share.end_step()

    def abort(self, e: Extent) -> None:
        """Undo `begin`, but for evictions: the old tail was never overwritten below its fill."""
        self.watch.abort()
        self.sources.abort(e)
        own = [b for b in e.new if b not in e.adopted]
        self.pool.drop(own)
        self.share.give_back(e.seq, own)
        if e.tail is not None and e.sealing:
            self.pool.sealed.drop([e.tail])

    def store(self, ask: Ask) -> None:
        """Keep the step's own tokens: full blocks of a chunk are sealed, the rest stays open."""
        layer, e = ask.layer, ask.extent
        if not e.sealing or e.single:
            self.pool.write(layer, e.writing if e.single else e.rest, e.fill, ask.k, ask.v)
            return
        k, v = self.sources.tail.joined(layer, e, ask.k, ask.v)
        if ask.q is not None:
            self.watch.sealing(e.sealing, ask.q, k, v, ask.scale)
        self._seal(layer, e, k, v)

    def _seal(self, layer: int, e: Extent, k: Tensor, v: Tensor) -> None:
        """Seal what a chunk fills and keep the rest; k, v [n, H, D]: open tail and new tokens."""
        cut = len(e.sealing) * self.block_size
        self.sources.sealing(layer, e, k[:cut])
        if e.stored:
            new = e.without_adopted(k[:cut], v[:cut])
            self.pool.seal(layer, e.stored, *new, e.sealing_ids)
        if e.rest is not None:
            self.pool.write(layer, e.rest, 0, k[cut:], v[cut:])

    # ---- the window

    def _slide(self, seq: SeqId) -> None:
        """Move the window's pins to the end of the sequence; free what it can never read again.

        Most steps move it within a block and change nothing: those do not look at the table, which
        grows with every block seen.
        """
        table = self.tables[seq]
        protected, readable = (
            self.sliding.within(of(table.length), table.length)
            for of in (self.window.protected, self.window.readable)
        )
        spans = table.spans(protected), table.spans(readable)
        if self._slid.get(seq) == (table.changes, spans):
            return
        self._pin(seq, table.touched(protected))
        if readable != [(0, table.length)]:
            self._free_unreadable(seq, table.touched(readable))
            self.sources.host.let_go(seq, self.sliding.slid(seq, table.length))
        self._slid[seq] = table.changes, spans

    def _pin(self, seq: SeqId, safe: set[BlockId]) -> None:
        keep = {b for b in safe if self.ledger.state(b) == SEALED}
        self.ledger.pin(sorted(keep - self.pinned[seq]))
        self.ledger.unpin(sorted(self.pinned[seq] - keep))
        self.pinned[seq] = keep

    def _free_unreadable(self, seq: SeqId, readable: set[BlockId]) -> None:
        table = self.tables[seq]
        gone = [i for i, b in enumerate(table.ids) if b is not None and b not in readable]
        self.summaries.spill(seq, gone, [table.ids[i] for i in gone])
        self._release(seq, [table.punch(i) for i in reversed(gone)])
        self.origins.prune(self.tables, self.away)
        self.evictions += len(gone)
