"""A layer group: the layers that share block ids, one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import SEALED
from kvlab.cache.holding import Holding
from kvlab.cache.step import Extent
from kvlab.cache.sum import Sum
from kvlab.cache.tables import DecodeTables, room_for
from kvlab.core import BlockId, SeqId
from kvlab.kernel import attend_sdpa


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
        self.digests.begin(e, self.tables[e.seq])

    def prepare(self, extents: list[Extent]) -> None:
        """Bring the device tables up to date for a step of one token in every row."""
        rows = len(extents)
        longest = max((e.past // self.block_size for e in extents), default=0)
        if self.decoding is None or not self.decoding.fits(rows, longest):
            self.decoding = DecodeTables(rows, room_for(longest), self.pool.device)
        open_rows = [self.pool.open_row(e.writing) for e in extents]
        self.decoding.refresh(extents, self.tables, open_rows)
        self.away.prepare(extents)
        self.choice.prepare(extents, self.tables)

    def in_place(self) -> list:
        """What `prepare` overwrites for the kernels; a captured step ends with any of them."""
        return [self.decoding, self.away.decoding, self.choice.candidates]

    def attend(
        self, layer: int, e: Extent, q: Tensor, k: Tensor, v: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of the step's queries over past and step, fp32 [Hq, T, D]; stores k and v.

        q [Hq, T, D], k and v [T, H, D]; window: the model's own sliding window in tokens.
        """
        total = Sum(self.pool.fused)
        reader = self.choice if self.choice.applies(e, window) else self.past
        reader.attend(layer, e, self.tables[e.seq], q, scale, window, total)
        self.summaries.attend(layer, e.seq, q, scale, window, total)
        span = {"scale": scale, "window": window, "q_start": e.past}
        first, keys, values = e.past, k, v
        if e.fill:
            tail = self.pool.read_open(layer, e.tail, e.fill)
            if e.single:  # one query sees tail and itself: one segment instead of two
                first, keys, values = e.past - e.fill, *map(torch.cat, zip(tail, (k, v)))
            else:
                start = e.past - e.fill
                total.add(attend_sdpa.attend(q, *tail, k_start=start, **span))
        total.add(attend_sdpa.attend(q, keys, values, causal=not e.single, k_start=first, **span))
        if e.sealing and not e.single:
            whole = tuple(map(torch.cat, zip(tail, (k, v)))) if e.fill else (k, v)
            self.watch.sealing(e.sealing, q, *whole, scale)
            self._seal(layer, e, *whole)
        else:
            self.pool.write(layer, e.writing if e.single else e.rest, e.fill, k, v)
        out, lse = total.result()
        self.watch.layer(lse)
        self.summaries.observe(layer, e.seq, q, lse, scale)
        return out

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One token per row through the kernels, [B, Hq, D]; `prepare` came before.

        q [B, Hq, D], k and v [B, H, D], contiguous. Waits for nothing and depends on nothing but
        tensors that stay in place, so it may be captured.
        """
        pool, t = self.pool, self.decoding
        tails = pool.open.layer(layer)
        if self.choice.selects:
            pool.fused.append(k, v, tails, t.open_slot, t.open_len)
            return self.choice.decode(layer, q, tails, t, scale)
        mass = self.watch.mass(t, q.shape[1])
        out, lse = pool.fused.paged_decode(
            q, pool.sealed.layer(layer), pool.format, t.table, t.n_blocks, tails, t.open_slot,
            t.open_now, scale=scale, mass=mass, new=(k, v),
        )
        out = self.away.decode(layer, q, out, lse, mass, scale)
        self.watch.decoded(t, mass)
        return out

    def commit(self, e: Extent) -> None:
        """Make the step's blocks part of the sequence."""
        table = self.tables[e.seq]
        table.append(e.new, e.count)
        table.changes += bool(e.sealing)
        self.digests.commit(e, table)
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
        self._bring(self.choice.tell(self.watch, self.tables))
        self.watch.commit([b for b in fresh if self.ledger.state(b) == SEALED])
        self.share.end_step()

    def abort(self, e: Extent) -> None:
        """Undo `begin`, but for evictions: the old tail was never overwritten below its fill."""
        self.watch.abort()
        self.choice.abort()
        self.digests.abort(e)
        own = [b for b in e.new if b not in e.adopted]
        self.pool.drop(own)
        self.share.give_back(e.seq, own)
        if e.tail is not None and e.sealing:
            self.pool.sealed.drop([e.tail])

    def store(self, layer: int, e: Extent, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values [T, H, D] of a chunk without attending."""
        if e.sealing and not e.single:
            tail = self.pool.read_open(layer, e.tail, e.fill) if e.fill else ()
            self._seal(layer, e, *(map(torch.cat, zip(tail, (k, v))) if e.fill else (k, v)))
        else:
            self.pool.write(layer, e.writing if e.single else e.rest, e.fill, k, v)

    def _seal(self, layer: int, e: Extent, k: Tensor, v: Tensor) -> None:
        """Seal what a chunk fills and keep the rest; k, v [n, H, D]: open tail and new tokens."""
        cut = len(e.sealing) * self.block_size
        self.digests.seal(layer, e, k[:cut])
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
            of(table.length) for of in (self.window.protected, self.window.readable)
        )
        spans = table.spans(protected), table.spans(readable)
        if self._slid.get(seq) == (table.changes, spans):
            return
        self._pin(seq, table.touched(protected))
        if readable != [(0, table.length)]:
            self._free_unreadable(seq, table.touched(readable))
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
