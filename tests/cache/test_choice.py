"""A decoded token reads the blocks it chooses, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from cache.driver import SCALE, Driver, held_bytes, make

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.retrieval import MeanKey, Quest, RandomChoice
from kvlab.window import SinkWindow

SMALL = {"budget_tokens": 16, "sinks": 4, "recent": 4}  # 4 blocks of 4
MEMBERS = [Quest, MeanKey, RandomChoice]


class Twin(Driver):
    """Steps that keep what attention gave instead of checking it against everything."""

    def __init__(self, cache):
        super().__init__(cache)
        self.out = []

    def check_row(self, out, q, fresh, seq, layer, count, window):
        self.out.append((out, q, fresh, layer, count))


def filled(tokens=70, **axes):
    driver = Twin(make(**axes))
    seq = driver.open()
    driver.step([seq], [tokens])
    return driver, seq


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_a_budget_for_everything_is_no_retrieval(member, block_size):
    plain = Driver(make(block_size=block_size))
    chosen = Driver(make(block_size=block_size, retrieval=member(100, recent=8)))
    for driver in (plain, chosen):
        seq = driver.open()
        for count in (70, 1, 1, 5, 1):
            driver.step([seq], [count])  # against the oracle over everything
    assert chosen.cache.stats().read_tokens == plain.cache.stats().read_tokens == 78


@pytest.mark.parametrize("member", MEMBERS)
def test_a_chunk_reads_everything(member):
    driver = Driver(make(retrieval=member(**SMALL)))
    seq = driver.open()
    for count in (30, 2, 33):
        driver.step([seq], [count])




@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_each_head_reads_sinks_recent_and_what_it_wants_most(kernels):
    driver, seq = filled(head_dim=32, kernels=kernels, retrieval=Quest(digests="fp32", **SMALL))
    for _ in range(6):  # across the sealing of a block at decode
        past = list(driver.past[seq])
        driver.out.clear()
        driver.step([seq], [1])
        for out, q, (k, v), layer, _ in driver.out:
            keys, values = (torch.cat(x) for x in zip(past[layer], (k, v)))
            sealed = len(past[layer][0]) // 4
            for head in range(4):
                of = keys[:, head // 2]
                bounds = torch.stack([quest_bound(q[h, 0], of, sealed) for h in pair_of(head)])
                take = chosen(bounds.amax(0), sealed)
                seen = [t for i in take for t in range(4 * i, 4 * i + 4)]
                seen += range(4 * sealed, len(keys))
                weights = (of[seen] @ q[head, 0] * SCALE).softmax(0)
                torch.testing.assert_close(
                    out[0, head], weights @ values[seen, head // 2], atol=2e-5, rtol=1e-4
                )


def pair_of(head):
    """The query heads that share this one's keys."""
    return (head // 2 * 2, head // 2 * 2 + 1)


def quest_bound(q, keys, sealed):
    blocks = keys[: 4 * sealed].unflatten(0, (sealed, 4))
    return torch.maximum(q * blocks.amax(1), q * blocks.amin(1)).sum(-1)


def chosen(scores, sealed):
    """Four blocks: the first, the last, then the best."""
    always = [0, sealed - 1]
    rest = sorted((i for i in range(sealed) if i not in always), key=lambda i: -scores[i])
    return sorted([*always, *rest[:2]])


@pytest.mark.parametrize("axes", [
    {}, {"per_head": False}, {"group": "sum"}, {"digests": "bf16"},
], ids=str)
def test_kernels_choose_as_plain_torch_does(axes):
    def run(kernels):
        cache = make(head_dim=32, kernels=kernels, policy="lru", budget_blocks=26,
                     retrieval=Quest(**SMALL | axes))
        driver = Twin(cache)
        seqs = [driver.open(), driver.open()]
        driver.step(seqs, [37, 60])
        for _ in range(7):
            driver.step(seqs, [1, 1])
        cache.check()
        assert cache.stats().evictions
        return [out for out, *_ in driver.out]

    for torchs, tritons in zip(run("torch"), run("triton")):
        torch.testing.assert_close(torchs, tritons, atol=3e-5, rtol=1e-4)


def test_fewer_tokens_are_read_and_bytes_are_counted():
    driver, _ = filled(retrieval=Quest(**SMALL))
    plain, _ = filled()
    stats, full = driver.cache.stats(), plain.cache.stats()
    assert (stats.read_tokens, full.read_tokens) == (16 + 2, 70)
    assert stats.resident_tokens == full.resident_tokens == 70
    assert stats.digest_bytes > 0 and full.digest_bytes == 0
    assert stats.allocated_bytes == held_bytes(driver.cache)
    assert stats.allocated_bytes == full.allocated_bytes + stats.digest_bytes


def test_digests_live_and_die_with_their_blocks():
    driver, first = filled(retrieval=Quest(**SMALL))
    digests = driver.cache.groups[0].digests
    second = driver.fork(first)
    assert digests.rows[first] == digests.rows[second]
    driver.step([second], [10])
    driver.truncate(second, 30)
    driver.step([first, second], [1, 1])
    assert len(digests.rows[first]) == 17 and len(digests.rows[second]) == 7
    driver.close(first)
    driver.step([second], [1])
    driver.close(second)
    assert not digests.rows and not digests.store.slabs


def test_an_aborted_step_leaves_no_digest():
    driver, seq = filled(retrieval=Quest(**SMALL))
    digests = driver.cache.groups[0].digests
    before = list(digests.rows[seq]), digests.store.live_rows
    driver.step([seq], [30], layers=1)
    driver.cache.abort()
    assert (digests.rows[seq], digests.store.live_rows) == before
    driver.step([seq], [1])


def test_an_evicted_block_loses_its_digest_and_is_never_chosen():
    driver, seq = filled(retrieval=Quest(**SMALL), policy="fifo", budget_blocks=12, tokens=40)
    for _ in range(40):
        driver.step([seq], [1])
    group = driver.cache.groups[0]
    holes = group.tables[seq].holes
    assert len(holes) > 5
    assert all(group.digests.rows[seq][i] is None for i in holes if i < 18)
    assert group.digests.store.live_rows <= 12


def test_a_block_without_a_digest_gets_it_from_its_stored_keys():
    driver, seq = filled(retrieval=Quest(digests="fp32", **SMALL))
    digests = driver.cache.groups[0].digests
    rows = list(digests.rows[seq])
    want = [digests.store.read(layer, rows)["digest"] for layer in range(2)]
    digests.crop(seq, 3)  # as after attaching a prefix that came with its blocks alone
    driver.step([seq], [1])
    for layer in range(2):
        got = digests.store.read(layer, digests.rows[seq])["digest"]
        assert torch.equal(got, want[layer])


def test_what_heads_choose_is_the_attention_that_policies_see():
    driver, seq = filled(retrieval=Quest(**SMALL), policy="attention_mass", budget_blocks=40)
    group = driver.cache.groups[0]
    before = {b: group.ledger.meta(b).hits for b in group.tables[seq].ids[:17]}
    for _ in range(3):
        driver.step([seq], [1])
    touched = [b for b, hits in before.items() if group.ledger.meta(b).hits > hits]
    assert group.tables[seq].ids[0] in touched and 2 < len(touched) < 17


@pytest.mark.parametrize("groups", ["all", "per_layer"])
def test_groups_choose_alike(groups):
    driver, seq = filled(retrieval=Quest(**SMALL), groups=groups)
    reference, other = filled(retrieval=Quest(**SMALL))
    for d, s in ((driver, seq), (reference, other)):
        d.step([s], [1])
    for (got, *_), (want, *_) in zip(driver.out, reference.out):
        assert torch.equal(got, want)


def test_refusals():
    with pytest.raises(BadInput, match="retrieval.budget_tokens=64: must exceed the 128 tokens"):
        CacheSpec(retrieval=Quest(64, recent=10), block_size=64)
    with pytest.raises(BadInput, match="window.rerotate=True: retrieval scores keys"):
        CacheSpec(retrieval="quest", window=SinkWindow(rerotate=True, middle=False), policy="fifo")
