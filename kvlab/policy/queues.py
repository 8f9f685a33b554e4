"""What the policies built of queues share: where a block stands, pinned or not, and ghost lists."""

from __future__ import annotations

from collections import OrderedDict

from kvlab.core import BlockId
from kvlab.policy.base import BlockMeta, EvictionPolicy
from kvlab.policy.line import Line


class Ghosts:
    """Contents evicted lately, oldest first, each with a number to remember."""

    __slots__ = ("_gone",)

    def __init__(self):
        self._gone: OrderedDict[int, int] = OrderedDict()

    def remember(self, content: int | None, value: int, limit: int) -> None:
        """Note an evicted content and forget the oldest beyond the limit; None is not noted."""
        if content is None:
            return
        gone = self._gone
        if content in gone:
            del gone[content]
        gone[content] = value
        while len(gone) > limit:
            gone.popitem(False)

    def recall(self, content: int | None) -> int | None:
        """The number remembered with a content, which is then forgotten; None if unknown."""
        return self._gone.pop(content, None)

    def drop_oldest(self) -> None:
        if self._gone:
            self._gone.popitem(False)

    def __len__(self):
        return len(self._gone)

    def __contains__(self, content):
        return content in self._gone


class QueuePolicy(EvictionPolicy):
    """A policy whose state is the line that a block stands in, its place there, and `meta.uses`.

    A pinned block keeps all three: it is out of the line's reach, counts in `Line.size`, may move
    to another line when touched, and comes back to its place. Subclasses write `add`, `touch`
    and `pop`, and give their lines to `__init__`.
    """

    def __init__(self, lines: list[Line]):
        self._lines = lines
        self._held: set[BlockId] = set()
        self._entries = 0  # entries into lines so far: the places, rising

    def _enter(self, meta: BlockMeta, line: Line) -> None:
        """Put a block that stands nowhere at the end of a line."""
        self._entries += 1
        meta.place = self._entries
        if meta.id in self._held:
            meta.line = line
            line.size += 1
        else:
            line.push(meta)

    def _leave(self, meta: BlockMeta) -> None:
        """Take a block out of the line where it stands, held or not."""
        if meta.id in self._held:
            meta.line.size -= 1
            meta.line = None
        else:
            meta.line.remove(meta)

    def remove(self, meta):
        if meta.line is not None:
            self._leave(meta)
            self._held.discard(meta.id)

    def hold(self, meta):
        meta.line.hold(meta)
        self._held.add(meta.id)

    def release(self, meta):
        self._held.remove(meta.id)
        meta.line.release(meta)

    @property
    def _blocks(self) -> int:
        """Size of the cache in blocks; where it is unbounded, what is there now."""
        return self.capacity or sum(line.size for line in self._lines)

    def __len__(self):
        return sum(map(len, self._lines))

    def __contains__(self, id):
        return any(id in line for line in self._lines)
