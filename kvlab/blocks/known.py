"""Which blocks of a layer group are known, and where they go when they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from kvlab.blocks.chain import Chain, picked
from kvlab.blocks.ground import Ground
from kvlab.blocks.names import NameIndex, Names
from kvlab.blocks.passing import Facts
from kvlab.blocks.prefix import PrefixIndex
from kvlab.blocks.reasons import Reasons
from kvlab.blocks.room import Exit
from kvlab.blocks.tiers import Fact, NoTier
from kvlab.core import BlockId, SeqId


class NothingKnown:
    """Nobody finds a block of another: the null member."""

    tier = NoTier()
    blocks: Set[BlockId] = frozenset()  # that can be found
    orphans: Set[BlockId] = frozenset()

    def found(self, chain: Chain | Names | None) -> list[BlockId | None]:
        """Block of each whole block of the chain, None where it is not held."""
        return []

    def away(self, chain: Chain | Names | None) -> list[int]:
        """Whole blocks of the chain that are not held, and wait on the host."""
        return []

    def mortal(self, blocks: list[BlockId]) -> list[BlockId]:
        """Those of `blocks` that do not outlive the sequences that use them."""
        return blocks


class Known(NothingKnown):
    """index: what is known. tier: where it goes when it leaves the device.
    cost: depth -> what recomputing a block there takes.
    orphans: blocks known under an earlier identity that running sequences still read. Nothing
    finds them, and they are freed when the last of these sequences lets them go.
    """

    def __init__(
        self, ground: Ground, index: PrefixIndex | NameIndex, tier: NoTier | None,
        cost: Callable[[int], float], remembered: int,
    ):
        self.ground, self.index = ground, index
        self.tier = NoTier() if tier is None else tier
        self.cost, self._costs = cost, []
        self.reasons = Reasons(remembered)
        self.orphans: set[BlockId] = set()
        self._last: tuple = (None, [])  # the latest lookup and what it was made from

    # ---- what is there

    @property
    def forgets(self) -> bool:
        """Whether what leaves is remembered nowhere."""
        return not (self.reasons.most or self.orphans or self.tier.keeps)

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

    def mortal(self, blocks):
        known, orphans = self.index.blocks, self.orphans
        return [b for b in blocks if b not in known and b not in orphans]

    blocks = property(lambda self: self.index.blocks)

    def named(self, chain: Chain, logical: Iterable[int]) -> list[tuple[int, bytes]]:
        """What a tier calls these blocks."""
        names = chain.names()
        return [(names[i], chain.raw(i)) for i in logical]

    def fact(self, block: BlockId) -> Fact:
        meta = self.ground.ledger.meta(block)
        return Fact(block, *self.index.content(block), meta.parent, meta.depth, meta.cost)

    # ---- more is known

    def facts(self, chain: Chain | Names, logical: Sequence[int]) -> Facts:
        """What is to be known of these whole blocks, in this order."""
        depths, parents = chain.lineage(logical)
        costs, deepest = self._costs, max(depths, default=-1)
        while len(costs) <= deepest:
            costs.append(self.cost(len(costs)))
        return Facts(picked(chain.names(), logical), depths, parents, picked(costs, depths))

    def make(self, chain: Chain | Names, logical: Sequence[int], ids: list[BlockId]) -> None:
        """Seal `ids`, which hold these whole blocks, in this order, and make them known."""
        names, depths, parents, costs = self.facts(chain, logical)
        self.ground.ledger.seal(ids, names, depths, cost=costs, parent=parents)
        self.index.add(chain, logical, ids)
        if self.tier.keeps:
            self.tier.born(map(self.fact, ids))

    # ---- less is

    def forget(self, victims: list[BlockId]) -> list[int]:
        """These blocks leave; the names of those that were known."""
        names = self.index.drop(victims)
        self.reasons.left(names)
        if self.orphans:
            self.orphans.difference_update(victims)
        return names

    def idle(self, blocks: Set[BlockId]) -> list[BlockId]:
        """Those of `blocks` that no sequence and no handle uses."""
        used = {b for table in self.ground.tables.values() for b in table.ids}
        return [b for b in sorted(blocks - used) if not self.ground.ledger.meta(b).pins]

    def sweep(self) -> None:
        """Free the orphans that nobody reads any more."""
        if self.orphans:
            idle = self.idle(self.orphans)
            self.orphans.difference_update(idle)
            self.ground.free(idle)

    def renew(self, index: PrefixIndex, chains: Mapping[SeqId, Chain]) -> None:
        """The model that computed what is known is no longer the same: it is found no more;
        running sequences go on as `chains`, and alone."""
        self.tier.clear()
        for seq in self.ground.claims:
            self.cut_off(seq, chains[seq])
        self.orphans |= self.index.blocks
        self.index, self.reasons = index, Reasons(self.reasons.most)
        self.sweep()

    def cut_off(self, seq: SeqId, chain: Chain) -> None:
        """A sequence goes on as `chain`, without the known blocks behind what it has computed."""
        claim = self.ground.claims[seq]
        self.ground.ledger.unpin(list(claim.kept.values())[::-1])
        claim.kept, claim.chain, claim.prompt = {}, chain, 0


class KnownExit(Exit):
    """How blocks leave where some are known: those are known no more, and go to the host tier.

    hold: whether running sequences keep theirs; then no hole ever opens in one.
    """

    def __init__(self, ground: Ground, known: Known, hold: bool):
        super().__init__(ground)
        self.known, self.hold = known, hold

    def host_room(self, count):
        tier = self.known.tier
        if self.hold:
            return tier.make_room(count)
        if not tier.make_room(count):
            self.ground.storage.require(count)  # raises: running sequences need these blocks
        return True

    def depart(self, victims, spills):
        known, storage = self.known, self.ground.storage
        keeps = spills and known.tier.keeps
        facts = [known.fact(b) for b in victims if b in known.index] if keeps else []
        names = known.forget(victims)
        if spills and not self.hold:
            self._spill_all(victims, facts)
        elif facts and (new := known.tier.left(facts)):
            known.tier.put(new, storage.spill([fact.block for fact in new], []))
        self.ground.free(victims)
        storage.prune()
        return names

    def _spill_all(self, victims: list[BlockId], facts: list[Fact]) -> None:
        """Running sequences lose blocks here: what the host takes of them stays in their reach."""
        ground = self.ground
        holes = ground.holes(victims)
        keys = dict(zip(victims, ground.storage.spill(victims, holes)))
        ground.punch(holes)
        if keys:
            self.known.tier.put(facts, [keys.pop(fact.block) for fact in facts])
        ground.storage.let_go(list(keys.values()))

    def drop_known(self, spill: bool = False) -> int:
        """Free the shared blocks that nobody uses; `spill` them to the host. How many."""
        idle = self.known.idle(self.known.blocks)
        if not idle:
            return 0
        self.depart(idle, spill and self.host_room(len(idle)))
        return len(idle)
