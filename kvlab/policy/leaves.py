"""Leaf-only eviction for any policy, and PGDSF, which needs it."""

from __future__ import annotations

from kvlab.core import BlockId
from kvlab.policy.base import BlockMeta, EvictionPolicy, by_name, nothing
from kvlab.policy.greedy_dual import CostGDSF
from kvlab.policy.moment import refuse_expiring


class LeafFirst(EvictionPolicy):
    """A block leaves after all known blocks that continue it: nothing is kept that cannot hit.

    What SGLang's radix cache does by its heap of leaves (https://arxiv.org/abs/2312.07104); here
    the member holds a block with a known child as if it were pinned. For LRU and LFU touched tail
    first it changes nothing, since a parent is never less recent than its child.
    member: the policy that chooses among the leaves, a name or an instance (default lru).
    Needs `meta.parent`. If pins leave no leaf, the deepest block that is not pinned leaves.
    """

    name = "leaf_first"

    def __init__(self, member: str | EvictionPolicy = "lru"):
        self.member = by_name(member) if isinstance(member, str) else member
        refuse_expiring("policy.member", self.member)
        self.observes, self.scored = self.member.observes, self.member.scored
        self.asks = self.member.asks
        self._known: dict[BlockId, BlockMeta] = {}
        self._of: dict[int, BlockMeta] = {}  # by content
        self._children: dict[int, int] = {}  # content -> known blocks that continue it
        self._pinned: set[BlockId] = set()

    def resize(self, capacity):
        super().resize(capacity)
        self.member.resize(capacity)

    def add(self, meta):
        self._known[meta.id] = meta
        self.member.add(meta)
        if meta.content is not None:
            self._of.setdefault(meta.content, meta)
        if self._waits(meta):
            self.member.hold(meta)
        if meta.parent is not None:
            self._children[meta.parent] = self._children.get(meta.parent, 0) + 1
            parent = self._of.get(meta.parent)
            if self._children[meta.parent] == 1 and self._mine(parent):
                self.member.hold(parent)

    def _waits(self, meta):
        """Whether a block has known children."""
        return meta.content in self._children and self._of.get(meta.content) is meta

    def _mine(self, meta):
        """Whether a block is there and only children, no pins, decide over it."""
        return meta is not None and meta.id not in self._pinned

    def _forget(self, meta):
        del self._known[meta.id]
        self._pinned.discard(meta.id)
        if self._of.get(meta.content) is meta:
            del self._of[meta.content]
        if meta.parent is not None:
            self._children[meta.parent] -= 1
            if not self._children[meta.parent]:
                del self._children[meta.parent]
                parent = self._of.get(meta.parent)
                if self._mine(parent):
                    self.member.release(parent)

    def remove(self, meta):
        if meta.id in self._known:
            self.member.remove(meta)
            self._forget(meta)

    def hold(self, meta):
        self._pinned.add(meta.id)
        if not self._waits(meta):
            self.member.hold(meta)

    def release(self, meta):
        self._pinned.discard(meta.id)
        if not self._waits(meta):
            self.member.release(meta)

    def touch(self, meta):
        self.member.touch(meta)

    def rescore(self, meta):
        self.member.rescore(meta)

    def begin(self, moment):
        return self.member.begin(moment)

    def expect(self, content):
        self.member.expect(content)

    def tick(self, step):
        self.member.tick(step)

    def pop(self):
        if len(self.member):
            id = self.member.pop()
        else:
            id = self._deepest()
            self.member.remove(self._known[id])
        self._forget(self._known[id])
        return id

    def _deepest(self):
        free = [(-m.depth, m.id) for m in self._known.values() if m.id not in self._pinned]
        if not free:
            raise nothing()
        return min(free)[1]

    def __len__(self):
        return len(self._known) - len(self._pinned)

    def __contains__(self, id):
        return id in self._known and id not in self._pinned


class PGDSF(LeafFirst):
    """GDSF for prefixes: frequency times the cost of computing the block on its prefix, by leaves.

    RAGCache (Jin et al. 2024, https://arxiv.org/abs/2404.12457). No parameters; the caller gives
    `meta.cost` in tokens or FLOPs, and `meta.parent`.
    Differs: blocks weigh one by one, where RAGCache averages measured times over a document.
    """

    name = "pgdsf"

    def __init__(self):
        super().__init__(CostGDSF())
