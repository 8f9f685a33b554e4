"""Axis prefix=hash at work: sequences that begin alike share blocks, which outlive them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvlab.blocks.alone import Alone
from kvlab.blocks.chain import leading, picked
from kvlab.blocks.claim import Claim
from kvlab.blocks.ground import Ground
from kvlab.blocks.known import Known, KnownExit
from kvlab.blocks.names import NameIndex
from kvlab.blocks.prefix import PrefixIndex
from kvlab.blocks.reasons import REMEMBERED
from kvlab.blocks.room import Room
from kvlab.blocks.step import Step
from kvlab.blocks.tiers import NoTier
from kvlab.core import BlockId, SeqId


class Shared(Alone):
    """Axis prefix=hash with hold=false: known blocks belong to the index, and nobody pins them.

    The policy may take any block of a running sequence. What is computed behind such a hole is
    not made known, and what was known stays so until it is taken itself.
    index, tier, cost: see `Known`.
    outputs: whether decoded tokens are made known, too. reads_part: whether a single token reads
    only some of its past, and so what no other sequence would compute.
    """

    shares = True

    def __init__(
        self, ground: Ground, *, index: PrefixIndex | NameIndex, tier: NoTier | None = None,
        cost: Callable[[int], float] = lambda depth: 1.0, outputs: bool = True,
        reads_part: bool = False, remembered: int = REMEMBERED,
    ):
        self.ground = ground
        self.known = Known(ground, index, tier, cost, remembered)
        self.room = Room(ground, KnownExit(ground, self.known, self.hold))
        self.outputs, self.reads_part = outputs, reads_part

    # ---- a sequence comes

    def enter(self, seq, near):
        claim, size = self.ground.claims[seq], self.ground.block_size
        chain, found = claim.chain, self.known.found(claim.chain)
        claim.found, claim.prompt, claim.clean = found, len(found), near * size
        claim.gaps = found.count(None) < len(found) - near
        if not claim.gaps:
            claim.seen = self.known.index.added, chain and chain.changes
        self._hold_found(claim, near)
        self.ground.tables[seq].append(found[:near], near * size)

    def _hold_found(self, claim: Claim, near: int) -> None:
        """Blocks that were found stay until `settle`; the first `near` are used."""
        claim.settled = near
        claim.guarded = [b for b in claim.found if b is not None]
        self.ground.ledger.pin(claim.guarded)
        self.ground.ledger.touch(claim.found[:near][::-1])

    def claim_away(self, seq, first, count):
        """Contents that come back from the host leave it first, or making room might drop them."""
        claim, known = self.ground.claims[seq], self.known
        if known.tier.keeps and claim.chain is not None:
            self.room.short_of(count)
            wanted = [i for i in known.away(claim.chain) if i >= first]
            tickets = known.tier.claim(known.named(claim.chain, wanted))
            claim.coming = dict(zip(wanted, tickets))

    def bring(self, seq, first, stop):
        ground, size = self.ground, self.ground.block_size
        claim, table = ground.claims[seq], ground.tables[seq]
        far = [i for i in range(first, stop) if claim.found[i] is None]
        new, claim.reserved = claim.reserved[: len(far)], claim.reserved[len(far) :]
        if far:  # else other layer groups alone miss something
            self.known.tier.fetch([claim.coming[i] for i in far], new)
        place = dict(zip(far, new))
        ids = [place.get(i, claim.found[i]) for i in range(first, stop)]
        table.append(ids, (stop - first) * size)
        claim.clean = stop * size
        self._brought(seq, range(first, stop), far)

    def _brought(self, seq: SeqId, logical: range, far: list[int]) -> None:
        """These blocks are in the table now, those of `far` new on the device."""
        self._make_known(seq, far)
        self.ground.claims[seq].settled = logical.stop

    def settle(self, seq):
        """What comes back is computed again, or was copied: it is on its way no more."""
        claim = self.ground.claims[seq]
        if claim.coming:
            self.known.tier.arrived(list(claim.coming.values()))
            claim.coming = {}
        if claim.guarded:
            self.ground.ledger.unpin(claim.guarded)
            claim.guarded = []
        claim.found = []

    def coming(self, seq, logical):
        chain = self.ground.claims[seq].chain
        return [] if chain is None or not logical else chain.coming(logical)

    # ---- a step makes blocks known

    def sealed(self, step, publish):
        claim, first = self.ground.claims[step.seq], step.past // self.ground.block_size
        self._note_clean(claim, step)
        stop = first + len(step.sealing)
        good = max(first, min(stop, self._shareable(claim)))
        self._make_known(step.seq, self._known_again(step.seq, range(first, good)))
        behind = range(good, stop)
        table = self.ground.tables[step.seq]
        self.ground.ledger.seal([table.ids[i] for i in behind], depth=behind)
        if claim.chain is not None and claim.clean < stop * self.ground.block_size:
            self.known.reasons.refused(claim.chain.names(stop)[good:])
        claim.settled = max(claim.settled, min(stop, self._shareable(claim)))

    def _note_clean(self, claim: Claim, step: Step) -> None:
        """Whether the tokens of this step saw all tokens before them, as those did."""
        if claim.clean == step.past and step.saw_all and not (self.reads_part and step.single):
            claim.clean = step.past + step.count

    def _shareable(self, claim: Claim) -> int:
        """Leading whole blocks that may be known."""
        if claim.chain is None:
            return 0
        known = len(claim.chain) if self.outputs else min(len(claim.chain), claim.prompt)
        return min(known, claim.clean // self.ground.block_size)

    def _known_again(self, seq: SeqId, logical: Sequence[int]) -> Sequence[int]:
        """Use the known block where a content is held already; returns the others."""
        claim = self.ground.claims[seq]
        if claim.seen == (self.known.index.added, claim.chain.changes):
            return logical  # what was not found then is not known now
        known = self.known.found(claim.chain)
        again = [i for i in logical if known[i] is not None]
        for i in again:
            self._swap(seq, i, known[i])
        return [i for i in logical if known[i] is None] if again else logical

    def _make_known(self, seq: SeqId, logical: Sequence[int]) -> None:
        """Seal blocks of the table in this order, and make them known."""
        if logical:
            claim, ids = self.ground.claims[seq], picked(self.ground.tables[seq].ids, logical)
            alone = claim.seen == (self.known.index.added, claim.chain.changes)
            self.known.make(claim.chain, logical, ids)
            if alone:
                claim.seen = self.known.index.added, claim.chain.changes

    def _swap(self, seq: SeqId, index: int, known: BlockId) -> None:
        """Read a content from the block that held it first, and give the sequence's own back."""
        table = self.ground.tables[seq]
        own, table.ids[index] = table.ids[index], known
        table.changes += 1
        self.ground.free([own])

    def publish(self, seq):
        """Make known what a sequence holds and nobody knows: its tokens were told late."""
        claim, table = self.ground.claims[seq], self.ground.tables[seq]
        there = leading(table.ids[: table.length // self.ground.block_size])
        found, stop = self.known.found(claim.chain), min(self._shareable(claim), there)
        late = [i for i in range(stop) if found[i] is None]
        self.known.index.add(claim.chain, late, [table.ids[i] for i in late])

    def end_step(self):
        super().end_step()
        self.known.sweep()

    # ---- a sequence shrinks, goes

    def forget_tokens(self, seq, length, exact):
        claim, size = self.ground.claims[seq], self.ground.block_size
        if claim.chain is not None:
            claim.chain.cut(length)
        whole = length // size
        claim.prompt, claim.settled = min(claim.prompt, whole), min(claim.settled, whole)
        claim.clean = min(claim.clean, length if exact else whole * size)
        claim.own = [i for i in claim.own if i < whole]
        late = [claim.kept.pop(i) for i in sorted(claim.kept, reverse=True) if i >= whole]
        self.ground.ledger.unpin(late)

    def leave(self, seq, done):
        claim = self.ground.claims[seq]
        if claim.coming:  # the sequence never ran
            wanted = self.known.named(claim.chain, claim.coming)
            self.known.tier.cancel(wanted, list(claim.coming.values()))
            claim.coming = {}
        self.settle(seq)

    def left(self):
        self.known.sweep()
