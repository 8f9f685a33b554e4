"""Shuffled: the negative control of any policy that scores blocks."""

from __future__ import annotations

from random import Random as Generator

from kvlab.core import BlockId, checked_seed
from kvlab.policy.base import BlockMeta, EvictionPolicy, by_name
from kvlab.policy.moment import refuse_expiring


class Shuffled(EvictionPolicy):
    """A policy whose blocks were dealt each other's metadata: right scores, wrong blocks.

    No published method. The member chooses by attention, hits and age as ever, but each entry
    speaks for another block, which leaves in its place. A new block changes places with one drawn
    at random (Fisher and Yates), so at any time the dealing is a uniform permutation, and it lasts.
    So scores are spread and persist as in earnest, which plain random eviction does not copy. A
    policy that does not beat its own shuffle gains nothing from its scores.
    member: the policy under test, a name or an instance (default attention_mass). seed: of the
    dealing.
    """

    name = "shuffled"
    control = True

    def __init__(self, member: str | EvictionPolicy = "attention_mass", seed: int = 0):
        self.member = by_name(member) if isinstance(member, str) else member
        refuse_expiring("policy.member", self.member)
        self.asks = self.member.asks
        # Scores that are only compared, dealt for good, are an order drawn at random.
        self.by_token = self.member.by_token and "random"
        self.observes = self.member.observes  # not `scored`: a server watches nothing for a control
        self._draw = Generator(checked_seed("policy.seed", seed)).randrange
        self._metas: dict[BlockId, BlockMeta] = {}
        self._ids: list[BlockId] = []  # all of them, to draw from
        self._at: dict[BlockId, int] = {}
        self._entry: dict[BlockId, BlockId] = {}  # block -> whose metadata speaks for it
        self._block: dict[BlockId, BlockId] = {}  # the inverse
        self._held: set[BlockId] = set()

    def resize(self, capacity):
        super().resize(capacity)
        self.member.resize(capacity)

    def add(self, meta):
        new = meta.id
        self._metas[new], self._at[new] = meta, len(self._ids)
        self._ids.append(new)
        other = self._ids[self._draw(len(self._ids))]
        if other != new:
            freed = self._entry[other]
            self._deal(freed, new)
            if other in self._held:
                self.member.release(self._metas[freed])
        self._deal(new, other)
        self._enter(new)

    def _deal(self, entry: BlockId, block: BlockId) -> None:
        self._entry[block], self._block[entry] = entry, block

    def _enter(self, entry: BlockId) -> None:
        """Show the member an entry that it does not know, held if its block is."""
        self.member.add(self._metas[entry])
        if self._block[entry] in self._held:
            self.member.hold(self._metas[entry])

    def _leave(self, id: BlockId) -> None:
        """A block goes: the entry that spoke for it now speaks for the one that it spoke for."""
        entry, orphan = self._entry.pop(id), self._block.pop(id)
        self.member.remove(self._metas[id])
        if entry != id:
            self.member.remove(self._metas[entry])
            self._deal(entry, orphan)
            self._enter(entry)
        self._held.discard(id)
        del self._metas[id]
        last, at = self._ids.pop(), self._at.pop(id)
        if last != id:
            self._ids[at], self._at[last] = last, at

    def remove(self, meta):
        if meta.id in self._metas:
            self._leave(meta.id)

    def hold(self, meta):
        self._held.add(meta.id)
        self.member.hold(self._metas[self._entry[meta.id]])

    def release(self, meta):
        self._held.discard(meta.id)
        self.member.release(self._metas[self._entry[meta.id]])

    def touch(self, meta):
        self.member.touch(meta)

    def rescore(self, meta):
        self.member.rescore(meta)

    def begin(self, moment):
        return self.member.begin(moment)

    def expect(self, content):
        self.member.expect(content)

    def tick(self, step):
        self.member.tick(step)

    def pop(self):
        victim = self._block[self.member.pop()]
        self._leave(victim)
        return victim

    def __len__(self):
        return len(self._metas) - len(self._held)

    def __contains__(self, id):
        return id in self._metas and id not in self._held
