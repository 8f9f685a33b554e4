"""Crops and reseals, any number of them: kept tokens read what they read after the first."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from driver import held_bytes, make

from kvlab.blocks import HashSharing
from kvlab.cache.origins import MOST
from kvlab.window import SinkWindow

FORMATS = ("fp8", "int8", "int4", "int3", "int2", "k8v4", "k4v2", "k3v2")


def fill(cache, seq, tokens, seed):
    """`tokens` random tokens into every layer, in one step; -> what they were, [L, 2, H, n, D]."""
    g, draw = cache.geometry, torch.Generator().manual_seed(seed)
    x = torch.randn(g.layers, 2, g.kv_heads, tokens, g.head_dim, generator=draw).to(cache.dtype)
    return store(cache, seq, x)


def store(cache, seq, x):
    cache.begin([seq], [x.shape[3]])
    for layer in range(cache.geometry.layers):
        cache.store(layer, *x[layer, :, None])
    cache.commit()
    cache.check()
    return x


def cut(cache, seq, length):
    cache.truncate(seq, length)
    cache.check()
    if cache.groups[0].pool.fused is None:  # whose address tables `held_bytes` leaves out
        assert cache.stats().allocated_bytes == held_bytes(cache)


def read(cache, seq, length) -> torch.Tensor:
    """What the first tokens of `seq` read now, [L, 2, length, H, D]."""
    out, size = [], cache.geometry.block_size
    for layer in range(cache.geometry.layers):
        number, local = cache.place[layer]
        group, parts = cache.groups[number], []
        for index, block in enumerate(group.tables[seq].ids[: -(-length // size)]):
            if group.away.key(seq, index) is not None:
                part = group.away.shelf.read(local, [group.away.key(seq, index)])
            elif cache.length(seq) - index * size < size:
                part = group.pool.read_open(local, block, cache.length(seq) - index * size)
            else:
                part = group.pool.read(local, [block], group.pool.ids([block]))
            parts.append(torch.stack(tuple(part)).clone())
        out.append(torch.cat(parts, 1)[:, :length])
    return torch.stack(out)


def answered(cache, seq, kept, rounds, seed=0):
    """What `kept` tokens read after each of so many other answers, and crops of them."""
    draw = random.Random(seed)
    for number in range(rounds):
        fill(cache, seq, draw.randrange(1, 3 * cache.geometry.block_size), 100 + number)
        now = cache.length(seq)
        if draw.random() < 0.5 and now > kept + 1:  # on the way, a cut somewhere in the answer
            cut(cache, seq, draw.randrange(kept + 1, now))
            fill(cache, seq, draw.randrange(1, 12), 500 + number)
        cut(cache, seq, kept)
        yield read(cache, seq, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_other_answers_leave_the_context_as_it_was(format, size, dtype):
    cache = make(format=format, block_size=size, dtype=dtype)
    seq, kept = cache.open(), 2 * size + size // 2 + 1
    fill(cache, seq, 4 * size, 1)
    first = read(cache, seq, kept)  # as sealed once
    for now in answered(cache, seq, kept, 12):
        assert torch.equal(now, first)


def test_two_hundred_answers_are_no_worse_than_one():
    cache = make(format="int4", block_size=16, dtype=torch.bfloat16, layers=1)
    seq = cache.open()
    true = fill(cache, seq, 32, 1)[:, :, :, :25].transpose(2, 3)
    first = read(cache, seq, 25)
    off = [float((now - true).abs().max()) for now in answered(cache, seq, 25, 200)]
    assert set(off) == {float((first - true).abs().max())}
    fill(cache, seq, 7, 2)  # sealed: once more rounded, to steps that the others chose
    steps = (first - read(cache, seq, 25)).abs().max() / (first - true).abs().max()
    assert steps < 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", (*FORMATS, "bf16", "fp16", "fp32"))
def test_the_same_tokens_again_give_the_same_bits(format, dtype):
    """Block for block, as sealed once: also those whose extremes were among the cropped."""
    cache = make(format=format, block_size=16, dtype=dtype)
    seq, draw = cache.open(), random.Random(0)
    x = fill(cache, seq, 48, 1)
    first = read(cache, seq, 48)
    for _ in range(20):
        length = draw.randrange(33, 48)
        cut(cache, seq, length)
        store(cache, seq, x[:, :, :, length:])
        torch.testing.assert_close(read(cache, seq, 48), first, rtol=0, atol=0)


def test_a_shorter_cut_keeps_the_shorter_part_and_a_longer_one_adds_to_it():
    cache = make(format="int2", block_size=16)
    seq = cache.open()
    fill(cache, seq, 32, 1)
    first = read(cache, seq, 32)
    cut(cache, seq, 28)
    fill(cache, seq, 4, 2)
    cut(cache, seq, 20)  # of the 28 only these are still what they were
    assert torch.equal(read(cache, seq, 20), first[:, :, :20])
    fill(cache, seq, 12, 3)
    second = read(cache, seq, 32)
    assert not torch.equal(second[:, :, 16:20], first[:, :, 16:20])
    cut(cache, seq, 28)  # 20 as first reopened, the others as sealed last
    longer = torch.cat([first[:, :, :20], second[:, :, 20:28]], 2)
    assert torch.equal(read(cache, seq, 28), longer)
    fill(cache, seq, 4, 4)
    cut(cache, seq, 28)
    assert torch.equal(read(cache, seq, 28), longer)


def test_a_cut_of_the_open_tail_shortens_what_is_kept_of_it():
    """Tokens that follow there are new ones, and sealing rounds them for the first time."""
    cache = make(format="int4", block_size=16)
    seq = cache.open()
    fill(cache, seq, 16, 1)
    cut(cache, seq, 12)
    cut(cache, seq, 5)
    fill(cache, seq, 11, 2)
    sealed = read(cache, seq, 16)
    cut(cache, seq, 12)
    assert torch.equal(read(cache, seq, 12)[:, :, 5:], sealed[:, :, 5:12])


def test_bytes_come_and_go_with_what_is_kept():
    cache = make(format="int4", block_size=16, groups="per_layer")
    seq, one = cache.open(), sum(g.pool.open.slab_bytes for g in cache.groups)
    fill(cache, seq, 64, 1)
    before = cache.stats()
    assert before.origin_bytes == 0
    cut(cache, seq, 50)
    assert cache.stats().origin_bytes == one
    fill(cache, seq, 14, 2)
    stats = cache.stats()
    assert stats.origin_bytes == one == stats.allocated_bytes - before.allocated_bytes
    assert stats.peak_allocated_bytes >= stats.allocated_bytes > stats.logical_bytes
    assert stats.logical_bytes - before.logical_bytes == one
    child = cache.fork(seq)
    assert cache.stats().origin_bytes == one, "forks share it"
    cut(cache, seq, 48)  # whole blocks: nothing of the cut one stays
    assert cache.stats().origin_bytes == one
    cache.close(child)
    assert cache.stats().origin_bytes == 0
    cut(cache, seq, 40)
    cache.close(seq)
    cache.check()
    assert cache.stats().allocated_bytes == held_bytes(cache) == 0


def test_dense_formats_keep_nothing():
    for format in ("fp32", "bf16", "fp16"):
        cache = make(format=format)
        seq = cache.open()
        fill(cache, seq, 8, 1)
        cut(cache, seq, 7)
        assert cache.stats().origin_bytes == 0


def test_forks_go_their_own_ways():
    cache = make(format="int3", block_size=8)
    seq = cache.open()
    fill(cache, seq, 16, 1)
    first = read(cache, seq, 15)
    cut(cache, seq, 15)
    child = cache.fork(seq)
    for number in range(5):
        for each, kept in ((seq, 15), (child, 10 + number % 2)):
            fill(cache, each, 9, number + 7 * each)
            cut(cache, each, min(kept, 10) if each == child and number else kept)
    assert torch.equal(read(cache, seq, 15), first)
    assert torch.equal(read(cache, child, 10), first[:, :, :10])
    cache.close(seq)
    fill(cache, child, 9, 99)
    cut(cache, child, 10)
    assert torch.equal(read(cache, child, 10), first[:, :, :10])


def test_a_deep_copy_has_origins_of_its_own():
    cache = make(format="int4", block_size=16)
    seq = cache.open()
    fill(cache, seq, 32, 1)
    first = read(cache, seq, 27)
    cut(cache, seq, 27)
    other = copy.deepcopy(cache)
    cache.close(seq)
    for number in range(3):
        fill(other, seq, 9, number)
        cut(other, seq, 27)
        assert torch.equal(read(other, seq, 27), first)


def test_the_latest_cuts_of_a_sequence_have_origins():
    """Cuts at several depths, as turns of a talk: no more bytes with each, and back up again."""
    cache = make(format="int4", block_size=4)
    seq, most = cache.open(), MOST * cache.groups[0].pool.open.slab_bytes
    seen = {}
    for number in range(MOST + 2):
        fill(cache, seq, 12, number)
        stop = cache.length(seq) - 5
        cut(cache, seq, stop)
        seen[stop] = read(cache, seq, stop)[:, :, stop // 4 * 4 :]
        assert cache.stats().origin_bytes <= most
    assert cache.stats().origin_bytes == most
    for stop in sorted(seen)[: -MOST - 1 : -1]:
        for number in range(3):
            cut(cache, seq, stop)
            assert torch.equal(read(cache, seq, stop)[:, :, stop // 4 * 4 :], seen[stop])
            fill(cache, seq, 9, number)


@pytest.mark.parametrize("hold", [True, False])
def test_a_shared_block_that_is_cut_stays_with_the_others(hold):
    cache = make(format="int4", block_size=4, prefix=HashSharing(hold=hold), policy="lru",
                 budget_blocks=40)  # fmt: skip
    words = list(range(16))
    one = cache.open(words)
    fill(cache, one, 16, 1)
    two = cache.open(words + [99])
    assert cache.length(two) == 16
    first = read(cache, one, 16)
    for number in range(4):
        cut(cache, two, 14)
        assert torch.equal(read(cache, two, 14), first[:, :, :14])
        fill(cache, two, 7, number)
        assert torch.equal(read(cache, one, 16), first)
    cache.close(one)
    cache.close(two)
    cache.check()
    assert cache.stats().origin_bytes == 0
    assert cache.length(cache.open(words + [99])) == 16, "what was known still is"


def test_a_block_in_host_memory_that_is_cut():
    cache = make(format="int4", block_size=4, policy="fifo", budget_blocks=5, offload="host")
    seq = cache.open()
    for number in range(3):
        fill(cache, seq, 12, number)
    assert cache.groups[0].away.key(seq, 2) is not None
    first = read(cache, seq, 11)
    for number in range(4):
        cut(cache, seq, 11)
        assert torch.equal(read(cache, seq, 11), first)
        for part in range(3):
            fill(cache, seq, 9, number + 9 * part)
        assert cache.groups[0].away.key(seq, 2) is not None, "resealed, and away once more"


@pytest.mark.parametrize("axes", [
    {"policy": "fifo", "budget_blocks": 5}, {"window": SinkWindow(4, 8, middle=False)},
], ids=["policy", "window"])  # fmt: skip
def test_a_block_that_is_gone_takes_its_origin_along(axes):
    cache = make(format="int4", block_size=4, **axes)
    seq = cache.open()
    fill(cache, seq, 12, 1)
    cut(cache, seq, 11)
    assert cache.stats().origin_bytes
    for number in range(4):
        fill(cache, seq, 8, number)
    assert cache.stats().evictions and cache.stats().origin_bytes == 0


def test_a_full_cache_reopens_in_place():
    cache = make(format="int4", block_size=4, policy="fifo", budget_blocks=3)
    seq = cache.open()
    fill(cache, seq, 12, 1)
    first = read(cache, seq, 11)
    for number in range(3):
        cut(cache, seq, 11)
        assert torch.equal(read(cache, seq, 11), first) and not cache.stats().evictions
        fill(cache, seq, 1, number)


def test_through_the_kernels_the_same():
    pytest.importorskip("triton")
    seen = []
    for kernels in ("torch", "triton"):
        cache = make(format="k4v2", block_size=16, head_dim=32, layers=1, kernels=kernels,
                     dtype=torch.bfloat16)  # fmt: skip
        seq = cache.open()
        fill(cache, seq, 32, 1)
        first = read(cache, seq, 27)
        for now in answered(cache, seq, 27, 3):
            assert torch.equal(now, first)
        seen.append(first)
    assert torch.equal(*seen)
