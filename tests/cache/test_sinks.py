"""First tokens that stay as computed: who carries them, and that scales do not see them."""

from __future__ import annotations

import pytest
import torch
from driver import Driver, held_bytes, make

from kvlab import axes as table
from kvlab.core import BadInput
from kvlab.format import NAMES, by_name
from kvlab.offload import HostStore
from kvlab.pool.apart import behind

SINKS = 3


def cache_of(**axes):
    return make(**{"format": by_name("int4", sinks=SINKS), "block_size": 8} | axes)


class Watching(Driver):
    """Remembers the first tokens of each sequence as they came; they are three times the others."""

    def __init__(self, cache):
        super().__init__(cache)
        self.first = {}

    def draw(self, *shape):
        x = super().draw(*shape)
        if len(self.past) and shape[1] == self.cache.geometry.kv_heads and not self.started:
            x[:, :, :SINKS] *= 3
        return x

    @property
    def started(self):
        return any(len(self.past[seq][-1][0]) for seq in self.past)

    def settle(self, seq):
        raw = [[x[:SINKS].clone() for x in pair] for pair in self.past[seq]]
        kept = self.first.setdefault(seq, raw)
        super().settle(seq)
        for pair, old in zip(self.past[seq], kept):
            for x, y in zip(pair, old):
                assert torch.equal(x[: len(y)], y)


def group_of(cache):
    return cache.groups[0]


def test_first_tokens_are_read_as_they_came_and_set_no_scales():
    driver = Watching(cache := cache_of())
    seq = driver.open()
    driver.step([seq], [20])
    pool, block = group_of(cache).pool, group_of(cache).tables[seq].ids[0]
    plain = pool.format.dequantize(pool.sealed.read(0, [block]), torch.float32)[0][0]
    for x in plain[:SINKS]:  # the block itself never saw them
        assert torch.equal(x, plain[SINKS])
    assert (pool.read(0, [block])[0] - driver.past[seq][0][0][:8]).abs().max() == 0
    for count in (1, 1, 9, 1):
        driver.step([seq], [count])
    assert cache.stats().allocated_bytes == held_bytes(cache)
    assert pool.apart.nbytes >= 2 * 2 * 2 * SINKS * 16 * 4
    driver.close(seq)
    cache.check()
    assert not held_bytes(cache)


def test_single_tokens_alone_fill_the_first_block():
    driver = Watching(cache_of())
    seq = driver.open()
    driver.step([seq], [SINKS])
    for _ in range(7):
        driver.step([seq], [1])
    assert len(group_of(driver.cache).pool.apart.rows) == 1


def test_only_the_first_block_has_them():
    driver = Watching(cache := cache_of())
    seq = driver.open()
    for count in (9, 30, 1, 40):
        driver.step([seq], [count])
    first = group_of(cache).tables[seq].ids[0]
    assert list(group_of(cache).pool.apart.rows) == [first]


def test_forks_share_them_and_crops_keep_them():
    driver = Watching(cache := cache_of())
    seq = driver.open()
    driver.step([seq], [20])
    child = driver.fork(seq)
    driver.first[child] = driver.first[seq]
    assert len(group_of(cache).pool.apart.store.live) == 1
    for length, more in ((5, 10), (2, 6), (7, 9), (16, 3)):
        driver.truncate(child, length)
        driver.first[child] = [[x[:length] for x in pair] for pair in driver.first[child]]
        driver.step([seq, child], [1, more])
        cache.check()
    driver.close(seq)
    driver.step([child], [8])
    driver.close(child)
    cache.check()
    assert not held_bytes(cache)


def test_a_block_that_is_cut_and_sealed_again_reads_the_same():
    driver = Watching(cache := cache_of())
    seq = driver.open()
    driver.step([seq], [16])
    before = [x.clone() for x in driver.past[seq][0]]
    for _ in range(3):
        driver.truncate(seq, 7)
        driver.step([seq], [9])
    for x, y in zip(driver.past[seq][0], before):
        assert torch.equal(x[:7], y[:7])
    cache.check()


def test_they_stay_when_their_block_waits_in_host_memory():
    driver = Watching(cache := cache_of(offload=HostStore(), policy="fifo", budget_blocks=5))
    seq = driver.open()
    for count in (20, 20, 1, 20, 1):
        driver.step([seq], [count])
        cache.check()
    assert group_of(cache).tables[seq].ids[0] is None
    assert len(group_of(cache).pool.apart.rows) == 1
    assert cache.stats().allocated_bytes == held_bytes(cache)
    driver.close(seq)
    cache.check()
    assert not held_bytes(cache)


