"""Policies that promote lazily, on FIFO queues: SIEVE and S3-FIFO."""

from __future__ import annotations

from kvlab.core import BadInput
from kvlab.policy.line import Line
from kvlab.policy.queues import Ghosts, QueuePolicy


class SIEVE(QueuePolicy):
    """A hand sweeps a FIFO queue from old to new; it spares what was used since its last visit.

    Zhang et al., NSDI 2024 (https://www.usenix.org/conference/nsdi24/presentation/zhang-yazhuo).
    No parameters. Differs in form only: the queue is kept as the part ahead of the hand, where new
    blocks enter, and the part behind it; when the first is empty, the hand starts over. The hand
    passes over a pinned block, which keeps its mark.
    """

    name = "sieve"

    def __init__(self):
        self._ahead, self._behind = Line(), Line()
        super().__init__([self._ahead, self._behind])

    def add(self, meta):
        meta.uses = 0
        if not self._ahead:
            self._turn()
        self._enter(meta, self._ahead)

    def touch(self, meta):
        meta.uses = 1

    def pop(self):
        while True:
            if not self._ahead:
                self._turn()
            meta = self._ahead.pop()
            if not meta.uses:
                return meta.id
            meta.uses = 0
            self._enter(meta, self._behind)

    def _turn(self):
        self._ahead, self._behind = self._behind, self._ahead


class S3FIFO(QueuePolicy):
    """New blocks prove themselves in a small FIFO queue; only those used pass into the main one.

    Yang et al., SOSP 2023 (https://dl.acm.org/doi/10.1145/3600006.3613147).
    small: share of the cache for the small queue (default 0.1).
    ghosts: contents remembered after leaving the small queue, as a share of the cache (0.9).
    promote: hits that carry a block from the small queue to the main one (2).
    Differs from the paper as libCacheSim does: until the first eviction, a full small queue
    overflows into the main one.
    """

    name = "s3fifo"

    def __init__(self, small: float = 0.1, ghosts: float = 0.9, promote: int = 2):
        if not 0 < small < 1:
            raise BadInput("policy.small", small, "must lie between 0 and 1, both excluded")
        self.small, self.ghosts, self.promote = small, ghosts, promote
        self._small, self._main, self._ghosts = Line(), Line(), Ghosts()
        self._evicted = False
        super().__init__([self._small, self._main])

    def add(self, meta):
        meta.uses = 0
        proven = self._ghosts.recall(meta.content)
        if proven or not self._evicted and self._small.size >= int(self.small * self._blocks):
            self._enter(meta, self._main)
        else:
            self._enter(meta, self._small)

    def touch(self, meta):
        if meta.uses < 3:
            meta.uses += 1

    def pop(self):
        self._evicted = True
        blocks = self._blocks
        room = blocks - int(self.small * blocks)
        while True:
            if not self._small or self._main.size > room and self._main:
                return self._from_main().id
            meta = self._from_small()
            if meta is not None:
                self._ghosts.remember(meta.content, 1, int(self.ghosts * blocks))
                return meta.id

    def _from_small(self):
        """The first unproven block; None if all of the small queue went to the main one."""
        while self._small:
            meta = self._small.pop()
            if meta.uses < self.promote:
                return meta
            meta.uses = 0
            self._enter(meta, self._main)
        return None

    def _from_main(self):
        """The first block without credit; each one passed over pays one hit."""
        while True:
            meta = self._main.pop()
            if not meta.uses:
                return meta
            meta.uses -= 1
            self._enter(meta, self._main)
