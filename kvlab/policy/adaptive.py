"""The adaptive chooser: follow whichever of several policies would have missed least lately."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy

from kvlab.core import BadInput, BlockId
from kvlab.policy.base import BlockMeta, EvictionPolicy, by_name, nothing
from kvlab.policy.moment import Moment, refuse_expiring
from kvlab.policy.shadows import Shadow, followed, share_of

USES_TOLD = 3  # of a block, to a new leader


class Adaptive(EvictionPolicy):
    """Each member runs in a shadow of the cache; the real one does as the best of them would.

    Chosen by shadow directories, as Adaptive Caches are (Subramanian, Smaragdakis and Loh, MICRO
    2006, https://doi.org/10.1109/MICRO.2006.7). A change of leader costs about as many misses as
    the cache has blocks, so the leader stays until it has missed `patience` cache sizes more than
    the best: what is lost by waiting is then of the order of what the change costs, as in the
    rent-or-buy problem. A new leader is told each block, the least recent first, and how often it
    was used (three times at most).
    members: policies to choose among, as names or instances, the first leads at first.
    memory: cache sizes of accesses after which a miss counts half.
    patience: misses behind the best that end a lead, in cache sizes.
    floor: blocks that a shadow has at least: a cache of twice as many is followed by every second
    content, and so on.
    Differs: shadows take whole requests (what is used between two ticks), prefixes included.
    """

    name = "adaptive"

    def __init__(
        self,
        members: Sequence[str | EvictionPolicy] = ("lru", "arc", "s3fifo", "mq", "pgdsf"),
        memory: float = 4.0,
        patience: float = 0.05,
        floor: int = 1024,
    ):
        if not members or not memory > 0 or not patience >= 0 or floor < 1:
            remedy = "name at least one; memory > 0, patience >= 0, floor >= 1"
            raise BadInput("policy.members", list(members), remedy)
        self.members = [by_name(m) if isinstance(m, str) else m for m in members]
        for member in self.members:
            refuse_expiring("policy.members", member)
        self.memory, self.patience, self.floor = memory, patience, floor
        asks = (field for member in self.members for field in member.asks)
        self.asks = tuple(dict.fromkeys(asks))
        self.followed = [0] * len(self.members)  # victims chosen under each member, for reports
        self._known: dict[BlockId, BlockMeta] = {}
        self._held: set[BlockId] = set()
        self._group: list[BlockMeta] = []  # used since the last tick
        self._ticks = False
        self.resize(None)

    def resize(self, capacity):
        super().resize(capacity)
        self.share = share_of(capacity, self.floor)
        room = None if capacity is None else max(1, capacity // self.share)
        self.choice = Choice(self, capacity)
        self._shadows = [Shadow(member, room, self.share) for member in self.members]
        self._follow(0)

    def _follow(self, leader: int) -> None:
        """Start the leader afresh and tell it of all blocks."""
        self.leader, self._policy = leader, deepcopy(self.members[leader])
        self._policy.resize(self.capacity)
        policy = self._policy
        for meta in sorted(self._known.values(), key=lambda meta: meta.last):
            meta.line, meta.place, meta.uses = None, 0, 0
            policy.add(meta)
            for _ in range(min(meta.hits, USES_TOLD)):
                policy.touch(meta)
            if meta.id in self._held:
                policy.hold(meta)

    # ---- requests

    def begin(self, moment: Moment):
        for shadow in self._shadows:
            shadow.policy.begin(moment)
        return self._policy.begin(moment)

    def tick(self, step):
        self._policy.tick(step)
        if self._group or self._ticks:
            self._end_request()
        self._ticks = True

    def _end_request(self) -> None:
        """What was used goes to the shadows; the leader may change."""
        used: dict[Hashable, BlockMeta] = {}
        for meta in reversed(self._group):  # tails are used first
            used.setdefault(_key(meta), meta)
        self._group.clear()
        mine = {key: meta for key, meta in used.items() if followed(key, self.share)}
        keys, facts, limit = list(mine), list(mine.values()), max(len(self._known), 1)
        missed = [shadow.request(keys, facts, limit) for shadow in self._shadows]
        leader = self.choice.hear(missed, len(used), self.capacity or limit)
        if leader != self.leader:
            self._follow(leader)

    def _use(self, meta):
        self._group.append(meta)
        if not self._ticks and not meta.depth:  # nobody says when a request ends; its head is last
            self._end_request()

    # ---- blocks

    def add(self, meta):
        self._known[meta.id] = meta
        self._policy.add(meta)
        self._use(meta)

    def touch(self, meta):
        self._policy.touch(meta)
        self._use(meta)

    def remove(self, meta):
        if self._known.pop(meta.id, None) is not None:
            self._held.discard(meta.id)
            self._policy.remove(meta)

    def hold(self, meta):
        self._held.add(meta.id)
        self._policy.hold(meta)

    def release(self, meta):
        self._held.discard(meta.id)
        self._policy.release(meta)

    def rescore(self, meta):
        self._policy.rescore(meta)

    def expect(self, content):
        self._policy.expect(content)

    def pop(self):
        if not len(self):
            raise nothing()
        self.followed[self.leader] += 1
        id = self._policy.pop()
        meta = self._known.pop(id)
        if self._group:  # its number may come again at once
            self._group = [used for used in self._group if used is not meta]
        return id

    def __len__(self):
        return len(self._policy)

    def __contains__(self, id):
        return id in self._policy


def _key(meta: BlockMeta) -> Hashable:
    """What a content is known by: one that has no name is not seen again once it is gone."""
    return ("alone", meta.id, meta.born) if meta.content is None else meta.content


class Choice:
    """Who leads, from the misses of all shadows: in a replay of arrays as well."""

    def __init__(self, policy: Adaptive, capacity: int | None):
        self._policy, self.share = policy, share_of(capacity, policy.floor)
        self.misses = [0.0] * len(policy.members)
        self.leader, self._accesses = 0, 0

    def hear(self, missed: Sequence[int], accesses: int, capacity: int) -> int:
        """Who leads after a request of so many accesses. missed: followed contents, by member."""
        self._accesses += accesses
        misses = self.misses = [old + new for old, new in zip(self.misses, missed)]
        best = misses.index(min(misses))
        behind = (misses[self.leader] - misses[best]) * self.share
        if behind > self._policy.patience * capacity:
            self.leader = best
        if self._accesses >= self._policy.memory * capacity:
            self._accesses = 0
            self.misses = [old / 2 for old in misses]
        return self.leader
