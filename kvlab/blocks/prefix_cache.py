"""Prefixes kept for whoever asks next: the index of sealed blocks, with pins in the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.prefix import NoPrefix
from kvlab.blocks.states import SEALED
from kvlab.core import BlockId, KvlabError

OWNER = "prefix"  # owner of blocks that belong to no sequence


class PrefixHandle:
    """Pinned blocks of a prefix, head first; safe to read until `release_prefix`."""

    __slots__ = ("ids", "tokens", "pinned")

    def __init__(self, ids: list[BlockId], tokens: int, pinned: bool):
        self.ids, self.tokens, self.pinned = ids, tokens, pinned


class PrefixCache:
    """What is kept in one ledger under one index.

    Reference counts are the ledger's pins: a block is evictable when the last handle is released.
    Evicted blocks leave through `evict`, which keeps ledger and index in step.
    """

    def __init__(self, ledger: BlockLedger, index: NoPrefix):
        self.ledger, self.index = ledger, index

    def attach_prefix(self, token_ids: Sequence[int]) -> PrefixHandle:
        """Find and pin the longest run of whole blocks that is there; possibly none.

        Metadata is touched tail first, so that the tail is the first to leave again.
        """
        ids = self.index.match(token_ids)
        self.ledger.pin(ids)
        self.ledger.touch(ids[::-1])
        return PrefixHandle(ids, len(ids) * self.index.block_size, True)

    def cache_prefix(
        self, token_ids: Sequence[int], ids: Sequence[BlockId], pin: bool = True
    ) -> PrefixHandle:
        """Keep sealed blocks that hold the first whole blocks of `token_ids`.

        The prefix cache becomes their owner. Where a content is there already the earlier block is
        kept and the caller's is freed, so the caller continues with the handle's `ids`. With `pin`
        they stay until `release_prefix`, else as long as the policy leaves them.
        """
        for id in ids:
            if id is not None and self.ledger.state(id) != SEALED:
                raise KvlabError(f"block {id} is not sealed; only sealed blocks can be shared")
        known = self.index.insert(token_ids, ids)
        if pin:
            self.ledger.pin(known)
        self.ledger.free([own for own, kept in zip(ids, known) if own != kept])
        for id in known:
            self.ledger.meta(id).owner = OWNER
        return PrefixHandle(known, len(known) * self.index.block_size, pin)

    def release_prefix(self, handle: PrefixHandle) -> None:
        """Unpin a handle's blocks, tail first. A second release does nothing."""
        if handle.pinned:
            handle.pinned = False
            self.ledger.unpin(handle.ids[::-1])

    def evict(self, count: int, coming: Sequence[int | None] = ()) -> list[BlockId]:
        """Choose victims and forget their content; they are LEAVING, the caller frees them."""
        victims = self.ledger.reclaim(count, coming)
        for id in victims:
            self.index.forget(id)
        return victims

    def drop(self, ids: Sequence[BlockId]) -> None:
        """Forget blocks and free them, tail first; pinned ones become free at their last unpin."""
        for id in ids:
            self.index.forget(id)
        self.ledger.free(ids[::-1])
