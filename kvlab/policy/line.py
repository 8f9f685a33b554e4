"""A queue of blocks in the order of `meta.place`, for policies built of queues.

Nearly every block enters at the end, since its place is the newest stamp. One that was pinned and
comes back late belongs in the middle: it waits in a heap beside the queue, and `pop` takes the
smaller of the two heads. So a pin never changes the order, and the usual case is a dict operation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heappop, heappush
from operator import attrgetter

from kvlab.core import BlockId
from kvlab.policy.base import BlockMeta

_ID = attrgetter("id")


class Line:
    """Blocks by rising `place`, ties by id. O(1) a verb, O(log n) for late ones.

    The policy sets `place` before `push`, and leaves it alone while the block is here; `meta.line`
    says where a block stands, held ones included. `size` counts all these, `len` only those that
    `pop` can give.
    """

    __slots__ = ("size", "_queue", "_newest", "_late", "_heap")

    def __init__(self):
        self.size = 0
        self._queue: OrderedDict[BlockId, BlockMeta] = OrderedDict()
        self._newest = -1  # no place in the queue is greater
        self._late: dict[BlockId, BlockMeta] = {}
        self._heap: list[tuple[int, BlockId]] = []  # of `_late`, deleted lazily

    def push(self, meta: BlockMeta) -> None:
        """Enter a block that is not here."""
        self.size += 1
        meta.line = self
        if meta.place > self._newest:
            self._newest = meta.place
            self._queue[meta.id] = meta
        else:
            self._late[meta.id] = meta
            heappush(self._heap, (meta.place, meta.id))

    def extend(self, metas: Sequence[BlockMeta]) -> None:
        """`push` each; their places rise."""
        if not metas or metas[0].place <= self._newest:
            for meta in metas:
                self.push(meta)
            return
        for meta in metas:
            meta.line = self
        self.size += len(metas)
        self._newest = metas[-1].place
        self._queue.update(zip(map(_ID, metas), metas))

    def take(self, count: int) -> list[BlockId]:
        """The ids that `pop` gives so many times; there are as many."""
        if self._late:
            return [self.pop().id for _ in range(count)]
        popitem = self._queue.popitem
        taken = [popitem(False) for _ in range(count)]
        for _, meta in taken:
            meta.line = None
        self.size -= count
        return [id for id, _ in taken]

    def renew(self, meta: BlockMeta, place: int) -> bool:
        """Move a block to a later place; false, and nothing done, if it is not here."""
        if meta.id in self._queue and place > self._newest:
            meta.place = self._newest = place
            self._queue.move_to_end(meta.id)
            return True
        if self.remove(meta):
            meta.place = place
            self.push(meta)
            return True
        return False

    def remove(self, meta: BlockMeta) -> bool:
        """Take a block out; says whether it was here."""
        if self._queue.pop(meta.id, None) or self._late.pop(meta.id, None):
            self.size -= 1
            meta.line = None
            return True
        return False

    def remove_all(self, metas: Sequence[BlockMeta]) -> None:
        """`remove` each."""
        pop, late = self._queue.pop, self._late
        for meta in metas:
            if pop(meta.id, None) or late and late.pop(meta.id, None):
                self.size -= 1
                meta.line = None

    def hold(self, meta: BlockMeta) -> bool:
        """Hide a block that keeps standing here; says whether it was here."""
        return bool(self._queue.pop(meta.id, None) or self._late.pop(meta.id, None))

    def release(self, meta: BlockMeta) -> None:
        """Show a held block again, at its place."""
        self.size -= 1
        self.push(meta)

    def pop(self) -> BlockMeta | None:
        """Take out the block of smallest place; None when there is none."""
        if self._late and self._late_is_first():
            meta = self._late.pop(heappop(self._heap)[1])
        else:
            try:
                meta = self._queue.popitem(False)[1]
            except KeyError:
                return None
        self.size -= 1
        meta.line = None
        return meta

    def head(self) -> BlockMeta:
        """What `pop` would give; the line must not be empty."""
        if self._late and self._late_is_first():
            return self._late[self._heap[0][1]]
        return self._queue[next(iter(self._queue))]

    def _late_is_first(self):
        heap, late = self._heap, self._late
        while heap[0][1] not in late or late[heap[0][1]].place != heap[0][0]:
            heappop(heap)  # left, or came back at another place
        if not self._queue:
            return True
        id = next(iter(self._queue))
        return heap[0] < (self._queue[id].place, id)

    def __len__(self):
        return len(self._queue) + len(self._late)

    def __contains__(self, id):
        return id in self._queue or id in self._late
