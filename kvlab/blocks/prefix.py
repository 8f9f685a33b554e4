"""Axis `prefix`: which sealed blocks already hold the beginning of a token sequence.

A block is named by a chained hash: of its tokens and of the block before it, the chain beginning
with the identity of model, format and block size. Equal names mean equal bytes, and since 64 bits
can collide, a match compares the token ids too.

Only blocks computed with no hole before them belong here: what a block holds depends on all that
its tokens attended to.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Sequence

from xxhash import xxh3_64_intdigest

from kvlab.blocks.chain import Chain, origin
from kvlab.core import BadInput, BlockId


def chained_hashes(identity: str, block_size: int, token_ids: Sequence[int]) -> list[int]:
    """Content of each whole block of a sequence: what `BlockLedger.seal` wants as `content`."""
    return Chain(identity, block_size, token_ids).names()


class _Node:
    """One block of some sequence. It stays while it or a block after it is held."""

    __slots__ = ("name", "tokens", "parent", "children", "id")

    def __init__(self, name, tokens, parent):
        self.name, self.tokens, self.parent = name, tokens, parent
        self.children, self.id = 0, None


class PrefixIndex:
    """Hash table of chained hashes, as in vLLM; O(1) a block.

    identity: model, format and whatever else decides what the bytes of a block are.
    block_size: tokens. A block whose parent was evicted stays known and is found again when the
    parent comes back.
    """

    def __init__(self, identity: str = "", block_size: int = 16):
        if block_size < 1:
            raise BadInput("cache.block_size", block_size, "must be at least 1 token")
        self.identity, self.block_size = identity, block_size
        self._origin = origin(identity, block_size)
        self._nodes: dict[int, list[_Node]] = {}  # name -> nodes; more than one is a collision
        self._held: dict[BlockId, _Node] = {}
        self.changes = 0  # so that whoever keeps a `lookup` knows when it is stale
        self.added = 0  # contents made known so far

    def lookup(self, chain: Chain) -> list[BlockId | None]:
        """Block of each whole block of a chain, None where it is not held.

        What stands behind a None is of no use until the gap is computed.
        """
        ids, node, nodes = [], None, self._nodes
        for name, tokens in chain.items():
            for found in nodes.get(name, ()):  # `_find`, in line: a long prompt has thousands
                if found.parent is node and found.tokens == tokens:
                    break
            else:
                break
            node = found
            ids.append(node.id)
        return ids + [None] * (len(chain) - len(ids))

    def add(self, chain: Chain, logical: Sequence[int], ids: Sequence[BlockId]) -> None:
        """Make known that `ids[n]` holds whole block `logical[n]`; nothing may be known there."""
        node, place = None, dict(zip(logical, ids))
        for index, (name, tokens) in enumerate(chain.items(1 + max(logical, default=-1))):
            node = self._find(name, tokens, node) or self._add(name, tokens, node)
            if index in place:
                if node.id is not None:
                    raise BadInput(
                        "ids", place[index], f"block {node.id} holds this content already"
                    )
                self._hold(node, place[index])

    @property
    def blocks(self) -> KeysView[BlockId]:
        """All known blocks; changes with the index."""
        return self._held.keys()

    def content(self, id: BlockId) -> tuple[int, bytes]:
        """Name and token bytes of a known block."""
        return self._held[id].name, self._held[id].tokens

    def reachable(self) -> list[tuple[BlockId, BlockId | None, int, bytes]]:
        """(id, id of the block before, name, token bytes) of all blocks that can hit, heads first.

        A block that lost one before it is left out.
        """
        depth: dict[_Node | None, int | None] = {None: 0}
        for node in self._held.values():
            line = []
            while node not in depth:
                line.append(node)
                node = node.parent if node.id is not None else None
            for node in reversed(line):
                above = depth[node.parent] if node.id is not None else None
                depth[node] = None if above is None else above + 1
        nodes = sorted((n for n in self._held.values() if depth[n]), key=lambda n: (depth[n], n.id))
        return [(n.id, n.parent and n.parent.id, n.name, n.tokens) for n in nodes]

    def graft(self, parent: BlockId | None, tokens: bytes, id: BlockId) -> None:
        """Make known that `id` holds these tokens behind the known block `parent` (None: first)."""
        node = None if parent is None else self._held[parent]
        name = self.name_behind(None if node is None else node.name, tokens)
        self._hold(self._find(name, tokens, node) or self._add(name, tokens, node), id)

    def behind(self, parent: BlockId | None, tokens: bytes) -> BlockId | None:
        """The block that holds these tokens behind the known block `parent`, if one does."""
        node = None if parent is None else self._held[parent]
        found = self._find(self.name_behind(node and node.name, tokens), tokens, node)
        return found and found.id

    def name_behind(self, parent: int | None, tokens: bytes) -> int:
        """Name of a block of these tokens behind the block of name `parent` (None: the first)."""
        return xxh3_64_intdigest(tokens, self._origin if parent is None else parent)

    def _find(self, name, tokens, parent):
        """The node of these very tokens behind this very parent."""
        for node in self._nodes.get(name, ()):
            if node.parent is parent and node.tokens == tokens:
                return node
        return None

    def _hold(self, node, id):
        if id in self._held:
            raise BadInput("ids", id, "this block holds another content; forget it first")
        node.id = id
        self._held[id] = node
        self.changes += 1
        self.added += 1

    def _add(self, name, tokens, parent):
        node = _Node(name, tokens, parent)
        self._nodes.setdefault(name, []).append(node)
        if parent is not None:
            parent.children += 1
        return node

    def drop(self, ids: Iterable[BlockId]) -> list[int]:
        """Forget blocks; the names of those that were known, in order."""
        nodes = [self._held.pop(id) for id in ids if id in self._held]
        for node in nodes:
            node.id = None
            self._prune(node)
        self.changes += len(nodes)
        return [node.name for node in nodes]

    def _prune(self, node):
        """Remove a node that nothing needs, and then its ancestors."""
        while node is not None and node.id is None and not node.children:
            nodes = self._nodes[node.name]
            nodes.remove(node)
            if not nodes:
                del self._nodes[node.name]
            node = node.parent
            if node is not None:
                node.children -= 1

    def __len__(self):
        return len(self._held)

    def __contains__(self, id):
        return id in self._held

    def check(self) -> None:
        """Raise AssertionError unless nodes, parents and held blocks agree. O(blocks)."""
        nodes = [node for bucket in self._nodes.values() for node in bucket]
        held = {node.id: node for node in nodes if node.id is not None}
        assert held == self._held, "every held block is reachable by its name"
        for node in nodes:
            children = sum(other.parent is node for other in nodes)
            assert node.children == children, "children are counted"
            assert node.id is not None or children, "a node that nothing needs is gone"
