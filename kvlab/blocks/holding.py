"""Which blocks the sequences of a layer group hold: how they come, are written, and go."""

from __future__ import annotations

from collections.abc import Sequence, Set

from kvlab.blocks import forks, sliding
from kvlab.blocks.chain import Chain
from kvlab.blocks.claim import Claim
from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.names import Names
from kvlab.blocks.room import Room
from kvlab.blocks.step import Step
from kvlab.blocks.storage import NoStorage
from kvlab.blocks.table import BlockTable
from kvlab.blocks.tiers import NoTier
from kvlab.core import BlockId, SeqId
from kvlab.window import NoWindow


class Holding(Room):
    """Axis prefix=none: a block belongs to its sequence and leaves with it.

    The request protocol of one ledger; `Sequences` runs it over all layer groups, and the members
    of axis prefix (`Shared`, `Serving`) change what is found, kept and made known.

    storage: what stands behind the ids. window: what stays pinned and what may be read.
    record: the kind of `Step` that the storage wants. reach: the model's own window, see
    `first_seen`, if it has one and nobody else begins with what leaves it.
    """

    hold = False  # whether running sequences keep their blocks
    shares = False
    tier = NoTier()

    def __init__(
        self, ledger: BlockLedger, block_size: int, storage: NoStorage | None = None,
        window: NoWindow | None = None, record: type[Step] = Step, reach: int | None = None,
    ):
        super().__init__(ledger, storage or NoStorage())
        self.block_size, self.window, self.record = block_size, window or NoWindow(), record
        self.reach = reach
        self._still = reach is None and type(self.window) is NoWindow  # nothing ever slides
        self.claims: dict[SeqId, Claim] = {}

    # ---- a sequence comes

    def found(self, chain: Chain | Names | None) -> list[BlockId | None]:
        """Block of each whole block of the chain, None where it is not held."""
        return []

    def away(self, chain: Chain | Names | None) -> list[int]:
        """Whole blocks of the chain that are not held, and wait on the host."""
        return []

    def enter(self, seq: SeqId, chain: Chain | Names | None, near: int) -> None:
        """A sequence that starts with the first `near` whole blocks of `chain`, which are held.

        What was found is safe until `settle`, at least.
        """
        self.tables[seq] = BlockTable(self.block_size)
        self.claims[seq] = Claim(chain)
        self.storage.open(seq)

    def reserve(self, seq: SeqId, first: int, stop: int) -> list[int]:
        """Set blocks aside for logical blocks [first, stop); the contents that left for them.

        Raises `OutOfBlocks`.
        """
        claim = self.claims[seq]
        missing = range(first, stop)
        if claim.kept:
            missing = [i for i in missing if i not in claim.kept]
        gone = self.make_room(len(missing), self.coming(seq, missing))
        claim.reserved = self.ledger.allocate(len(missing), seq)
        return gone

    def bring(self, seq: SeqId, first: int, stop: int) -> None:
        """Append logical blocks [first, stop), known here or there; their room is reserved."""

    def settle(self, seq: SeqId) -> None:
        """All that a sequence begins with is in its table."""

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

    def coming(self, seq: SeqId, logical: Sequence[int]) -> list[int]:
        """Contents that these logical blocks will hold, the last first, as far as known."""
        return []

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
            own = own + self.allocate(seq, len(short), self.coming(seq, short))
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
        self.sealed(step, publish)
        if not self._still:
            sliding.slide(self, step.seq)

    def sealed(self, step: Step, publish: bool) -> None:
        """The step's full blocks are read-only from now on and in the table."""
        first = step.past // self.block_size
        self.ledger.seal(step.sealing, depth=range(first, first + len(step.sealing)))

    def abort(self, step: Step) -> None:
        """Undo `step`, but for evictions."""
        claim, own = self.claims[step.seq], step.own
        self.storage.undo(step)
        claim.reserved = own[: step.ahead] + claim.reserved
        self.ledger.free(own[step.ahead :])

    def end_step(self) -> None:
        """All sequences of a step are done."""
        self.ledger.tick()

    # ---- a sequence forks, shrinks, goes

    def forget_tokens(self, seq: SeqId, length: int, exact: bool) -> None:
        """Tokens from `length` on are forgotten; a cut block opened again, `exact` or rounded."""

    fork, crop = forks.fork, forks.crop
    check_crop, make_crop_room = forks.check_crop, forks.make_crop_room
    check_reach = sliding.check_reach

    def close(self, seq: SeqId, done: bool = True) -> None:
        """Give back every block, tail first, so that a shared prefix outlives its suffixes.

        done: what was computed may be made known; False for a sequence that never ran.
        """
        if done:
            self.leave(seq)
        claim, way = self.claims[seq], -1 if done else 1  # what never ran goes as it came
        self.release(seq, [b for b in self.tables[seq].ids[::way] if b is not None])
        if claim.kept:
            self.ledger.unpin(list(claim.kept.values())[::way])
        if claim.reserved:
            self.ledger.free(claim.reserved)
        self.storage.close(seq)
        del self.tables[seq], self.claims[seq]

    def publish(self, seq: SeqId) -> None:
        """Make known what a sequence holds and nobody knows."""

    def leave(self, seq: SeqId) -> None:
        """A sequence is about to be closed; its blocks are still in the table."""

    # ---- blocks

    def mortal(self, blocks: list[BlockId]) -> list[BlockId]:
        """Those of `blocks` that do not outlive the sequences that use them."""
        return blocks

    def release(self, seq: SeqId, blocks: list[BlockId]) -> None:
        """The sequence lets go of blocks of its table."""
        claim, ledger = self.claims[seq], self.ledger
        if claim.pinned:
            self.storage.drop(ledger.unpin([b for b in blocks if b in claim.pinned]))
            claim.pinned.difference_update(blocks)
        borrowed, rest = claim.borrowed, blocks
        if borrowed:
            rest = [b for b in blocks if b not in borrowed]
        freed = ledger.free(self.mortal(rest))
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
    def known(self) -> Set[BlockId]:
        """Blocks that can be found."""
        return frozenset()

    @property
    def reserved_count(self) -> int:
        return sum(len(c.reserved) for c in self.claims.values())

    def extra(self) -> set[BlockId]:
        """Held blocks that may be in no table."""
        return {b for c in self.claims.values() for b in (*c.reserved, *c.kept.values())}

    def check(self) -> None:
        """Raise AssertionError where ledger, tables and claims contradict each other."""
        self.ledger.check()
        held = {b for t in self.tables.values() for b in t.ids if b is not None} | self.extra()
        assert len(held) == self.ledger.held_count, (
            f"{len(held)} blocks in tables, {self.ledger.held_count} held"
        )
