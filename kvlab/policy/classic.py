"""The textbook policies: FIFO, LRU, LFU, Random."""

from __future__ import annotations

from heapq import heappop, heappush
from random import Random as Generator

from kvlab.core import BlockId, checked_seed
from kvlab.policy.base import BlockMeta, EvictionPolicy, nothing
from kvlab.policy.line import Line


class FIFO(EvictionPolicy):
    """First in, first out: the block sealed longest ago leaves, used or not.

    With a sinks-and-recent window this is StreamingLLM (https://arxiv.org/abs/2309.17453).
    """

    name = "fifo"
    observes = None

    def __init__(self):
        self._line = Line()

    def add(self, meta):
        meta.place = meta.born
        self._line.push(meta)

    def add_all(self, metas):
        for meta in metas:
            meta.place = meta.born
        self._line.extend(metas)

    def remove(self, meta):
        self._line.remove(meta)

    def hold_all(self, metas):
        self._line.remove_all(metas)

    def pop_all(self, count, coming=()):
        if count > len(self._line):
            raise nothing()
        return self._line.take(count)

    def pop(self):
        meta = self._line.pop()
        if meta is None:
            raise nothing()
        return meta.id

    def __len__(self):
        return len(self._line)

    def __contains__(self, id):
        return id in self._line


class LRU(FIFO):
    """Least recently used: the block whose last touch is oldest leaves.

    Mattson et al. 1970 (https://doi.org/10.1147/sj.92.0078). What vLLM and SGLang do by default.
    Blocks touched together are told apart by the order of the touch: a prefix touched tail first
    loses its tail first, which evicts only leaves of the prefix tree.
    """

    name = "lru"
    observes = "mass"

    def add(self, meta):
        meta.place = meta.last
        self._line.push(meta)

    def add_all(self, metas):
        for meta in metas:
            meta.place = meta.last
        self._line.extend(metas)

    def release_all(self, metas):
        last = -1
        for meta in metas:
            if meta.last <= last:  # they come back in another order than they were used in
                for one in metas:
                    self.add(one)
                return
            meta.place = last = meta.last
        self._line.extend(metas)

    def touch(self, meta):
        self._line.renew(meta, meta.last)

    def touch_all(self, metas):
        line = self._line
        for meta in metas:
            if meta.line is line:  # a held one has no place until it comes back
                line.renew(meta, meta.last)


class LFU(EvictionPolicy):
    """Least frequently used: the block with fewest hits leaves, the least recent of them first.

    Counts start anew when a block returns (in-cache LFU). One `Line` per number of hits, as in
    Shah, Mitra and Matani 2010 (http://dhruvbird.com/lfu.pdf), so every verb is O(1).
    """

    name = "lfu"

    def __init__(self):
        self._lines: dict[int, Line] = {}  # by hits
        self._counts: list[int] = []  # heap of the keys of `_lines`, deleted lazily
        self._length = 0

    def add(self, meta):
        self._length += 1
        self._stand(meta)

    def _stand(self, meta):
        """Put a block at the end of the line of its hits."""
        hits, meta.place = self._rank(meta)
        meta.uses = hits
        line = self._lines.get(hits)
        if line is None:
            line = self._open(hits)
        line.push(meta)

    def _rank(self, meta) -> tuple[int, int]:
        """Uses, and the step of the last one."""
        return meta.hits, meta.last

    def _open(self, hits):
        line = self._lines[hits] = Line()
        if len(self._counts) > 2 * len(self._lines) + 64:
            self._counts = sorted(self._lines)
        else:
            heappush(self._counts, hits)
        return line

    def _leave(self, meta):
        line = meta.line
        line.remove(meta)
        if not line.size and meta.uses:  # the line of the unused stays: it fills again at once
            del self._lines[meta.uses]

    def remove(self, meta):
        if meta.line is not None:
            self._length -= 1
            self._leave(meta)

    def touch(self, meta):
        if meta.line is not None:
            self._leave(meta)
            self._stand(meta)

    def pop(self):
        counts, lines = self._counts, self._lines
        while counts:
            line = lines.get(counts[0])
            meta = None if line is None else line.pop()
            if meta is not None:
                self._length -= 1
                return meta.id
            lines.pop(heappop(counts), None)
        raise nothing()

    def __len__(self):
        return self._length

    def __contains__(self, id):
        return any(id in line for line in self._lines.values())


class Random(EvictionPolicy):
    """Any evictable block with equal chance; the floor that a policy must beat.

    seed: of its own generator, so that a run repeats (default 0).
    """

    name = "random"
    control = True
    observes = None
    by_token = "random"

    def __init__(self, seed: int = 0):
        self._generator = Generator(checked_seed("policy.seed", seed))
        self._ids: list[BlockId] = []
        self._at: dict[BlockId, int] = {}

    def generator_state(self) -> tuple[int, ...]:
        """The Mersenne Twister behind the draws: 624 words, and how many of them are used up."""
        return self._generator.getstate()[1]

    def add(self, meta: BlockMeta):
        self._at[meta.id] = len(self._ids)
        self._ids.append(meta.id)

    def remove(self, meta):
        at = self._at.pop(meta.id, None)
        if at is not None:
            self._fill(at)

    def _fill(self, at):
        """Close the gap at an index with the last block."""
        last = self._ids.pop()
        if at < len(self._ids):
            self._ids[at] = last
            self._at[last] = at

    def pop(self):
        if not self._ids:
            raise nothing()
        at = int(self._generator.random() * len(self._ids))
        id = self._ids[at]
        del self._at[id]
        self._fill(at)
        return id

    def __len__(self):
        return len(self._ids)

    def __contains__(self, id):
        return id in self._at
