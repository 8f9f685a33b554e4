"""Which blocks the sequences of a layer group hold: how they come, are written, and go."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.blocks import sliding
from kvlab.blocks.alone import Alone
from kvlab.blocks.chain import Chain
from kvlab.blocks.claim import Claim
from kvlab.blocks.names import Names
from kvlab.blocks.step import Step
from kvlab.blocks.table import BlockTable
from kvlab.core import BlockId, SeqId
from kvlab.policy import Moment
from kvlab.window import NoWindow


class Holding:
    """The request protocol of one layer group; `Sequences` runs it over all of them.

    sharing: the member of axis prefix at work (`Alone`, `Shared`, `Serving`): what is found, kept
    and made known; with it come the ground that all stand on, who makes room, and what is known.
    window: what stays pinned and what may be read. record: the kind of `Step` that the storage
    wants. reach: the model's own window, see `first_seen`, if it has one and nobody else begins
    with what leaves it. residual: the newest tokens, in whole blocks before the open tail, that a
    policy may not choose.
    """

    def __init__(
        self, sharing: Alone, window: NoWindow | None = None, record: type[Step] = Step,
        reach: int | None = None, residual: int = 0,
    ):
        ground = sharing.ground
        self.sharing, self.room, self.known = sharing, sharing.room, sharing.known
        self.ground, self.ledger, self.storage = ground, ground.ledger, ground.storage
        self.tables, self.claims, self.block_size = ground.tables, ground.claims, ground.block_size
        self.window, self.record, self.reach = window or NoWindow(), record, reach
        self.residual = residual
        no_window = reach is None and type(self.window) is NoWindow
        self._still = no_window and not residual  # nothing ever slides

    # ---- a sequence comes

    def hear(self, moment: Moment) -> list[int]:
        """A request comes; the contents that policies give up for their age."""
        self.known.tier.hear(moment)
        return self.room.hear(moment)

    def enter(self, seq: SeqId, chain: Chain | Names | None, near: int) -> None:
        """A sequence that starts with the first `near` whole blocks of `chain`, which are held."""
        self.tables[seq] = BlockTable(self.block_size)
        self.claims[seq] = Claim(chain)
        self.storage.open(seq)
        self.sharing.enter(seq, near)

    def reserve(self, seq: SeqId, first: int, stop: int) -> list[int]:
        """Set blocks aside for logical blocks [first, stop); the contents that left for them.

        Raises `OutOfBlocks`.
        """
        claim = self.claims[seq]
        missing = range(first, stop)
        if claim.kept:
            missing = [i for i in missing if i not in claim.kept]
        self.sharing.claim_away(seq, first, len(missing))
        gone = self.room.make(len(missing), self.sharing.coming(seq, missing))
        claim.reserved = self.ledger.allocate(len(missing), seq)
        return gone

    # ---- a step

    def wanted(self, seq: SeqId, first: int, stop: int, whole: int) -> Sequence[int]:
        """Which of the logical blocks [first, stop) have to be allocated.

        whole: blocks below it are sealed within the step, so a kept one can take its place.
        """
        claim, own = self.claims[seq], range(first, stop)
        if claim.kept:
            own = [i for i in own if i >= whole or i not in claim.kept]
        return own[len(claim.reserved) :]

    def needs(self, seq: SeqId, count: int) -> Sequence[int]:
        """Logical blocks to be allocated for `count` more tokens of `seq`."""
        return self.wanted(seq, *self._span(seq, count))

    def _span(self, seq: SeqId, count: int) -> tuple[int, int, int]:
        """Logical blocks [first, stop) that a step adds; below `whole` it computes them whole."""
        length, size = self.tables[seq].length, self.block_size
        whole = 0 if count == 1 and self.storage.opens_single else (length + count) // size
        return -(-length // size), -(-(length + count) // size), whole

    def step(self, seq: SeqId, count: int) -> Step:
        """Find room for `count` new tokens of `seq`. Raises `OutOfBlocks`, or what the storage
        raises; nothing but evictions has happened then."""
        table, size = self.tables[seq], self.block_size
        past, fill = table.length, table.length % size
        full, rest_count = divmod(fill + count, size)
        tail = table.ids[-1] if fill else None
        ahead = len(self.claims[seq].reserved)
        new, adopted = self._take(seq, *self._span(seq, count))
        ids = [tail, *new] if fill else new
        rest = ids[full] if rest_count else None
        return self.backed(self.record(
            seq, past, fill, count, tail, new, ids[:full], rest, rest_count, adopted, ahead
        ))

    def backed(self, step: Step) -> Step:
        """The same with all memory that it needs, or undone."""
        try:
            self.storage.take(step)
        except BaseException:  # the allocator's errors, too
            self.abort(step)
            raise
        return step

    def _take(self, seq, first, stop, whole) -> tuple[list[BlockId], frozenset[BlockId]]:
        """Blocks for logical [first, stop), and which of them are kept ones, sealed already."""
        claim = self.claims[seq]
        short = self.wanted(seq, first, stop, whole)
        own = claim.reserved
        if short:
            own = own + self.room.allocate(seq, len(short), self.sharing.coming(seq, short))
        kept = claim.kept
        adopted = {i: kept[i] for i in range(first, min(stop, whole)) if i in kept} if kept else {}
        count = stop - first - len(adopted)
        claim.reserved = own[count:]
        if not adopted:
            return own[:count], frozenset()
        rest = iter(own[:count])
        ids = [adopted[i] if i in adopted else next(rest) for i in range(first, stop)]
        return ids, frozenset(adopted.values())

    def commit(self, step: Step, publish: bool = True) -> None:
        """Make the step's blocks part of the sequence. publish: and known, where they may be."""
        table = self.tables[step.seq]
        table.append(step.new, step.count)
        table.changes += bool(step.sealing)
        self.storage.seal(step)
        self.sharing.sealed(step, publish)
        if not self._still:
            sliding.slide(self, step.seq)

    def abort(self, step: Step) -> None:
        """Undo `step`, but for evictions."""
        claim, own = self.claims[step.seq], step.own
        self.storage.undo(step)
        claim.reserved = own[: step.ahead] + claim.reserved
        self.ledger.free(own[step.ahead :])

    # ---- a sequence goes

    def close(self, seq: SeqId, done: bool = True) -> None:
        """Give back every block, tail first, so that a shared prefix outlives its suffixes.

        done: what was computed may be made known; False for a sequence that never ran.
        """
        self.sharing.leave(seq, done)
        claim, way = self.claims[seq], -1 if done else 1  # what never ran goes as it came
        self.release(seq, [b for b in self.tables[seq].ids[::way] if b is not None])
        if claim.kept:
            self.ledger.unpin(list(claim.kept.values())[::way])
        if claim.reserved:
            self.ledger.free(claim.reserved)
        self.storage.close(seq)
        del self.tables[seq], self.claims[seq]
        if done:
            self.sharing.left()

    def release(self, seq: SeqId, blocks: list[BlockId]) -> None:
        """The sequence lets go of blocks of its table."""
        claim, ledger = self.claims[seq], self.ledger
        if claim.pinned:
            self.storage.drop(ledger.unpin([b for b in blocks if b in claim.pinned]))
            claim.pinned.difference_update(blocks)
        borrowed, rest = claim.borrowed, blocks
        if borrowed:
            rest = [b for b in blocks if b not in borrowed]
        freed = ledger.free(self.known.mortal(rest))
        if len(rest) < len(blocks):
            freed += ledger.unpin([b for b in blocks if b in borrowed])
            borrowed.difference_update(blocks)
        self.storage.drop(freed)

    def whole(self, seq: SeqId, count: int) -> bool:
        """Whether none of the first `count` blocks is gone: away in host memory is not."""
        ids = self.tables[seq].ids[:count]
        return None not in ids or all(
            self.storage.has(seq, i) for i, block in enumerate(ids) if block is None
        )

    # ---- accounts

    @property
    def reserved_count(self) -> int:
        return sum(len(c.reserved) for c in self.claims.values())

    def extra(self) -> set[BlockId]:
        """Held blocks that may be in no table."""
        own = {b for c in self.claims.values() for b in (*c.reserved, *c.kept.values())}
        return own.union(self.known.blocks, self.known.orphans)

    def check(self) -> None:
        """Raise AssertionError where ledger, tables and claims contradict each other."""
        self.ledger.check()
        held = {b for t in self.tables.values() for b in t.ids if b is not None} | self.extra()
        assert len(held) == self.ledger.held_count, (
            f"{len(held)} blocks in tables, {self.ledger.held_count} held"
        )
