"""A decoded token reads the blocks it chooses, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cache.driver import SCALE, Driver, held_bytes, make

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.kernel.select_ref import HOLE
from kvlab.offload import OutOfHost
from kvlab.retrieval import MeanKey, Quest, RandomChoice
from kvlab.source.chosen import swaps
from kvlab.source.digests import SLAB_ROWS
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
    for _ in range(3):  # across the sealing of a block at decode
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
    {}, {"per_head": False, "digests": "bf16"}, {"group": "sum"},
], ids=str)
def test_kernels_choose_as_plain_torch_does(axes):
    def run(kernels):
        cache = make(head_dim=32, kernels=kernels, policy="lru", budget_blocks=26,
                     retrieval=Quest(**SMALL | axes))
        driver = Twin(cache)
        seqs = [driver.open(), driver.open()]
        driver.step(seqs, [39, 60])
        for _ in range(2):  # a block is filled, the next begun
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
    used = stats.logical_bytes - full.logical_bytes  # of the sealed blocks alone, no whole slab
    rows = sum(len(group.sources.digests.rows[seq]) for group in driver.cache.groups
               for seq in group.sources.digests.rows)  # fmt: skip
    assert 0 < used < stats.digest_bytes and used * SLAB_ROWS == stats.digest_bytes * rows


def test_digests_live_and_die_with_their_blocks():
    driver, first = filled(retrieval=Quest(**SMALL))
    digests = driver.cache.groups[0].sources.digests
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
    digests = driver.cache.groups[0].sources.digests
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
    assert all(group.sources.digests.rows[seq][i] is None for i in holes if i < 18)
    assert group.sources.digests.store.live_rows <= 12


def test_a_block_without_a_digest_gets_it_from_its_stored_keys():
    driver, seq = filled(retrieval=Quest(digests="fp32", **SMALL))
    digests = driver.cache.groups[0].sources.digests
    rows = list(digests.rows[seq])
    want = [digests.store.read(layer, rows)["digest"] for layer in range(2)]
    digests.crop(seq, 3)  # as after attaching a prefix that came with its blocks alone
    driver.step([seq], [1])
    for layer in range(2):
        got = digests.store.read(layer, digests.rows[seq])["digest"]
        assert torch.equal(got, want[layer])


def test_what_heads_choose_is_the_attention_that_policies_see():
    quest = Quest(listen=2, **SMALL)
    driver, seq = filled(retrieval=quest, policy="attention_mass", budget_blocks=40)
    group = driver.cache.groups[0]
    before = {b: group.ledger.meta(b).hits for b in group.tables[seq].ids[:17]}
    driver.step([seq], [1])
    assert all(group.ledger.meta(b).hits == hits for b, hits in before.items())  # not yet
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


# ---- over host blocks


def stepwise(tokens=100, chunk=12, **axes):
    """Prefill in chunks that fit in a small budget."""
    driver = Twin(make(**axes))
    seq = driver.open()
    for start in range(0, tokens, chunk):
        driver.step([seq], [min(chunk, tokens - start)])
    return driver, seq


def hosted(fetches, kernels="torch", **axes):
    quest = Quest(listen=2, fetches=fetches, digests="fp32", **SMALL)
    return stepwise(head_dim=32, kernels=kernels, retrieval=quest, offload="host", policy="lru",
                    budget_blocks=10, **axes)  # fmt: skip


@pytest.mark.parametrize("fetches", [0, 4])
def test_where_a_block_lies_changes_nothing(fetches):
    """The same steps with everything on the device, bit for bit apart from the order of sums."""
    far, seq = hosted(fetches)
    near, other = stepwise(head_dim=32, retrieval=Quest(digests="fp32", **SMALL))
    for _ in range(9):
        far.step([seq], [1])
        near.step([other], [1])
        far.cache.check()
    assert far.cache.stats().host_bytes and len(far.out) == len(near.out)
    for (got, *_), (want, *_) in zip(far.out, near.out):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_kernels_read_host_blocks_in_place():
    torchs, first = hosted(4, chunk=24)
    tritons, second = hosted(4, "triton", chunk=24)
    for _ in range(2):
        torchs.step([first], [1])
        tritons.step([second], [1])
        tritons.cache.check()
    assert sum(group.away.blocks for group in tritons.cache.groups) > 10
    for (want, *_), (got, *_) in zip(torchs.out, tritons.out):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)


def test_blocks_that_heads_keep_choosing_come_back():
    driver, seq = hosted(4)
    group = driver.cache.groups[0]
    before = {i for i, key in enumerate(group.away.of[seq].ids) if key is not None}
    for _ in range(8):
        driver.step([seq], [1])
        driver.cache.check()
    back = {i for i in before if group.tables[seq].ids[i] is not None}
    assert back and group.ledger.held_count <= 10


def test_swaps_need_a_clear_gain():
    counts = np.array([9, 0, 5, 4, 1, 7])
    places = np.array([-2, 3, -5, 8, 2, HOLE])
    assert swaps(counts, places, 8).tolist() == [0, 2]  # for blocks chosen 0 and 1 times
    assert swaps(counts, places, 1).tolist() == [0]
    assert swaps(counts, places, 0).tolist() == []
    counts[4] = 3
    assert swaps(counts, places, 8).tolist() == [0]


def test_a_full_host_leaves_blocks_where_they_are():
    driver, seq = hosted(4)
    group = driver.cache.groups[0]
    group.away.shelf.memory.cap_bytes = group.away.shelf.memory.held_bytes
    for _ in range(6):
        try:
            driver.step([seq], [1])
        except OutOfHost:
            driver.cache.abort()
            break
        driver.cache.check()


@pytest.mark.gpu
@pytest.mark.parametrize("axes", [
    {}, {"format": "fp8"}, {"offload": "host", "policy": "lru", "budget_blocks": 40},
], ids=str)
def test_choices_on_cuda(axes):
    """Kernels against plain torch on the same device, blocks on the host among them."""
    quest = Quest(160, sinks=4, recent=32, listen=2, fetches=4, digests="fp32")
    outs = []
    for kernels in ("torch", "auto"):
        driver, seq = stepwise(
            900, 200, head_dim=128, block_size=16, device="cuda", dtype=torch.bfloat16,
            retrieval=quest, kernels=kernels, **{"format": "bf16"} | axes,
        )
        driver.out.clear()
        for _ in range(20):
            driver.step([seq], [1])
            driver.cache.check()
        outs.append(torch.stack([out.float() for out, *_ in driver.out]))
    torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)
