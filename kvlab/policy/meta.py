"""The record of a block: what policies go by."""

from __future__ import annotations

from kvlab.core import BlockId


class BlockMeta:
    """What is known of one block; written by the ledger, read by policies.

    content  hash of the tokens up to and with this block, or None; ghost lists remember it
    parent   content of the block before it, None at the head or where unknown
    depth    logical index of the block in its sequence, 0 is the head
    level    user-given priority, higher stays longer
    born     step at which the block was sealed
    last     step of its last touch (`born` if there was none)
    hits     touches since `born`
    cost     what recomputing it takes (tokens or FLOPs, the caller's choice)
    size     blocks it counts for
    score    attention mass averaged over age, or a prefill score
    line, place, uses        the policy's own notes; state, pins, owner, doomed are the ledger's
    """

    __slots__ = (
        "id", "content", "parent", "depth", "level", "born", "last", "hits", "cost", "size",
        "score", "state", "pins", "owner", "doomed", "line", "place", "uses",
    )  # fmt: skip

    def __init__(self, id: BlockId, content=None, depth=0, level=0, born=0, cost=1.0, size=1):
        self.id, self.content, self.depth, self.level = id, content, depth, level
        self.born = self.last = born
        self.hits, self.cost, self.size, self.score = 0, cost, size, 0.0
        self.state, self.pins, self.owner, self.doomed = 0, 0, None, False
        self.line, self.place, self.uses = None, 0, 0
        self.parent: int | None = None

    def __repr__(self):
        return f"BlockMeta({self.id}, content={self.content}, last={self.last}, hits={self.hits})"
