"""Axis prefix=hash as a server has it: running sequences keep what they use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvlab.blocks.shared import Shared
from kvlab.blocks.states import SEALED
from kvlab.core import SeqId
from kvlab.policy import Moment


class Serving(Shared):
    """Running sequences pin their blocks, and the policy chooses among what nobody uses.

    A prompt's blocks become known in one go when it is computed, the deepest first, so that it is
    the first to leave again; the policy's clock ticks once for each sequence. What two sequences
    compute at once is kept once. Live caches and the simulator do just this.
    """

    hold = True

    def hear(self, moment: Moment) -> list[int]:
        """A request comes, and policies that go by requests hear of it: the contents that the
        device's gives up for their age. They do not spill."""
        self.tier.hear(moment)
        dead = self.ledger.begin(moment)
        self.evictions += len(dead)
        return self._depart(dead, spills=False) if dead else []

    def _hold_found(self, claim, near):
        """All that is found is pinned until the sequence ends; what lies behind a gap waits."""
        found = used = claim.found[:near]
        if claim.gaps:
            behind = enumerate(claim.found[near:], near)
            claim.kept = {i: b for i, b in behind if b is not None}
            found = [*used, *claim.kept.values()]
        self.ledger.pin(found)
        claim.borrowed.update(used)

    def _brought(self, seq, logical, far):
        claim, ids = self.claims[seq], self.tables[seq].ids
        claim.own += far
        for index in set(logical).difference(far):
            claim.borrowed.add(ids[index])
            del claim.kept[index]

    def sealed(self, step, publish):
        claim = self.claims[step.seq]
        self._note_clean(claim, step)
        first = step.past // self.block_size
        if step.adopted:
            for index, block in enumerate(step.sealing, first):
                if block in step.adopted:
                    del claim.kept[index]
                    claim.borrowed.add(block)
                else:
                    claim.own.append(index)
        else:
            claim.own += range(first, first + len(step.sealing))
        if publish and self.tables[step.seq].length // self.block_size >= claim.prompt:
            self.publish(step.seq)

    def publish(self, seq):
        self._publish(seq, pin=True)

    def leave(self, seq):
        self._publish(seq, pin=False)

    def _publish(self, seq: SeqId, pin: bool) -> None:
        """What is new is made known, what was there is touched, the deepest first.

        pin: what is new stays with the sequence, which goes on.
        """
        claim, table = self.claims[seq], self.tables[seq]
        ids, first = table.ids, claim.settled
        stop = min(self._shareable(claim), table.length // self.block_size)
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
                    self.ledger.pin(blocks)
                    claim.borrowed.update(blocks)
            else:
                there = [ids[i] for i in run if ids[i] is not None]
                self.ledger.touch([b for b in there if self.ledger.state(b) == SEALED])

    def _swap(self, seq, index, known):
        claim = self.claims[seq]
        if claim.kept.get(index) == known:
            del claim.kept[index]
        else:
            self.ledger.pin([known])
        claim.borrowed.add(known)
        super()._swap(seq, index, known)

    def close(self, seq, done=True):
        super().close(seq, done)
        if done:
            self.ledger.tick()

    def end_step(self):
        """Time passes with requests."""
        self.sweep()


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
