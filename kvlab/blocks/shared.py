"""Axis prefix=hash at work: sequences that begin alike share blocks, which outlive them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from kvlab.blocks import renewal
from kvlab.blocks.chain import Chain, leading, picked
from kvlab.blocks.claim import Claim
from kvlab.blocks.holding import Holding
from kvlab.blocks.names import NameIndex
from kvlab.blocks.prefix import PrefixIndex
from kvlab.blocks.reasons import REMEMBERED, Reasons
from kvlab.blocks.step import Step
from kvlab.blocks.tiers import Fact, NoTier
from kvlab.core import BlockId, SeqId


class Shared(Holding):
    """Axis prefix=hash with hold=false: known blocks belong to the index, and nobody pins them.

    The policy may take any block of a running sequence. What is computed behind such a hole is
    not made known, and what was known stays so until it is taken itself.
    index: what is known. tier: where it goes when it leaves the device.
    cost: depth -> what recomputing a block there takes.
    outputs: whether decoded tokens are made known, too. reads_part: whether a single token reads
    only some of its past, and so what no other sequence would compute.
    orphans: blocks known under an earlier identity that running sequences still read. Nothing
    finds them, and they are freed when the last of these sequences lets them go.
    """

    shares = True

    def __init__(
        self, ledger, block_size, storage=None, window=None, record=Step, *,
        index: PrefixIndex | NameIndex, tier: NoTier | None = None,
        cost: Callable[[int], float] = lambda depth: 1.0, outputs: bool = True,
        reads_part: bool = False, remembered: int = REMEMBERED,
    ):
        super().__init__(ledger, block_size, storage, window, record)
        self.index, self.cost, self._costs = index, cost, []
        self.tier = NoTier() if tier is None else tier
        self.outputs, self.reads_part, self.reasons = outputs, reads_part, Reasons(remembered)
        self.orphans: set[BlockId] = set()
        self._last: tuple = (None, [])  # the latest lookup and what it was made from

    # ---- a sequence comes

    def found(self, chain):
        if chain is None:
            return []
        state = chain, chain.changes, self.index, self.index.changes
        if self._last[0] != state:
            self._last = state, self.index.lookup(chain)
        return self._last[1]

    def away(self, chain):
        if chain is None or not self.tier.keeps:
            return []
        names, has = chain.names(), self.tier.has
        return [i for i, block in enumerate(self.found(chain))
                if block is None and has(names[i], chain.raw(i))]

    def enter(self, seq, chain, near):
        super().enter(seq, chain, near)
        found, claim = self.found(chain), self.claims[seq]
        claim.found, claim.prompt, claim.clean = found, len(found), near * self.block_size
        claim.gaps = found.count(None) < len(found) - near
        if not claim.gaps:
            claim.seen = self.index.added, chain and chain.changes
        self._hold_found(claim, near)
        self.tables[seq].append(found[:near], near * self.block_size)

    def _hold_found(self, claim: Claim, near: int) -> None:
        """Blocks that were found stay until `settle`; the first `near` are used."""
        claim.settled = near
        claim.guarded = [b for b in claim.found if b is not None]
        self.ledger.pin(claim.guarded)
        self.ledger.touch(claim.found[:near][::-1])

    def reserve(self, seq, first, stop):
        """Contents that come back from the host leave it first, or making room might drop them."""
        claim = self.claims[seq]
        if self.tier.keeps and claim.chain is not None:
            self.short_of(sum(i not in claim.kept for i in range(first, stop)))
            wanted = [i for i in self.away(claim.chain) if i >= first]
            claim.coming = dict(zip(wanted, self.tier.claim(self._named(claim.chain, wanted))))
        return super().reserve(seq, first, stop)

    def _named(self, chain: Chain, logical: Iterable[int]) -> list[tuple[int, bytes]]:
        names = chain.names()
        return [(names[i], chain.raw(i)) for i in logical]

    def bring(self, seq, first, stop):
        claim, table = self.claims[seq], self.tables[seq]
        far = [i for i in range(first, stop) if claim.found[i] is None]
        new, claim.reserved = claim.reserved[: len(far)], claim.reserved[len(far) :]
        self.tier.fetch([claim.coming[i] for i in far], new)
        place = dict(zip(far, new))
        ids = [place.get(i, claim.found[i]) for i in range(first, stop)]
        table.append(ids, (stop - first) * self.block_size)
        claim.clean = stop * self.block_size
        self._brought(seq, range(first, stop), far)

    def _brought(self, seq: SeqId, logical: range, far: list[int]) -> None:
        """These blocks are in the table now, those of `far` new on the device."""
        self._make_known(seq, far)
        self.claims[seq].settled = logical.stop

    def settle(self, seq):
        """What comes back is computed again, or was copied: it is on its way no more."""
        claim = self.claims[seq]
        if claim.coming:
            self.tier.arrived(list(claim.coming.values()))
            claim.coming = {}
        if claim.guarded:
            self.ledger.unpin(claim.guarded)
            claim.guarded = []
        claim.found = []

    def coming(self, seq, logical):
        chain = self.claims[seq].chain
        return [] if chain is None or not logical else chain.coming(logical)

    # ---- a step makes blocks known

    def sealed(self, step, publish):
        claim, first = self.claims[step.seq], step.past // self.block_size
        self._note_clean(claim, step)
        stop = first + len(step.sealing)
        good = max(first, min(stop, self._shareable(claim)))
        self._make_known(step.seq, self._known_again(step.seq, range(first, good)))
        behind = range(good, stop)
        table = self.tables[step.seq]
        self.ledger.seal([table.ids[i] for i in behind], depth=behind)
        if claim.chain is not None and claim.clean < stop * self.block_size:
            self.reasons.refused(claim.chain.names(stop)[good:])
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
        return min(known, claim.clean // self.block_size)

    def _known_again(self, seq: SeqId, logical: Sequence[int]) -> Sequence[int]:
        """Use the known block where a content is held already; returns the others."""
        claim = self.claims[seq]
        if claim.seen == (self.index.added, claim.chain.changes):
            return logical  # what was not found then is not known now
        known = self.found(claim.chain)
        again = [i for i in logical if known[i] is not None]
        for i in again:
            self._swap(seq, i, known[i])
        return [i for i in logical if known[i] is None] if again else logical

    def _swap(self, seq: SeqId, index: int, known: BlockId) -> None:
        """Read a content from the block that held it first, and give the sequence's own back."""
        table = self.tables[seq]
        own, table.ids[index] = table.ids[index], known
        table.changes += 1
        self.free([own])

    def _make_known(self, seq: SeqId, logical: Sequence[int]) -> None:
        """Seal blocks of the table in this order, and make them known."""
        if not logical:
            return
        claim, table = self.claims[seq], self.tables[seq].ids
        chain, alone = claim.chain, claim.seen == (self.index.added, claim.chain.changes)
        names, ids = chain.names(), picked(table, logical)
        depths, parents = chain.lineage(logical)
        while len(self._costs) <= max(depths):
            self._costs.append(self.cost(len(self._costs)))
        costs = picked(self._costs, depths)
        self.ledger.seal(ids, picked(names, logical), depths, cost=costs, parent=parents)
        self.index.add(chain, logical, ids)
        if alone:
            claim.seen = self.index.added, chain.changes
        if self.tier.keeps:
            self.tier.born(map(self._fact, ids))

    def _fact(self, block: BlockId) -> Fact:
        meta = self.ledger.meta(block)
        return Fact(block, *self.index.content(block), meta.parent, meta.depth, meta.cost)

    def publish(self, seq):
        """Make known what a sequence holds and nobody knows: its tokens were told late."""
        claim, table = self.claims[seq], self.tables[seq]
        there = leading(table.ids[: table.length // self.block_size])
        found, stop = self.found(claim.chain), min(self._shareable(claim), there)
        late = [i for i in range(stop) if found[i] is None]
        self.index.add(claim.chain, late, [table.ids[i] for i in late])

    # ---- a sequence shrinks, goes

    def forget_tokens(self, seq, length, exact):
        claim, size = self.claims[seq], self.block_size
        if claim.chain is not None:
            claim.chain.cut(length)
        whole = length // size
        claim.prompt, claim.settled = min(claim.prompt, whole), min(claim.settled, whole)
        claim.clean = min(claim.clean, length if exact else whole * size)
        claim.own = [i for i in claim.own if i < whole]
        late = [claim.kept.pop(i) for i in sorted(claim.kept, reverse=True) if i >= whole]
        self.ledger.unpin(late)

    def close(self, seq, done=True):
        claim = self.claims[seq]
        if claim.coming:  # the sequence never ran
            wanted = self._named(claim.chain, claim.coming)
            self.tier.cancel(wanted, list(claim.coming.values()))
            claim.coming = {}
        self.settle(seq)
        super().close(seq, done)
        if done:
            self.sweep()

    # ---- blocks go

    def mortal(self, blocks):
        known, orphans = self.index.blocks, self.orphans
        return [b for b in blocks if b not in known and b not in orphans]

    def host_room(self, count):
        if self.hold:
            return self.tier.make_room(count)
        if not self.tier.make_room(count):
            self.storage.require(count)  # raises: running sequences need these blocks
        return True

    def _depart(self, victims, spills):
        """Chosen blocks are known no more; they go to the host if it has room."""
        keeps = spills and self.tier.keeps
        facts = [self._fact(b) for b in victims if b in self.index] if keeps else []
        names = self.index.drop(victims)
        self.reasons.left(names)
        if self.orphans:
            self.orphans.difference_update(victims)
        if spills and not self.hold:
            self._spill_all(victims, facts)
        elif facts and (new := self.tier.left(facts)):
            self.tier.put(new, self.storage.spill([fact.block for fact in new], []))
        self.free(victims)
        self.storage.prune()
        return names

    def _spill_all(self, victims: list[BlockId], facts: list[Fact]) -> None:
        """Running sequences lose blocks here: what the host takes of them stays in their reach."""
        holes = self._holes(victims)
        keys = dict(zip(victims, self.storage.spill(victims, holes)))
        self._punch(holes)
        if keys:
            self.tier.put(facts, [keys.pop(fact.block) for fact in facts])
        self.storage.let_go(list(keys.values()))

    def drop_known(self, spill: bool = False) -> int:
        """Free the shared blocks that nobody uses; `spill` them to the host. How many."""
        idle = self.idle(self.known)
        if not idle:
            return 0
        self._depart(idle, spill and self.host_room(len(idle)))
        return len(idle)

    def idle(self, blocks: Set[BlockId]) -> list[BlockId]:
        """Those of `blocks` that no sequence and no handle uses."""
        used = {b for table in self.tables.values() for b in table.ids}
        return [b for b in sorted(blocks - used) if not self.ledger.meta(b).pins]

    def sweep(self) -> None:
        """Free the orphans that nobody reads any more."""
        if self.orphans:
            idle = self.idle(self.orphans)
            self.orphans.difference_update(idle)
            self.free(idle)

    def end_step(self):
        super().end_step()
        self.sweep()

    renew, cut_off = renewal.renew, renewal.cut_off

    # ---- accounts

    known = property(lambda self: self.index.blocks)

    def extra(self):
        return super().extra().union(self.index.blocks, self.orphans)
