"""States of a block, and what must hold of all of them together."""

from __future__ import annotations

from kvlab.core import BlockId, KvlabError
from kvlab.policy import BlockMeta, EvictionPolicy

FREE, OPEN, SEALED, LEAVING = range(4)
STATES = ("free", "open", "sealed", "leaving")


class BlockStateError(KvlabError):
    """A verb was used on a block in the wrong state: an error of the caller, not of the user."""

    def __init__(self, verb: str, meta: BlockMeta | None, id: BlockId):
        state = "unknown" if meta is None else STATES[meta.state]
        pins = 0 if meta is None else meta.pins
        super().__init__(f"cannot {verb} block {id}: it is {state} with {pins} pins")


def check_books(
    metas: list[BlockMeta], freed: list[BlockId], capacity: int | None, policy: EvictionPolicy
) -> None:
    """Raise AssertionError where the books of a ledger contradict each other. O(blocks)."""
    free = {meta.id for meta in metas if meta.state == FREE}
    assert sorted(free) == sorted(freed), "the free list holds the free blocks, once each"
    assert capacity is None or len(metas) <= capacity, "ids lie below the capacity"
    for meta in metas:
        assert meta.pins >= 0, f"block {meta.id} has {meta.pins} pins"
        assert meta.state != FREE or not meta.pins, f"block {meta.id} is free and pinned"
        assert meta.pins or not meta.doomed, f"block {meta.id} should be free since its last unpin"
    offered = [m.id for m in metas if m.state == SEALED and not m.pins]
    if policy.evicts:
        assert len(policy) == len(offered), "the policy holds as many blocks as are evictable"
        unknown = [id for id in offered if id not in policy]
        assert not unknown, f"evictable blocks {unknown} are unknown to the policy"
