"""Which blocks the sequences of a layer group hold: how they come, shrink, are shared and go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvlab.blocks import FREE, BlockLedger, BlockTable, Chain
from kvlab.cache.claim import Alone
from kvlab.cache.copies import rebuilt
from kvlab.cache.forks import Forks
from kvlab.cache.origins import Origins
from kvlab.cache.repack import choosing
from kvlab.cache.sliding import Sliding
from kvlab.core import BlockId, KvlabError, OutOfBlocks, SeqId
from kvlab.offload import OutOfHost
from kvlab.pool import BlockPool
from kvlab.source import Sources


class Holding(Forks):
    """Ledger (which block), pool (its bytes) and block tables of the layers that evict together."""

    def __init__(
        self, ledger: BlockLedger, pool: BlockPool, spec, inv_freq: Tensor | None = None
    ):
        self.ledger, self.pool, self.window = ledger, pool, spec.window
        self.block_size = pool.geometry.block_size
        self.tables: dict[SeqId, BlockTable] = {}
        self.borrowed: dict[SeqId, set[BlockId]] = {}
        self.pinned: dict[SeqId, set[BlockId]] = {}
        self._slid: dict[SeqId, tuple] = {}  # what the window last acted on
        own = None if spec.prefix.shares else pool.shape.window
        self.sliding = Sliding(own, self.block_size)
        self.watch, self.chooser = choosing(ledger, pool, spec, inv_freq)
        self.sources = Sources(spec, pool, self.tables, inv_freq)
        self.away, self.summaries = self.sources.host, self.sources.entries
        self.origins = Origins(pool)
        self.fresh: list[BlockId] = []  # sealed since the last step ended
        self.evictions = 0
        self.share = Alone(self)

    def __deepcopy__(self, memo: dict):
        return rebuilt(self, memo)

    # ---- the life of a sequence

    def open(self, seq: SeqId, chain: Chain | None = None, hit: int = 0) -> None:
        """A sequence that starts with the first `hit` whole blocks of `chain`, which are held."""
        self.tables[seq] = BlockTable(self.block_size)
        self.sources.open(seq)
        self.origins.open(seq)
        self.sliding.open(seq)
        self.borrowed[seq], self.pinned[seq] = set(), set()
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
        self.sources.close(seq)
        self.origins.close(seq)
        del self.tables[seq], self.borrowed[seq], self.pinned[seq]
        self.chooser.close(seq)
        self._slid.pop(seq, None)
        self.sliding.close(seq)
        if done:
            self.share.ended()

    def check_crop(self, seq: SeqId, length: int) -> None:
        """Raises `KvlabError` if the block that `crop` would cut was evicted, or what the next
        token sees behind it has left the model's own window."""
        self.sliding.check_crop(seq, length)
        whole, fill = divmod(length, self.block_size)
        gone = fill and self.tables[seq].ids[whole] is None
        if gone and self.away.key(seq, whole) is None:
            raise KvlabError(f"cannot crop to {length} tokens: block {whole} of them was evicted; "
                             f"crop to a multiple of {self.block_size}")

    def crop(self, seq: SeqId, length: int) -> None:
        """Forget all tokens from `length` on, after `make_crop_room`.

        A sealed block that is cut becomes open again from its stored contents: exact for dense
        formats, within one rounding for the others, which `Origins` keeps at one.
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
        self.origins.crop(seq, whole, fill)
        self.chooser.crop(seq, length)
        self._release(seq, [b for b in reversed(dropped) if b is not None])
        self.sources.crop(seq, length)
        if fill and not was_open:
            self._reopen(seq, whole, cut, fill)

    def repack(self, seq: SeqId, over: int, seen: int) -> None:
        """Give up `over` blocks' worth of the sealed tokens of `seq`, of the `seen` so far."""
        self._release(seq, self.chooser.run(seq, self.tables[seq], over, seen)[::-1])
        self.evictions += over

    # ---- counts

    @property
    def open_tokens(self) -> int:
        return sum(t.length % self.block_size for t in self.tables.values())

    @property
    def sealed_blocks(self) -> int:
        tails = sum(bool(t.length % self.block_size) for t in self.tables.values())
        return self.ledger.held_count - tails - self.share.reserved_count

    @property
    def read_tokens(self) -> int:
        """Tokens that a head reads for the next token of every sequence."""
        return sum(map(self.sources.past.reads, self.tables.values()))

    def whole(self, seq: SeqId, count: int) -> bool:
        """Whether none of the first `count` blocks is gone: away in host memory is not."""
        table = self.tables[seq]
        return None not in table.ids[:count] or -1 not in self.away.places(seq, table, count)

    # ---- room

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
        short = self.short_of(count)
        if short > 0:
            self.evict(short, coming[-short:])

    def short_of(self, count: int) -> int:
        """Blocks to evict before `count` are free. Raises `OutOfBlocks` if too few can be."""
        capacity, held = self.ledger.capacity, self.ledger.held_count
        short = 0 if capacity is None else max(0, count - (capacity - held))
        if short > self.ledger.evictable_count:
            raise OutOfBlocks(count, capacity - held, capacity)
        return short

    def evict(self, count: int, coming: Sequence[int] = ()) -> None:
        """Choose, spill, free: `count` blocks leave. Raises `OutOfHost`; nothing changes then."""
        spills = self.share.make_host_room(count)
        victims = self.ledger.reclaim(count, coming)
        self.share.gone(victims)
        if spills:
            tables = {} if self.share.hold else self.tables
            self.away.leave(victims, tables, self.share.spilled)
        self.free(victims)
        self.origins.prune(self.tables, self.away)
        self.evictions += count

    def drop_known(self, spill: bool = False) -> int:
        """Free the shared blocks that nobody uses; `spill` them to the host."""
        idle = self.idle(self.share.known)
        if not idle:
            return 0
        spill = spill and self.share.make_host_room(len(idle))
        self.share.gone(idle)
        if spill:
            self.away.leave(idle, {}, self.share.spilled)
        self.free(idle)
        return len(idle)

    def idle(self, blocks: set[BlockId]) -> list[BlockId]:
        """Those of `blocks` that no sequence and no handle uses."""
        used = {b for table in self.tables.values() for b in table.ids}
        return [b for b in sorted(blocks - used) if not self.ledger.meta(b).pins]

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

    # ---- blocks

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
        self.free([own])

    def free(self, blocks: list[BlockId]) -> None:
        self.ledger.free(blocks)
        self._drop(blocks)

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

    def _reopen(self, seq: SeqId, index: int, cut: BlockId | None, fill: int) -> None:
        """Read first, release, then allocate: in a full cache the block takes its own place."""
        read, id = self.away.source(seq, index) if cut is None else (self.pool.read, cut)
        contents = self.origins.contents(seq, index, fill, lambda layer: read(layer, [id]))
        self.tables[seq].ids[index] = None
        if cut is None:
            self.away.forget(seq, index)
        else:
            self._release(seq, [cut])
        (self.tables[seq].ids[index],) = (block,) = self.allocate(seq, 1)
        self.tables[seq].changes += 1
        self.pool.open_block(block, contents)
        self.origins.keep(seq, index, contents)
