"""Who holds the blocks of sequences that begin alike: the members of axis `prefix` at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from kvlab.blocks import OPEN, SEALED
from kvlab.cache.claim import Claim
from kvlab.cache.host import HostPrefixes
from kvlab.cache.renewal import Renewable
from kvlab.core import BlockId, SeqId
from kvlab.source import Extent

OWNER = "prefix"
REMEMBERED = 1 << 20  # contents that left, kept to say why a block missed


class Shared(Renewable):
    """Axis prefix=hash with hold=false: known blocks belong to the index, and nobody pins them.

    The policy may take any block of a running sequence. What is computed behind such a hole is
    not made known, and what was known stays so until it is taken itself.
    cost: depth -> what recomputing a block there takes.
    """

    def __init__(
        self, group, identity: str, outputs: bool, reads_part: bool,
        cost: Callable[[int], float],
    ):
        super().__init__(group, identity)
        self.outputs, self.reads_part, self.cost = outputs, reads_part, cost
        self.host = HostPrefixes(group.away.shelf)
        self._leaving: dict[BlockId, tuple[int, bytes]] = {}

    def found(self, chain):
        if chain is None:
            return []
        state = chain, chain.changes, self.index.changes
        if self._last[0] != state:
            self._last = state, self.index.lookup(chain)
        return self._last[1]

    def reach(self, chain):
        found, names = self.found(chain), chain.names()
        far = (i for i, block in enumerate(found) if block is None)
        return next((i for i in far if not self.host.has(names[i], chain.raw(i))), len(found))

    def reserve(self, seq, first, stop):
        """Contents that come back from the host leave it first, or making room might drop them."""
        claim = self.claims[seq]
        names, found = claim.chain.names(stop), self.found(claim.chain)
        away = [i for i in range(first, len(names) if len(self.host) else first)
                if found[i] is None and self.host.has(names[i], claim.chain.raw(i))]
        claim.coming = {i: self.host.take(names[i]) for i in away}
        super().reserve(seq, first, stop)

    def bring(self, seq, first, stop):
        claim, table, size = self.claims[seq], self.group.tables[seq], self.group.block_size
        found = self.found(claim.chain)
        far = [i for i in range(first, stop) if found[i] is None]
        new, claim.reserved = claim.reserved[: len(far)], claim.reserved[len(far) :]
        self.group.away.shelf.fetch([claim.coming[i] for i in far], new)
        place = dict(zip(far, new))
        table.append([place.get(i, found[i]) for i in range(first, stop)], (stop - first) * size)
        self._drop_coming(claim)
        claim.clean = stop * size
        self._brought(seq, range(first, stop), far)

    def _brought(self, seq: SeqId, logical: range, far: list[int]) -> None:
        """These blocks are in the table now, those of `far` new on the device."""
        self._seal(seq, far)
        self.claims[seq].settled = logical.stop

    def _drop_coming(self, claim: Claim) -> None:
        """What comes back is computed again, or was copied: its host copy goes."""
        self.group.away.shelf.drop(list(claim.coming.values()))
        claim.coming = {}

    def leave(self, seq):
        self._drop_coming(self.claims[seq])

    def close(self, seq):
        claim = self.claims[seq]
        for index, key in claim.coming.items():  # the sequence never ran
            self.host.give(claim.chain.names()[index], claim.chain.raw(index), key)
        self.opened(seq)
        super().close(seq)

    def open(self, seq, chain, hit):
        found = self.found(chain)
        claim = self.claims[seq] = Claim(chain, len(found), hit * self.group.block_size)
        claim.settled = hit
        claim.guarded = [b for b in found if b is not None]
        self.ledger.pin(claim.guarded)
        self.ledger.touch(found[:hit][::-1])
        return found[:hit]

    def opened(self, seq):
        claim = self.claims[seq]
        self.ledger.unpin(claim.guarded)
        claim.guarded = []

    def crop(self, seq, length, exact):
        claim, size = self.claims[seq], self.group.block_size
        if claim.chain is not None:
            claim.chain.cut(length)
        whole = length // size
        claim.prompt, claim.settled = min(claim.prompt, whole), min(claim.settled, whole)
        claim.clean = min(claim.clean, length if exact else whole * size)
        late = [claim.kept.pop(i) for i in sorted(claim.kept, reverse=True) if i >= whole]
        self.ledger.unpin(late)

    def coming(self, seq, logical):
        chain = self.claims[seq].chain
        names = chain.names() if chain is not None and logical else []
        return [names[i] for i in reversed(logical) if i < len(names)]

    def sealed(self, e):
        claim, first = self.claims[e.seq], e.past // self.group.block_size
        self._note_clean(claim, e)
        stop = first + len(e.sealing)
        good = min(stop, self._shareable(claim))
        mine = self._known_again(e.seq, range(first, good))
        self._seal(e.seq, mine)
        behind = range(max(first, good), stop)
        table = self.group.tables[e.seq]
        self.ledger.seal([table.ids[i] for i in behind], depth=behind)
        if claim.chain is not None and claim.clean < stop * self.group.block_size:
            remember(self.refused, claim.chain.names(stop)[max(first, good) :])
        claim.settled = max(claim.settled, good)

    def _note_clean(self, claim: Claim, e: Extent) -> None:
        """Whether the tokens of this step saw all tokens before them, as those did."""
        if claim.clean == e.past and e.saw_all and not (self.reads_part and e.single):
            claim.clean = e.past + e.count

    def _shareable(self, claim: Claim) -> int:
        """Leading whole blocks that may be known."""
        if claim.chain is None:
            return 0
        known = len(claim.chain) if self.outputs else min(len(claim.chain), claim.prompt)
        return min(known, claim.clean // self.group.block_size)

    def _known_again(self, seq: SeqId, logical: Iterable[int]) -> list[int]:
        """Use the known block where a content is held already; returns the others."""
        known = self.found(self.claims[seq].chain)
        again = [i for i in logical if known[i] is not None]
        for i in again:
            self.group.swap(seq, i, known[i])
        return [i for i in logical if known[i] is None]

    def _seal(self, seq: SeqId, logical: list[int]) -> None:
        """Seal blocks of the table in this order, and make them known."""
        chain, table = self.claims[seq].chain, self.group.tables[seq]
        names, ids = chain.names(), [table.ids[i] for i in logical]
        parents = [names[i - 1] if i else None for i in logical]
        self.ledger.seal(
            ids, [names[i] for i in logical], logical, cost=map(self.cost, logical), parent=parents
        )
        self.index.add(chain, logical, ids)
        for block in ids:
            self.ledger.meta(block).owner = OWNER

    def publish(self, seq: SeqId) -> None:
        """Make known what a sequence holds and nobody knows: its tokens were told late."""
        claim, table = self.claims[seq], self.group.tables[seq]
        found, stop = self.found(claim.chain), min(self._shareable(claim), self._whole(seq))
        late = {i: table.ids[i] for i in range(stop) if found[i] is None}
        self.index.add(claim.chain, list(late), list(late.values()))
        for block in late.values():
            self.ledger.meta(block).owner = OWNER

    def _whole(self, seq: SeqId) -> int:
        """Leading whole blocks that are still there."""
        table = self.group.tables[seq]
        ids = table.ids[: table.length // self.group.block_size]
        return ids.index(None) if None in ids else len(ids)

    @property
    def known(self) -> set[BlockId]:
        """Blocks that can be found."""
        return self.index.blocks

    def owns(self, block):
        return self.ledger.meta(block).owner == OWNER

    def gone(self, victims):
        super().gone(victims)
        self._leaving = {b: self.index.content(b) for b in victims if b in self.index}
        self.index.drop(victims)
        remember(self.left, [name for name, _ in self._leaving.values()])

    def make_host_room(self, count):
        if not self.host.make_room(count) and not self.hold:
            self.group.away.shelf.require(count)  # raises: running sequences need these blocks
        return self.host.make_room(count)

    def spilled(self, keys):
        self.host.put(self._leaving, keys)

    @property
    def waiting(self):
        return self.host.keys + [k for c in self.claims.values() for k in c.coming.values()]

    def forget_host(self):
        self.host.clear()


class Serving(Shared):
    """Axis prefix=hash: running sequences pin what they use, as a server does.

    The policy chooses among blocks that nobody uses. A prompt's blocks become known in one go
    when it is computed, the deepest first, so that it is the first to leave again; the policy's
    clock ticks once for each sequence. All this is what the simulator does with a trace.
    """

    hold = True

    def open(self, seq, chain, hit):
        size = self.group.block_size
        found = self.found(chain)
        claim = self.claims[seq] = Claim(chain, len(found), hit * size)
        claim.kept = {i: b for i, b in enumerate(found) if i >= hit and b is not None}
        self.ledger.pin([b for b in found if b is not None])
        self.group.borrowed[seq].update(found[:hit])
        return found[:hit]

    def sealed(self, e):
        claim = self.claims[e.seq]
        self._note_clean(claim, e)
        first = e.past // self.group.block_size
        for index, block in enumerate(e.sealing, first):
            if block in e.adopted:
                del claim.kept[index]
                self.group.borrowed[e.seq].add(block)
        if self.group.tables[e.seq].length // self.group.block_size >= claim.prompt:
            self.publish(e.seq)

    def publish(self, seq):
        """What is new is made known, what was there is touched, the deepest first."""
        claim, table = self.claims[seq], self.group.tables[seq]
        stop = min(self._shareable(claim), table.length // self.group.block_size)
        if stop <= claim.settled:
            return
        late = [i for i in range(claim.settled, stop) if table.ids[i] is not None]
        claim.settled = stop
        own = self._known_again(seq, [i for i in late if self._is_own(seq, table.ids[i])])
        fresh = set(own)
        rest = [i for i in late if i in fresh or not self._is_own(seq, table.ids[i])]
        for is_new, run in groupby(reversed(rest), key=lambda i: i in fresh):
            run = list(run)
            ids = [table.ids[i] for i in run]
            if is_new:
                self._seal(seq, run)
                self.ledger.pin(ids)
                self.group.borrowed[seq].update(ids)
            else:
                self.ledger.touch([b for b in ids if self.ledger.state(b) == SEALED])

    def _brought(self, seq, logical, far):
        claim, table = self.claims[seq], self.group.tables[seq]
        near = [i for i in logical if i not in far]
        self.group.borrowed[seq].update(table.ids[i] for i in near)
        for index in near:
            del claim.kept[index]

    def _is_own(self, seq: SeqId, block: BlockId) -> bool:
        return block not in self.group.borrowed[seq] and self.ledger.state(block) == OPEN

    def leave(self, seq):
        super().leave(seq)
        self.publish(seq)

    def ended(self):
        super().ended()
        self.ledger.tick()

    def end_step(self):
        """Time passes with requests."""
        self.sweep()


def remember(memory: dict[int, None], contents: Iterable[int]) -> None:
    """Note contents, the oldest making room."""
    for content in contents:
        memory.pop(content, None)
        memory[content] = None
    while len(memory) > REMEMBERED:
        del memory[next(iter(memory))]
