"""The adaptive chooser: follow whichever of several policies would have missed least lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from kvlab.core import BadInput, BlockId
from kvlab.policy.base import BlockMeta, EvictionPolicy, by_name, nothing
from kvlab.policy.moment import refuse_expiring


class Shadow:
    """What a cache of this size would hold under one member policy: contents, no blocks."""

    def __init__(self, policy: EvictionPolicy):
        self.policy = policy
        self.misses = 0.0
        self.metas: dict[Hashable, BlockMeta] = {}  # by key: content, or a stand-in for none
        self.held: set[Hashable] = set()
        self._keys: list[Hashable] = []  # by the id of the shadow's own meta
        self._spare: list[BlockMeta] = []  # to be used again

    def access(self, key: Hashable, real: BlockMeta, now: int, held: bool) -> bool:
        """Use a content; says whether the shadow had it. It has it afterwards."""
        own = self.metas.get(key)
        if own is not None:
            own.last, own.score, own.level = now, real.score, real.level
            own.hits += 1
            self.policy.touch(own)
            return True
        self._enter(key, real, now)
        if held:
            self.hold(key)
        return False

    def _enter(self, key, real, now):
        if self._spare:
            own = self._spare.pop()
        else:
            own = BlockMeta(len(self._keys))
            self._keys.append(key)
        self._keys[own.id], self.metas[key] = key, own
        own.content, own.parent, own.depth = real.content, real.parent, real.depth
        own.level, own.cost, own.size, own.score = real.level, real.cost, real.size, real.score
        own.born = own.last = now
        own.hits = 0
        self.policy.add(own)

    def pop(self) -> Hashable:
        """Evict by the member's choice; the key that left."""
        key = self._keys[self.policy.pop()]
        self._spare.append(self.metas.pop(key))
        return key

    def hold(self, key: Hashable) -> None:
        if key in self.metas and key not in self.held:
            self.held.add(key)
            self.policy.hold(self.metas[key])

    def release(self, key: Hashable) -> None:
        if key in self.held:
            self.held.remove(key)
            self.policy.release(self.metas[key])


class Adaptive(EvictionPolicy):
    """Each member runs in a shadow of the cache; the real one follows the best shadow.

    Adaptive Caches (Subramanian, Smaragdakis and Loh, MICRO 2006,
    https://doi.org/10.1109/MICRO.2006.7): the victim is a block that the leader no longer has, if
    there is one, else the leader's own next victim. So the cache turns into what the leader would
    hold, and pays for a change of leader only as blocks are needed.
    members: policies to choose among, as names or instances (default lru, arc, s3fifo, mq, pgdsf).
    memory: accesses after which a miss counts half in the comparison (default 20000).
    Differs: misses fade instead of being counted in a fixed window, pins hold in the shadows too,
    and one cache is followed as a whole, not each set of it. Costs a shadow access per member.
    """

    name = "adaptive"

    def __init__(
        self,
        members: Sequence[str | EvictionPolicy] = ("lru", "arc", "s3fifo", "mq", "pgdsf"),
        memory: int = 20_000,
    ):
        if not members or memory < 1:
            raise BadInput("policy.members", list(members), "name at least one, and memory >= 1")
        self.memory = memory
        made = [by_name(m) if isinstance(m, str) else m for m in members]
        for member in made:
            refuse_expiring("policy.members", member)
        self.asks = tuple(dict.fromkeys(field for member in made for field in member.asks))
        self._shadows = [Shadow(policy) for policy in made]
        self._strangers: list[OrderedDict[BlockId, None]] = [OrderedDict() for _ in made]
        self._key: dict[BlockId, Hashable] = {}  # of known blocks, held ones included
        self._at: dict[Hashable, BlockId] = {}
        self._held: set[BlockId] = set()
        self._accesses = 0
        self.followed = [0] * len(made)  # victims chosen under each member, for reports

    def resize(self, capacity):
        super().resize(capacity)
        for shadow in self._shadows:
            shadow.policy.resize(capacity)

    @property
    def leader(self) -> int:
        """Index of the member with fewest misses lately, the first of equals."""
        misses = [shadow.misses for shadow in self._shadows]
        return misses.index(min(misses))

    def add(self, meta):
        key = meta.content
        if key is None or key in self._at:
            key = ("alone", meta.id, meta.born)  # nothing to tell it by, or a second copy
        self._key[meta.id], self._at[key] = key, meta.id
        self._access(key, meta)

    def touch(self, meta):
        self._access(self._key[meta.id], meta)

    def _access(self, key, meta):
        self._accesses += 1
        if self._accesses % self.memory == 0:
            for shadow in self._shadows:
                shadow.misses /= 2
        held = meta.id in self._held
        for shadow, strangers in zip(self._shadows, self._strangers):
            if not shadow.access(key, meta, self._accesses, held):
                shadow.misses += 1
                strangers.pop(meta.id, None)
                self._shrink(shadow, strangers)

    def _shrink(self, shadow, strangers):
        """Keep a shadow within the cache's size, as far as pins allow."""
        limit = self.capacity or len(self._key)
        while len(shadow.metas) > limit and len(shadow.policy):
            id = self._at.get(shadow.pop())
            if id is not None and id not in self._held:
                strangers[id] = None

    def rescore(self, meta):
        for shadow in self._shadows:
            own = shadow.metas.get(self._key[meta.id])
            if own is not None:
                own.score = meta.score
                shadow.policy.rescore(own)

    def remove(self, meta):
        if meta.id in self._key:
            self._forget(meta.id)

    def _forget(self, id):
        key = self._key.pop(id)
        del self._at[key]
        self._held.discard(id)
        for shadow, strangers in zip(self._shadows, self._strangers):
            strangers.pop(id, None)
            shadow.release(key)

    def hold(self, meta):
        self._held.add(meta.id)
        for shadow, strangers in zip(self._shadows, self._strangers):
            strangers.pop(meta.id, None)
            shadow.hold(self._key[meta.id])

    def release(self, meta):
        key = self._key[meta.id]
        self._held.discard(meta.id)
        for shadow, strangers in zip(self._shadows, self._strangers):
            shadow.release(key)
            self._shrink(shadow, strangers)
            if key not in shadow.metas:
                strangers[meta.id] = None

    def pop(self):
        if not len(self):
            raise nothing()
        leader = self.leader
        self.followed[leader] += 1
        id = self._choose(self._shadows[leader], self._strangers[leader])
        self._forget(id)
        return id

    def _choose(self, shadow, strangers):
        if strangers:
            return next(iter(strangers))
        while len(shadow.policy):
            id = self._at.get(shadow.pop())
            if id is not None and id not in self._held:
                return id
        return min(id for id in self._key if id not in self._held)

    def begin(self, moment):
        for shadow in self._shadows:
            shadow.policy.begin(moment)
        return ()

    def tick(self, step):
        for shadow in self._shadows:
            shadow.policy.tick(step)

    def __len__(self):
        return len(self._key) - len(self._held)

    def __contains__(self, id):
        return id in self._key and id not in self._held