@pytest.mark.parametrize("groups", ["all", "per_layer", "per_head"])
@pytest.mark.parametrize("policy", ["snapkv", "random"])
def test_tokens_that_are_chosen_stay_exact(groups, policy):
    torch.manual_seed(0)
    cache = cache_of(evict="token", policy=policy, budget_percent=60.0, groups=groups, block_size=4)
    driver = Driver(cache)
    seq = driver.open()
    first = []
    for count in (30, 20, 1, 1, 40, *[1] * 40):
        cache.begin([seq], [count])
        for layer in range(2):
            q = driver.draw(1, 4, count, 16)
            k, v = (driver.draw(1, 2, count, 16) for _ in range(2))
            if len(first) < 2:
                k[:, :, :SINKS] *= 10
                first.append((k[0, :, :SINKS].clone(), v[0, :, :SINKS].clone()))
            cache.attend(layer, q, k, v, scale=0.25)
        cache.commit()
        cache.check()
    pool, blocks = group_of(cache).pool, group_of(cache).tables[seq].ids
    kept = 0
    for layer, raw in enumerate(first):
        k, v = pool.read(layer, blocks[:1])
        count = pool.apart.row(layer, blocks[0])["count"]
        for head, n in enumerate(count.tolist()):
            kept += n
            large = [i for i in range(SINKS) if (k[:, head] == raw[0][head, i]).all(-1).any()]
            assert len(large) == n
            for place, i in enumerate(large):
                assert torch.equal(k[place, head], raw[0][head, i])
                assert torch.equal(v[place, head], raw[1][head, i])
            assert (k[n:, head].abs() < 6).all()
    assert kept or policy == "random"
    cache.close(seq)
    assert not held_bytes(cache)


def test_a_sequence_that_gave_up_its_beginning_has_none():
    driver = Driver(cache := cache_of(evict="token", policy="snapkv", budget_blocks=1))
    seq, g = driver.open(), cache.geometry
    for count in (17, 1, 1, 9, *[1] * 16):
        cache.begin([seq], [count])
        for layer in range(g.layers):
            shape = 1, 2, count, 16
            cache.attend(layer, driver.draw(1, 4, count, 16), driver.draw(*shape),
                         driver.draw(*shape), scale=0.25)
        cache.commit()
        cache.check()


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("fp3", "fp1", "bf"))])
def test_every_format_with_scales_takes_them(name):
    driver = Watching(make(head_dim=32, format=by_name(name, sinks=SINKS), block_size=32))
    seq = driver.open()
    driver.step([seq], [40])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(BadInput, match="has none"):
        by_name("bf16", sinks=4)
    with pytest.raises(BadInput, match="within a block"):
        make(format=by_name("int4", sinks=5), block_size=4)
    with pytest.raises(BadInput, match="0 or more"):
        by_name("int4", sinks=-1)
    assert by_name("int4", sinks=4).identity != by_name("int4").identity


def test_behind():
    x = torch.arange(5.0)[:, None, None].expand(5, 3, 2)
    got = behind(x, torch.tensor([0, 2, 5], dtype=torch.int32))
    assert got[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert got[:, 1, 0].tolist() == [2, 2, 2, 3, 4]
    assert got[:, 2, 0].tolist() == [4, 4, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [
    {}, {"offload": HostStore(), "policy": "fifo", "budget_blocks": 3},
    {"retrieval": table.by_name("retrieval", "quest", budget_tokens=16, sinks=0, recent=0)},
], ids=["plain", "host", "quest"])
def test_kernels_read_them(axes):
    cache = cache_of(kernels="triton", head_dim=32, layers=1, **axes)
    driver = Driver(cache) if cache.spec.retrieval.selects else Watching(cache)
    if cache.spec.retrieval.selects:  # what it leaves out is its own affair
        driver.check_row = lambda *_: None
    seq = driver.open()
    for count in (7, 1, 17, 1):
        driver.step([seq], [count])
        cache.check()
    assert len(group_of(cache).pool.apart.rows) == 1
    assert cache.groups[0].pool.fused is not None
