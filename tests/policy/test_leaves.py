"""Leaf-first eviction, and that tail-first LRU and LFU need none."""

from __future__ import annotations

import random

import pytest

from kvlab.blocks import BlockLedger
from kvlab.policy import LRU, BlockMeta, EvictionPolicy, LeafFirst, by_name


class Engine:
    """Requests on a trie of contents, one at a time, pinned while they run, touched tail first."""

    def __init__(self, policy: EvictionPolicy, capacity: int):
        self.ledger = BlockLedger(capacity, policy)
        self.where: dict[tuple, int] = {}
        self.victims: list[tuple] = []

    def request(self, path: tuple) -> int:
        """Run one request for a path of tokens, one token a block; blocks hit."""
        ledger, where = self.ledger, self.where
        chain = [path[: end + 1] for end in range(len(path))]
        there = [content for content in chain if content in where]
        hits = next((i for i, content in enumerate(chain) if content not in where), len(chain))
        ledger.pin([where[content] for content in there])
        self.make_room(len(chain) - len(there))
        fresh = [content for content in chain if content not in where]
        where.update(zip(fresh, ledger.allocate(len(fresh))))
        for content in reversed(chain):
            id = where[content]
            if content in there:
                ledger.touch([id])
            else:
                depth = len(content) - 1
                ledger.seal(
                    [id], [content], [depth], cost=[1 + depth], parent=[content[:-1] or None]
                )
        ledger.unpin([where[content] for content in reversed(there)])
        return hits

    def make_room(self, count):
        short = count - self.ledger.free_count
        if short > 0:
            for id in self.ledger.reclaim(short):
                content = self.ledger.meta(id).content
                self.victims.append(content)
                del self.where[content]
                self.ledger.free([id])

    def orphans(self):
        return [c for c in self.where if len(c) > 1 and c[:-1] not in self.where]


def requests(seed: int, count: int = 300) -> list[tuple]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(3) for _ in range(draw.randint(1, 5))) for _ in range(count)]


@pytest.mark.parametrize("name", ["lru", "lfu"])
@pytest.mark.parametrize("seed", range(20))
def test_tail_first_is_leaf_only(name, seed):
    plain, leaves = Engine(by_name(name), 12), Engine(LeafFirst(name), 12)
    for path in requests(seed):
        assert plain.request(path) == leaves.request(path)
        assert not plain.orphans()
    assert plain.victims == leaves.victims


@pytest.mark.parametrize("name", ["fifo", "random", "s3fifo", "mq", "arc", "sieve", "gdsf"])
@pytest.mark.parametrize("seed", range(3))
def test_no_orphans(name, seed):
    engine = Engine(LeafFirst(name), 12)
    for path in requests(seed):
        engine.request(path)
        assert not engine.orphans()
        engine.ledger.check()


@pytest.mark.parametrize("name", ["random", "s3fifo"])
def test_some_policies_leave_orphans_without_it(name):
    engine = Engine(by_name(name), 12)
    assert any([engine.request(path), engine.orphans()][1] for path in requests(0))


@pytest.mark.parametrize("name", ["pgdsf", "hybrid"])
def test_members_that_weigh_cost_leave_no_orphans(name):
    engine = Engine(by_name(name), 12)
    for path in requests(5):
        engine.request(path)
        assert not engine.orphans()


def test_where_pins_leave_no_leaf_the_deepest_leaves():
    ledger = BlockLedger(3, LeafFirst(LRU()))
    ids = ledger.allocate(3)
    ledger.seal(ids, content=[10, 11, 12], depth=[0, 1, 2], parent=[None, 10, 11])
    ledger.pin([2])
    assert ledger.evictable_count == 2
    assert ledger.reclaim(2) == [1, 0]
    ledger.unpin([2])
    assert ledger.reclaim(1) == [2]


def test_a_parent_that_comes_back_waits_for_its_child():
    ledger = BlockLedger(3, LeafFirst("fifo"))
    ledger.seal(ledger.allocate(2), content=[11, 10], depth=[1, 0], parent=[10, None])
    assert ledger.reclaim(2) == [0, 1]


def test_two_blocks_of_one_content():
    policy = LeafFirst("fifo")
    metas = [BlockMeta(id, content=10, born=id + 1) for id in range(2)]
    child = BlockMeta(2, content=11, depth=1, born=3)
    child.parent = 10
    for meta in [*metas, child]:
        policy.add(meta)
    assert [policy.pop() for _ in range(3)] == [1, 2, 0]
