"""Axis prefix=hash as a server has it: running sequences keep what they use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvlab.blocks.chain import leading
from kvlab.blocks.names import Names
from kvlab.blocks.passing import pass_by, passes
from kvlab.blocks.shared import Shared
from kvlab.blocks.states import SEALED
from kvlab.blocks.step import Opened
from kvlab.core import BlockId, SeqId


class Serving(Shared):
    """Running sequences pin their blocks, and the policy chooses among what nobody uses.

    A prompt's blocks become known in one go when it is computed, the deepest first, so that it is
    the first to leave again; the policy's clock ticks once for each sequence. What two sequences
    compute at once is kept once. Live caches and the simulator do just this.
    """

    hold = True

    def _hold_found(self, claim, near):
        """All that is found is pinned until the sequence ends; what lies behind a gap waits."""
        found = used = claim.found[:near]
        if claim.gaps:
            behind = enumerate(claim.found[near:], near)
            claim.kept = {i: b for i, b in behind if b is not None}
            found = [*used, *claim.kept.values()]
        self.ground.ledger.pin(found)
        claim.borrowed.update(used)

    def _brought(self, seq, logical, far):
        claim, ids = self.ground.claims[seq], self.ground.tables[seq].ids
        claim.own += far
        for index in set(logical).difference(far):
            claim.borrowed.add(ids[index])
            del claim.kept[index]

    def sealed(self, step, publish):
        claim, size = self.ground.claims[step.seq], self.ground.block_size
        self._note_clean(claim, step)
        first = step.past // size
        if step.adopted:
            for index, block in enumerate(step.sealing, first):
                if block in step.adopted:
                    del claim.kept[index]
                    claim.borrowed.add(block)
                else:
                    claim.own.append(index)
        else:
            claim.own += range(first, first + len(step.sealing))
        if publish and self.ground.tables[step.seq].length // size >= claim.prompt:
            self.publish(step.seq)

    def publish(self, seq):
        self._publish(seq, pin=True)

    def _publish(self, seq: SeqId, pin: bool) -> None:
        """What is new is made known, what was there is touched, the deepest first.

        pin: what is new stays with the sequence, which goes on.
        """
        ground, ledger = self.ground, self.ground.ledger
        claim, table = ground.claims[seq], ground.tables[seq]
        ids, first = table.ids, claim.settled
        stop = min(self._shareable(claim), table.length // ground.block_size)
        if stop <= first:
            return
        claim.settled = stop
        own, claim.own = claim.own, []
        if None in ids or own and not first <= own[0] <= own[-1] < stop:
            claim.own = [i for i in own if i >= stop]
            own = [i for i in own if first <= i < stop and ids[i] is not None]
        own = self._known_again(seq, own)
        for is_new, run in _runs(own, first, stop):
            if is_new:
                self._make_known(seq, run)
                if pin:
                    blocks = [ids[i] for i in run]
                    ledger.pin(blocks)
                    claim.borrowed.update(blocks)
            else:
                there = [ids[i] for i in run if ids[i] is not None]
                ledger.touch([b for b in there if ledger.state(b) == SEALED])

    def _swap(self, seq, index, known):
        claim = self.ground.claims[seq]
        if claim.kept.get(index) == known:
            del claim.kept[index]
        else:
            self.ground.ledger.pin([known])
        claim.borrowed.add(known)
        super()._swap(seq, index, known)

    def pass_through(self, chain: Names) -> Opened | None:
        """What open, a step, commit and close come to for a sequence that is computed at once and
        over before another one comes, with nothing behind the ids: the same verbs of the ledger in
        the same order, and no table, claim or step is made for it.

        None, nothing being done, where it has to take the long way: others are under way, or blocks
        wait behind a gap or on the host. Raises `OutOfBlocks` as ever.
        """
        ground, known, count = self.ground, self.known, len(chain)
        found = known.index.lookup(chain)
        near = leading(found)
        if ground.claims or known.tier.keeps or found.count(None) < count - near:
            return None
        used, ledger = found[:near], ground.ledger
        if known.forgets and passes(ledger, used):
            return self._pass_by(chain, found, near)
        ledger.pin(used)
        try:
            gone = self.room.make(count - near, chain.coming(range(near, count)))
        except BaseException:
            ledger.unpin(used)
            raise
        if near < count:
            new = ledger.allocate(count - near)
            known.make(chain, range(count - 1, near - 1, -1), new[::-1])
        used.reverse()
        ledger.touch(used)
        ledger.unpin(used)
        ledger.tick()
        return Opened(min(near, count - 1), near, found, [], gone)

    def _pass_by(self, chain: Names, found: list[BlockId | None], near: int) -> Opened:
        """The same where nobody looks on, in one call of the ledger."""
        known, ledger, count = self.known, self.ground.ledger, len(chain)
        facts = known.facts(chain, range(count - 1, near - 1, -1))
        coming = chain.coming(range(near, count)) if ledger.policy.listens else ()
        new, gone = pass_by(ledger, found[:near], facts, coming)
        self.room.evictions += len(gone)
        known.index.exchange(gone, new, facts.names)
        return Opened(min(near, count - 1), near, found, [], gone)

    def end_step(self):
        """Time passes with requests."""
        self.known.sweep()

    def leave(self, seq, done):
        super().leave(seq, done)
        if done:
            self._publish(seq, pin=False)

    def left(self):
        super().left()
        self.ground.ledger.tick()


def _runs(own: Sequence[int], first: int, stop: int) -> Iterator[tuple[bool, range]]:
    """[first, stop) in runs of `own` (rising) and of others, all of it falling."""
    end, at = stop, len(own) - 1
    while end > first:
        if at >= 0 and own[at] == end - 1:
            start = 0 if own[at] - own[0] == at else at  # mostly they are one run
            while start > 0 and own[start - 1] == own[start] - 1:
                start -= 1
            yield True, range(end - 1, own[start] - 1, -1)
            end, at = own[start], start - 1
        else:
            start = own[at] + 1 if at >= 0 else first
            yield False, range(end - 1, start - 1, -1)
            end = start
