"""What sets each policy apart, on cases small enough to follow by hand."""

from __future__ import annotations

import pytest

from kvlab import policy
from kvlab.blocks import BlockLedger


def full(made, blocks=4, **facts) -> BlockLedger:
    """Blocks 0..n-1 sealed in this order with contents 100, 101, ..."""
    ledger = BlockLedger(blocks, made)
    ids = ledger.allocate(blocks)
    ledger.seal(ids, content=[100 + id for id in ids], **facts)
    return ledger


def drain(ledger):
    return ledger.reclaim(ledger.evictable_count)


def use(ledger, content):
    """One flat access: touch what is there, else admit."""
    here = [m.id for m in ledger.register.metas if m.state and m.content == content]
    if here:
        ledger.touch(here)
    else:
        ledger.admit([content])
    return bool(here)


def test_fifo_ignores_use():
    ledger = full(policy.FIFO())
    ledger.touch([0, 1])
    assert drain(ledger) == [0, 1, 2, 3]


def test_lru_loses_the_tail_of_what_was_touched_tail_first():
    ledger = full(policy.LRU())
    ledger.touch([2, 1, 0])
    assert drain(ledger) == [3, 2, 1, 0]


def test_lfu_counts_first_then_recency():
    ledger = full(policy.LFU())
    ledger.touch([0, 0, 1, 2])
    assert drain(ledger) == [3, 1, 2, 0]


def test_priority_levels_then_prefix_then_recency():
    ledger = full(policy.Priority(prefix_blocks=1), depth=[0, 1, 2, 3], level=[0, 0, 1, 0])
    ledger.touch([1])
    assert drain(ledger) == [3, 1, 0, 2]


def test_attention_mass_falls_and_rises():
    ledger = full(policy.AttentionMass())
    for id, mass in enumerate([0.4, 0.1, 0.3, 0.2]):
        ledger.score(id, mass)
    ledger.score(0, 0.15)
    assert drain(ledger) == [1, 0, 3, 2]


def test_hybrid_weighs_cost_against_recency():
    costs = [8.0, 1.0, 1.0, 1.0]
    assert drain(full(policy.Hybrid(half_life=100), cost=costs)) == [1, 2, 3, 0]
    assert drain(full(policy.Hybrid(half_life=100, cost=0), cost=costs)) == [0, 1, 2, 3]
    assert drain(full(policy.Hybrid(half_life=0.1), cost=costs)) == [0, 1, 2, 3]


def test_gdsf_inflates_so_that_old_fame_fades():
    ledger = full(policy.GDSF())
    ledger.touch([0, 0])
    for content in range(200, 260):
        use(ledger, content)
    assert 100 not in [ledger.meta(id).content for id in range(4)]


def test_sieve_spares_the_used_and_sweeps_on():
    ledger = full(policy.SIEVE())
    ledger.touch([0, 2])
    assert ledger.reclaim(1) == [1]
    assert drain(ledger) == [3, 0, 2]


def test_s3fifo_ghost_goes_to_the_main_queue():
    ledger = full(policy.S3FIFO(small=0.25, promote=1))
    for content in (200, 201, 202, 203, 204):
        use(ledger, content)
    proven = ledger.policy
    before = len(proven._main)
    gone = next(c for c in (200, 201, 202, 203) if c in proven._ghosts)
    assert not use(ledger, gone)
    assert len(proven._main) >= before


def test_arc_grows_the_list_whose_ghosts_are_hit():
    ledger = full(policy.ARC())
    ledger.touch([0, 1])  # seen again: T2
    for content in (200, 201, 202):
        use(ledger, content)
    assert ledger.policy._target == 0
    ghost = next(iter(ledger.policy._once_ghosts._gone))
    assert not use(ledger, ghost)
    assert ledger.policy._target >= 1


def test_mq_remembers_the_frequency_of_ghosts():
    ledger = full(policy.MQ())
    ledger.touch([0, 0, 0])
    drain(ledger)
    ledger.free(range(4))
    use(ledger, 100)
    use(ledger, 300)
    assert ledger.meta(0).uses == 5
    assert drain(ledger) == [1, 0]


def test_mq_lets_the_unused_sink():
    ledger = full(policy.MQ(lifetime=3), blocks=6)
    ledger.touch([0])  # in the second queue, until three more accesses pass
    ledger.touch([1, 2, 3, 4, 5, 1, 2, 3, 4, 5])
    assert ledger.reclaim(1) == [0]


def test_random_is_seeded():
    runs = [drain(full(policy.Random(seed), blocks=30)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_belady_knows_the_future():
    future = [100, 101, 102, 103, 102, 100, 103]
    assert drain(full(policy.Belady(future))) == [1, 3, 0, 2]


def test_belady_by_request_evicts_leaves_of_equals():
    requests = [[100, 101, 102, 103], [100, 101], [100, 101, 102]]
    ledger = full(policy.Belady(requests, by_request=True), depth=[0, 1, 2, 3])
    assert ledger.reclaim(2) == [3, 2]
    ledger.tick()
    ledger.touch([1, 0])
    ledger.tick()
    ledger.touch([1, 0])
    assert drain(ledger) == [1, 0]


@pytest.mark.parametrize("name", ["lru", "s3fifo", "arc", "mq"])
def test_ghosts_are_contents_not_ids(name):
    """The same id coming back with another content is a stranger."""
    ledger = full(policy.by_name(name))
    (victim,) = ledger.reclaim(1)
    ledger.free([victim])
    ledger.seal(ledger.allocate(1), content=[999])
    assert 999 in [ledger.meta(id).content for id in range(4)]
    ledger.check()
