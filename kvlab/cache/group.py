"""A layer group: the layers that share block ids, with their ledger, pool and tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlab.blocks import FREE, SEALED, BlockLedger, BlockTable, Chain
from kvlab.cache.away import Away
from kvlab.cache.choice import choice_for
from kvlab.cache.claim import Alone
from kvlab.cache.digests import digests_for
from kvlab.cache.past import Past
from kvlab.cache.step import Extent
from kvlab.cache.sum import Sum
from kvlab.cache.summaries import Summaries
from kvlab.cache.tables import DecodeTables, room_for
from kvlab.cache.watch import Watch
from kvlab.core import BlockId, KvlabError, OutOfBlocks, SeqId
from kvlab.kernel import attend_sdpa
from kvlab.offload import OutOfHost
from kvlab.pool import BlockPool


class LayerGroup:
    """Ledger (which block), pool (its bytes) and block tables of the layers that evict together."""

    def __init__(
        self, ledger: BlockLedger, pool: BlockPool, spec, inv_freq: Tensor | None = None
    ):
        self.ledger, self.pool, self.window = ledger, pool, spec.window
        self.block_size = pool.geometry.block_size
        self.tables: dict[SeqId, BlockTable] = {}
        self.borrowed: dict[SeqId, set[BlockId]] = {}
        self.pinned: dict[SeqId, set[BlockId]] = {}
        self.watch = Watch(ledger, pool.geometry.layers, self.block_size)
        self.summaries = Summaries(spec.summary, pool)
        segment = max(1, spec.workspace_tokens // self.block_size)
        self.away = Away(spec.offload.build(pool), pool, self.summaries)
        self.past = Past(pool, spec.window, self.watch, segment, inv_freq, self.away)
        self.decoding: DecodeTables | None = None
        self.digests = digests_for(spec.retrieval, pool, self.away)
        self.choice = choice_for(self.digests)
        self.fresh: list[BlockId] = []  # sealed since the last step ended
        self.evictions = 0
        self.share = Alone(self)

    # ---- the life of a sequence

    def open(self, seq: SeqId, chain: Chain | None = None, hit: int = 0) -> None:
        """A sequence that starts with the first `hit` whole blocks of `chain`, which are held."""
        self.tables[seq] = BlockTable(self.block_size)
        self.away.open(seq)
        self.borrowed[seq], self.pinned[seq] = set(), set()
        self.digests.open(seq)
        self.tables[seq].append(self.share.open(seq, chain, hit), hit * self.block_size)

    def close(self, seq: SeqId, done: bool = True) -> None:
        """Give back every block, tail first, so that a shared prefix outlives its suffixes.

        done: what was computed may be made known; False for a sequence that never ran.
        """
        if done:
            self.share.leave(seq)
        held = [b for b in reversed(self.tables[seq].ids) if b is not None]
        self._release(seq, held)
        self.share.close(seq)
        self.away.close(seq)
        del self.tables[seq], self.borrowed[seq], self.pinned[seq]
        self.digests.close(seq)
        if done:
            self.share.ended()

    def fork(self, parent: SeqId, child: SeqId, chain: Chain | None = None) -> None:
        """`child` shares sealed blocks of `parent` and copies its open tail; or `OutOfBlocks`."""
        source = self.tables[parent]
        fill = source.length % self.block_size
        self.make_room(1 if fill else 0)  # before the blocks are pinned that could make it
        self.open(child)
        self.share.fork(parent, child, chain)
        self.away.fork(parent, child)
        self.digests.fork(parent, child)
        table = self.tables[child]
        shared = source.ids[:-1] if fill else list(source.ids)
        held = [b for b in shared if b is not None]
        self.ledger.pin(held)
        self.borrowed[child].update(held)
        table.append(shared)
        if fill:
            table.append([self._copy_tail(source.ids[-1], fill)])
        table.length = source.length  # the last block is full or a copy of the same tail

    def prepare_crop(self, seq: SeqId, length: int) -> None:
        """Make room for the copy of a shared block that `crop` would cut.

        Raises, before anything has changed, `OutOfBlocks` if there is none, and `KvlabError` if
        the block was evicted.
        """
        table, size = self.tables[seq], self.block_size
        whole, fill = divmod(length, size)
        cut = table.ids[whole] if fill else None
        away = bool(fill) and self.away.key(seq, whole) is not None
        if fill and cut is None and not away:
            raise KvlabError(f"cannot crop to {length} tokens: block {whole} of them was evicted; "
                             f"crop to a multiple of {size}")
        dropped = [b for b in table.ids[-(-length // size) :] if b is not None]
        shared = cut is not None and self._is_shared(seq, cut)
        if (away or shared) and all(self._is_shared(seq, b) for b in dropped):
            self.ledger.pin([cut] if shared else [])  # or it might be what leaves
            try:
                self.make_room(1)
            finally:
                self.ledger.unpin([cut] if shared else [])

    def crop(self, seq: SeqId, length: int) -> None:
        """Forget all tokens from `length` on, after `prepare_crop`.

        A sealed block that is cut becomes open again from its stored contents: exact for dense
        formats, within one rounding for the others.
        """
        table, size = self.tables[seq], self.block_size
        whole, fill = divmod(length, size)
        dropped = table.ids[-(-length // size) :]
        cut = table.ids[whole] if fill else None
        was_open = table.length % size and whole == table.length // size
        self.share.crop(seq, length, not fill or was_open or self.pool.exact)
        del table.ids[-(-length // size) :]
        table.length = length
        table.changes += 1
        self.digests.crop(seq, whole)
        self._release(seq, [b for b in reversed(dropped) if b is not None])
        self.away.crop(seq, -(-length // size))
        if fill and not was_open:
            self._reopen(seq, whole, cut, fill)

    # ---- counts

    @property
    def open_tokens(self) -> int:
        return sum(t.length % self.block_size for t in self.tables.values())

    @property
    def sealed_blocks(self) -> int:
        tails = sum(bool(t.length % self.block_size) for t in self.tables.values())
        return self.ledger.held_count - tails - self.share.reserved_count

    def whole(self, seq: SeqId, count: int) -> bool:
        """Whether none of the first `count` blocks is gone: away in host memory is not."""
        table = self.tables[seq]
        return None not in table.ids[:count] or -1 not in self.away.places(seq, table, count)

    # ---- one step

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
        pool.fused.append(k, v, tails, t.open_slot, t.open_len)
        if self.choice.selects:
            return self.choice.decode(layer, q, tails, t, scale)
        mass = self.watch.mass(t, q.shape[1])
        out, lse = pool.fused.paged_decode(
            q, pool.sealed.layer(layer), pool.format, t.table, t.n_blocks, tails, t.open_slot,
            t.open_now, scale=scale, mass=mass,
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

    # ---- pieces

    def allocate(
        self, seq: SeqId | None, count: int, coming: Sequence[int] = ()
    ) -> list[BlockId]:
        """Open blocks for `seq`, with room made for them; see `make_room`."""
        self.make_room(count, coming)
        return self.ledger.allocate(count, owner=seq)

    def make_room(self, count: int, coming: Sequence[int] = ()) -> None:
        """Evict until `count` blocks are free. Raises `OutOfBlocks`; nothing changes then.

        coming: contents that will be there, as far as known; some policies choose better so.
        """
        capacity = self.ledger.capacity
        short = 0 if capacity is None else count - (capacity - self.ledger.held_count)
        if short > self.ledger.evictable_count:
            raise OutOfBlocks(count, capacity - self.ledger.held_count, capacity)
        if short > 0:
            self.evict(short, coming[-short:])

    def evict(self, count: int, coming: Sequence[int] = ()) -> None:
        """Choose, spill, free: `count` blocks leave. Raises `OutOfHost`; nothing changes then."""
        spills = self.share.make_host_room(count)
        victims = self.ledger.reclaim(count, coming)
        self.share.gone(victims)
        if spills:
            tables = {} if self.share.hold else self.tables
            self.away.leave(victims, tables, self.share.spilled)
        self.ledger.free(victims)
        self._drop(victims)
        self.evictions += count

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

    def _bring(self, wanted: list[tuple[SeqId, int]]) -> None:
        """Blocks come back from host memory, and others leave for them."""
        wanted = wanted[: self.ledger.evictable_count]
        try:
            self.make_room(len(wanted))
        except OutOfHost:  # for a moment both would be there; what stays away is read there
            return
        blocks = self.ledger.allocate(len(wanted))
        self.away.fetch(wanted, blocks)
        for (seq, index), block in zip(wanted, blocks):
            self.tables[seq].fill(index, block)
        self.ledger.seal(blocks, depth=[index for _, index in wanted])
        self.fresh += blocks

    def _slide(self, seq: SeqId) -> None:
        """Move the window's pins to the end of the sequence; free what it can never read again."""
        table = self.tables[seq]
        safe = table.touched(self.window.protected(table.length))
        keep = {b for b in safe if self.ledger.state(b) == SEALED}
        self.ledger.pin(sorted(keep - self.pinned[seq]))
        self.ledger.unpin(sorted(self.pinned[seq] - keep))
        self.pinned[seq] = keep
        ranges = self.window.readable(table.length)
        if ranges == [(0, table.length)]:
            return
        readable = table.touched(ranges)
        gone = [i for i, b in enumerate(table.ids) if b is not None and b not in readable]
        self.summaries.spill(seq, gone, [table.ids[i] for i in gone])
        self._release(seq, [table.punch(i) for i in reversed(gone)])
        self.evictions += len(gone)

    def _drop(self, blocks: list[BlockId]) -> None:
        self.watch.forget(blocks)
        self.pool.drop(blocks)

    def _release(self, seq: SeqId, blocks: list[BlockId]) -> None:
        borrowed, pinned = self.borrowed[seq], self.pinned[seq]
        self.ledger.unpin([b for b in blocks if b in pinned])
        pinned.difference_update(blocks)
        own = [b for b in blocks if b not in borrowed and not self.share.owns(b)]
        self.ledger.free(own)
        self.ledger.unpin([b for b in blocks if b in borrowed])
        borrowed.difference_update(blocks)
        self._drop([b for b in blocks if self.ledger.state(b) == FREE])

    def _is_shared(self, seq: SeqId, block: BlockId) -> bool:
        return block in self.borrowed[seq] or self.share.owns(block)

    def swap(self, seq: SeqId, index: int, known: BlockId) -> None:
        """Read a content from the block that held it first, and give the sequence's own back."""
        table, claim = self.tables[seq], self.share.claims[seq]
        own, table.ids[index] = table.ids[index], known
        table.changes += 1
        if self.share.hold:
            if claim.kept.get(index) == known:
                del claim.kept[index]
            else:
                self.ledger.pin([known])
            self.borrowed[seq].add(known)
        self.ledger.free([own])
        self._drop([own])

    def drop_known(self, spill: bool = False) -> int:
        """Free the shared blocks that no sequence and no handle uses; `spill` them to the host."""
        used = {b for table in self.tables.values() for b in table.ids}
        idle = [b for b in sorted(self.share.known - used) if not self.ledger.meta(b).pins]
        if not idle:
            return 0
        spill = spill and self.share.make_host_room(len(idle))
        self.share.gone(idle)
        if spill:
            self.away.leave(idle, {}, self.share.spilled)
        self.ledger.free(idle)
        self._drop(idle)
        return len(idle)

    def _copy_tail(self, tail: BlockId, fill: int) -> BlockId:
        (block,) = self.allocate(None, 1)
        layers = range(self.pool.geometry.layers)
        self.pool.open_block(block, (self.pool.read_open(n, tail, fill) for n in layers))
        return block

    def _reopen(self, seq: SeqId, index: int, cut: BlockId | None, fill: int) -> None:
        """Read first, release, then allocate: in a full cache the block takes its own place."""
        layers = range(self.pool.geometry.layers)
        read, id = self.away.source(seq, index) if cut is None else (self.pool.read, cut)
        contents = [[x[:fill].clone() for x in read(n, [id])] for n in layers]
        self.tables[seq].ids[index] = None
        if cut is None:
            self.away.forget(seq, index)
        else:
            self._release(seq, [cut])
        (self.tables[seq].ids[index],) = (block,) = self.allocate(seq, 1)
        self.tables[seq].changes += 1
        self.pool.open_block(block, contents)
