"""What a cache would hold under another policy: contents, no blocks, fed request by request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from heapq import heappop, heappush

from kvlab.policy.base import BlockMeta, EvictionPolicy

SPREAD, BITS, SHIFT = 0x9E3779B97F4A7C15, (1 << 64) - 1, 40


def share_of(capacity: int | None, floor: int) -> int:
    """One content in so many is followed, a power of two: a shadow has `floor` blocks or more."""
    share = 1
    while capacity is not None and capacity // (2 * share) >= floor:
        share *= 2
    return share


def followed(key: Hashable, share: int) -> bool:
    """Whether a content is one of those that shadows follow: by its spread bits, as SHARDS does
    (Waldspurger et al., FAST 2015), so that it is followed always or never."""
    if share == 1:
        return True
    number = key if isinstance(key, int) else key[-1]
    return not ((number * SPREAD & BITS) >> SHIFT) & (share - 1)


def thinned(policy: EvictionPolicy, share: int) -> EvictionPolicy:
    """A copy for a shadow that sees one access in `share`: what it measures in accesses shrinks."""
    policy = inner = deepcopy(policy)
    while inner is not None:
        for name in ("lifetime", "half_life"):
            if hasattr(inner, name):
                value = getattr(inner, name)
                setattr(inner, name, type(value)(max(1, value / share)))
        inner = getattr(inner, "member", None)
    return policy


class Shadow:
    """One policy over the followed contents of all requests, in a share of the capacity.

    A request is looked up, held, given room and used as a replay of it would be, so that without
    sampling the misses are those of the policy alone: a block hits where all before it do.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int | None, share: int):
        self.policy, self.capacity = thinned(policy, share), capacity
        self.policy.resize(capacity)
        self._metas: dict[Hashable, BlockMeta] = {}
        self._known: list[tuple[BlockMeta, Hashable]] = []  # by id
        self._free: list[int] = []
        self._now = 0

    def request(self, keys: Sequence[Hashable], facts: Sequence[BlockMeta], limit: int) -> int:
        """Serve contents, head first; how many missed. facts: the blocks that hold them in the
        cache itself. limit: blocks, where there is no capacity."""
        metas, policy = self._metas, self.policy
        found = [metas.get(key) for key in keys]
        held = [meta for meta in found if meta is not None]
        capacity = self.capacity or limit
        for meta in held:
            policy.hold(meta)
        if len(keys) > capacity:
            for meta in held:
                policy.release(meta)
            self._tick()
            return len(keys)
        self._make_room([k for k, meta in zip(keys, found) if meta is None], capacity)
        new = []
        for at, (key, meta) in enumerate(zip(keys, found)):
            if meta is None:
                before = keys[at - 1] if at else None
                new.append(self._enter(key, before, facts[at]))
                metas[key] = new[-1]
            else:
                new.append(None)
        for at in range(len(keys) - 1, -1, -1):
            self._use(found[at], new[at], facts[at])
        for meta in reversed(held):
            policy.release(meta)
        self._tick()
        return _misses(found, facts)

    def _tick(self):
        self._now += 1
        self.policy.tick(self._now)

    def _make_room(self, coming: list[Hashable], capacity: int) -> None:
        short = len(coming) + len(self._metas) - capacity
        for key in reversed(coming[: max(short, 0)]):
            if isinstance(key, int):
                self.policy.expect(key)
            id = self.policy.pop()
            del self._metas[self._known[id][1]]
            heappush(self._free, id)

    def _enter(self, key, before, real: BlockMeta) -> BlockMeta:
        if self._free:
            meta = self._known[heappop(self._free)][0]
            self._known[meta.id] = meta, key
        else:
            meta = BlockMeta(len(self._known))
            self._known.append((meta, key))
        meta.content, meta.parent, meta.depth = real.content, before, real.depth
        meta.cost, meta.size = real.cost, real.size
        meta.hits, meta.line = 0, None
        return meta

    def _use(self, known: BlockMeta | None, new: BlockMeta | None, real: BlockMeta) -> None:
        self._now += 1
        meta = new if known is None else known
        meta.score, meta.level, meta.last = real.score, real.level, self._now
        if known is None:
            meta.born = self._now
            self.policy.add(meta)
        else:
            meta.hits += 1
            self.policy.touch(meta)


def _misses(found: Sequence[BlockMeta | None], facts: Sequence[BlockMeta]) -> int:
    """Contents that are not there or behind one that is not; depth 0 begins anew."""
    missed, leading = 0, True
    for meta, real in zip(found, facts):
        leading = meta is not None and (leading or not real.depth)
        missed += not leading
    return missed
