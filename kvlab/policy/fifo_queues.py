"""Policies that promote lazily, on FIFO queues: SIEVE and S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict
from math import inf

from kvlab.core import BadInput, check_number
from kvlab.policy.base import nothing
from kvlab.policy.line import Line
from kvlab.policy.queues import QueuePolicy


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
            meta = self._ahead.pop()
            if meta is None:
                self._turn()
                meta = self._ahead.pop()
            if meta is None:
                raise nothing()
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
    overflows into the main one. Differs from both: room is made before the ghosts are asked about
    what comes in, so that the oldest ghost may be forgotten one eviction too early.
    """

    name = "s3fifo"

    def __init__(self, small: float = 0.1, ghosts: float = 0.9, promote: int = 2):
        if not 0 < small < 1:
            raise BadInput("policy.small", small, "must lie between 0 and 1, both excluded")
        check_number("policy.ghosts", ghosts, 0, whole=False)
        check_number("policy.promote", promote, 0)
        self.small, self.ghosts, self.promote = small, ghosts, promote
        self._small, self._main = Line(), Line()
        self._ghosts: OrderedDict[int, None] = OrderedDict()  # plain, for speed
        self._evicted = False
        super().__init__([self._small, self._main])

    def resize(self, capacity):
        super().resize(capacity)
        self._fit(capacity or 0)
        if capacity is None:
            self._small_room = inf  # nothing overflows before the first eviction

    def _fit(self, blocks):
        self._small_room = int(self.small * blocks)
        self._main_room = blocks - self._small_room
        self._ghost_room = int(self.ghosts * blocks)

    def add(self, meta):
        meta.uses = 0
        if meta.content in self._ghosts and meta.content is not None:
            del self._ghosts[meta.content]
            self._enter(meta, self._main)
        elif self._evicted or self._small.size < self._small_room:
            meta.place = meta.born
            self._small.push(meta)
        else:
            self._enter(meta, self._main)

    def touch(self, meta):
        if meta.uses < 3:
            meta.uses += 1

    def pop(self):
        self._evicted = True
        if self.capacity is None:
            self._fit(self._blocks)
        main, ghosts, promote = self._main, self._ghosts, self.promote
        line = main if main.size > self._main_room else self._small
        while True:
            meta = line.pop()
            if meta is None:
                line = self._other(line)
                continue
            if line is main:
                if not meta.uses:
                    return meta.id
                meta.uses -= 1
            elif meta.uses < promote:
                ghosts[meta.content] = None
                if len(ghosts) > self._ghost_room:
                    ghosts.popitem(False)
                return meta.id
            else:
                meta.uses = 0
            self._entries = meta.place = self._entries + 1
            main.push(meta)

    def _other(self, line):
        other = self._main if line is self._small else self._small
        if not other:
            raise nothing()
        return other
