"""Policies of several LRU queues: ARC and MQ."""

from __future__ import annotations

from kvlab.core import check_number
from kvlab.policy.base import BlockMeta, nothing
from kvlab.policy.line import Line
from kvlab.policy.queues import Ghosts, QueuePolicy

PLAIN, ONCE, AGAIN = range(3)  # where ARC found the content that comes next


class ARC(QueuePolicy):
    """Two LRU lists, seen once and seen again, whose sizes follow the hits in their ghosts.

    Megiddo and Modha, FAST 2003
    (https://www.usenix.org/conference/fast-03/arc-self-tuning-low-overhead-replacement-cache).
    No parameters. Differs: where a victim is chosen before it is known what comes in its place
    (no `expect`), a hit in a ghost list moves the target from the next victim on.
    """

    name = "arc"

    def __init__(self):
        self._once, self._again = Line(), Line()  # T1, T2
        self._once_ghosts, self._again_ghosts = Ghosts(), Ghosts()  # B1, B2
        self._target = 0.0  # p: blocks that `_once` should have
        self._found = PLAIN
        self._new: int | None = None  # the last content that `expect` found in no ghost list
        self._expected = Ghosts()  # contents found in a ghost list by `expect`, to be added
        super().__init__([self._once, self._again])

    def expect(self, content):
        self._found = self._recall(content)
        if self._found:
            self._expected.remember(content, 1, self._blocks)
        else:
            self._new = content

    def _recall(self, content):
        """Where a content is remembered; the target moves towards that list."""
        once, again = len(self._once_ghosts), len(self._again_ghosts)
        if self._once_ghosts.recall(content):
            self._learn(max(again / once, 1))
            return ONCE
        if self._again_ghosts.recall(content):
            self._learn(-max(once / again, 1))
            return AGAIN
        return PLAIN

    def _learn(self, change: float) -> None:
        """Move the target, within the cache's size."""
        self._target = min(max(self._target + change, 0), self._blocks)

    def add(self, meta):
        if meta.content is not None and meta.content == self._new:
            self._enter(meta, self._once)
            return
        seen = self._expected.recall(meta.content) or self._recall(meta.content)
        self._enter(meta, self._again if seen else self._once)

    def touch(self, meta):
        self._leave(meta)
        self._enter(meta, self._again)

    def pop(self):
        found, self._found = self._found, PLAIN
        once, target = self._once.size, self._target
        if found == PLAIN:
            if once >= self._blocks and self._once:
                return self._once.pop().id
            self._trim()
        over = once > target or once == target and found == AGAIN
        if self._once and (over or not self._again):
            return self._evict(self._once, self._once_ghosts)
        return self._evict(self._again, self._again_ghosts)

    def _trim(self):
        """Keep T1 + B1 within one cache size and all lists within two."""
        once, blocks = self._once.size + len(self._once_ghosts), self._blocks
        if once >= blocks:
            self._once_ghosts.drop_oldest()
        elif once + self._again.size + len(self._again_ghosts) >= 2 * blocks:
            self._again_ghosts.drop_oldest()

    def _evict(self, line, ghosts):
        meta = line.pop()
        if meta is None:
            raise nothing()
        ghosts.remember(meta.content, 1, 2 * self._blocks)
        return meta.id


class MQ(QueuePolicy):
    """Queues by the logarithm of the frequency; a block not used for a lifetime sinks by one.

    Zhou, Philbin and Li, USENIX ATC 2001 (https://www.usenix.org/legacy/publications/library/
    proceedings/usenix01/full_papers/zhou/zhou.pdf).
    queues: how many (default 8; the last holds all with 2^7 uses and more).
    lifetime: accesses that a block may stay unused in its queue (10000; the paper measures it).
    ghosts: contents remembered with their frequency, in cache sizes (4).
    """

    name = "mq"

    def __init__(self, queues: int = 8, lifetime: int = 10_000, ghosts: float = 4.0):
        check_number("policy.queues", queues, 1, 64)  # by powers of two of uses: more stay empty
        check_number("policy.lifetime", lifetime)
        check_number("policy.ghosts", ghosts, 0, whole=False)
        self.queues, self.lifetime, self.ghosts = queues, lifetime, ghosts
        self._ghosts = Ghosts()
        self._accesses = 0
        self._next_expiry = 0  # no block of an upper queue expires earlier
        super().__init__([Line() for _ in range(queues)])

    def add(self, meta):
        meta.uses = 1 + (self._ghosts.recall(meta.content) or 0)
        self._file(meta)

    def touch(self, meta):
        self._leave(meta)
        meta.uses += 1
        self._file(meta)

    def _file(self, meta: BlockMeta):
        """Put a used block into its queue. An access makes at most one entry into each queue."""
        self._entries = self._accesses * (self.queues + 1)
        self._enter(meta, self._lines[min(meta.uses.bit_length(), self.queues) - 1])
        self._accesses += 1
        if self._accesses > self._next_expiry:
            self._sink()

    def _sink(self):
        """Move the expired head of each queue one queue down, and note the next expiry."""
        now, scale = self._accesses, self.queues + 1
        self._entries = now * scale - self.queues
        expired = (now - self.lifetime) * scale  # places below were entered too long ago
        oldest = (now - 1) * scale
        for lower, upper in zip(self._lines, self._lines[1:]):
            if upper and upper.head().place < expired:
                self._enter(upper.pop(), lower)
            if upper:
                oldest = min(oldest, upper.head().place)
        self._next_expiry = oldest // scale + self.lifetime

    def pop(self):
        for line in self._lines:
            meta = line.pop()
            if meta is not None:
                limit = int(self.ghosts * self._blocks)
                self._ghosts.remember(meta.content, meta.uses, limit)
                return meta.id
        raise nothing()
