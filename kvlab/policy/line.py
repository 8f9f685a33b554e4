"""A queue ordered by rising keys, for policies built of queues.

Nearly every block enters at the end, since its key is the newest stamp. One that was pinned and
comes back late belongs in the middle: it waits in a heap beside the queue, and `pop` takes the
smaller of the two heads. So a pin never changes the order, and the usual case is a dict operation.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush

from kvlab.core import BlockId


class Line:
    """Blocks in the order of their keys, ties by id. Push and remove O(1), or O(log n) late."""

    __slots__ = ("_queue", "_newest", "_late", "_heap", "held")

    def __init__(self):
        self._queue: OrderedDict[BlockId, int] = OrderedDict()
        self._newest = -1  # no key in the queue is greater
        self._late: dict[BlockId, int] = {}
        self._heap: list[tuple[int, BlockId]] = []  # of `_late`, deleted lazily
        self.held = 0  # blocks that belong here but are pinned; kept by the policy

    def push(self, id: BlockId, key: int) -> None:
        """Enter a block that is not in the line."""
        if key > self._newest:
            self._queue[id] = self._newest = key
        else:
            self._late[id] = key
            heappush(self._heap, (key, id))

    def remove(self, id: BlockId) -> bool:
        """Take a block out; says whether it was there."""
        if self._queue.pop(id, None) is not None:
            return True
        return self._late.pop(id, None) is not None

    def pop(self) -> BlockId:
        """Take out the block of smallest key; IndexError when empty."""
        if self._late:
            self._settle()
            if self._late and self._late_is_first():
                return self._pop_late()
        if not self._queue:
            raise IndexError("pop from an empty line")
        return self._queue.popitem(False)[0]

    def first(self) -> tuple[int, BlockId]:
        """Key and id of what `pop` would return; IndexError when empty."""
        self._settle()
        heads = [self._heap[0]] if self._late else []
        if self._queue:
            id = next(iter(self._queue))
            heads.append((self._queue[id], id))
        if not heads:
            raise IndexError("first of an empty line")
        return min(heads)

    def _settle(self):
        """Drop heap entries of blocks that are no longer late, or late under another key."""
        heap, late = self._heap, self._late
        while heap and late.get(heap[0][1]) != heap[0][0]:
            heappop(heap)

    def _late_is_first(self):
        if not self._queue:
            return True
        id = next(iter(self._queue))
        return self._heap[0] < (self._queue[id], id)

    def _pop_late(self):
        id = heappop(self._heap)[1]
        del self._late[id]
        return id

    @property
    def size(self) -> int:
        """Blocks that belong here, pinned ones included."""
        return len(self._queue) + len(self._late) + self.held

    def __len__(self):
        return len(self._queue) + len(self._late)

    def __bool__(self):
        return bool(self._queue or self._late)

    def __contains__(self, id):
        return id in self._queue or id in self._late
