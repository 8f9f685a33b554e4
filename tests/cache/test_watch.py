"""What a policy hears of blocks: the mean over steps, and use against unpinned rivals."""

from __future__ import annotations

import pytest

from kvlab import policy
from kvlab.blocks import BlockLedger
from kvlab.cache.watch import Watch


def watched(blocks=4, pinned=()):
    """A ledger of sealed blocks, some pinned, and who watches them."""
    ledger = BlockLedger(8, policy.by_name("attention_mass"))
    ids = ledger.allocate(blocks)
    ledger.seal(ids)
    ledger.pin(list(pinned))
    return ledger, Watch(ledger, layers=1, block_size=4), ids


def told(watch, shares, fresh=()):
    watch.shares(list(range(len(shares))), shares)
    watch.commit(list(fresh))


def test_a_score_is_the_mean_over_steps():
    """Of all steps alike, not what the last one said."""
    ledger, watch, ids = watched()
    steps = [[0.6, 0.1, 0.1, 0.2], [0.0, 0.5, 0.1, 0.1], [0.3, 0.0, 0.1, 0.3]]
    for shares in steps:
        told(watch, shares)
    for block in ids:
        mean = sum(shares[block] for shares in steps) / 3
        assert ledger.meta(block).score == pytest.approx(mean)


def test_a_block_that_left_starts_anew():
    """Its id means other contents, which nobody scored yet."""
    ledger, watch, _ = watched()
    told(watch, [0.8, 0.0, 0.0, 0.0])
    watch.forget([0])
    told(watch, [0.2, 0.0, 0.0, 0.0])
    assert ledger.meta(0).score == pytest.approx(0.2)


def test_pinned_blocks_are_no_rivals():
    """A sink takes most of the attention; use is measured by the equal share of the others."""
    ledger, watch, ids = watched(pinned=[0])
    told(watch, [0.7, 0.2, 0.06, 0.04])
    assert [ledger.meta(block).hits for block in ids] == [0, 1, 0, 0]


def test_only_more_than_the_equal_share_is_use_the_least_first():
    ledger, watch, ids = watched()
    seen = []
    ledger.events = seen.append
    told(watch, [0.35, 0.05, 0.4, 0.2])
    assert [ledger.meta(block).hits for block in ids] == [1, 0, 1, 0]
    assert [event for event in seen if event[0] == "touch"] == [("touch", [0, 2])]


def test_what_nobody_scored_starts_from_the_mean_of_the_unpinned():
    ledger, watch, ids = watched(pinned=[0])
    watch.shares(ids[:3], [0.7, 0.2, 0.1])
    watch.commit([3])
    assert ledger.meta(3).score == pytest.approx(0.15)
    assert ledger.meta(3).hits == 0
