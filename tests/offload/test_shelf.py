"""Host memory: every bit comes back, no row is lost, the limit holds, copies wait for readers."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from kvlab.core import BadInput, CacheGeometry
from kvlab.format import NAMES, by_name
from kvlab.offload import HostStore, OutOfHost
from kvlab.offload.stage import plan
from kvlab.pool import BlockPool

LAYERS, HEADS, DIM, SLOTS = 3, 2, 32, 8


def make_pool(name="int4", device="cpu", dtype=torch.float32) -> BlockPool:
    geometry = CacheGeometry(LAYERS, 2 * HEADS, HEADS, DIM, SLOTS)
    return BlockPool(geometry, by_name(name), device, dtype)


def filled(pool: BlockPool, blocks: list[int]) -> BlockPool:
    for layer in range(LAYERS):
        k, v = (torch.randn(len(blocks) * SLOTS, HEADS, DIM) for _ in range(2))
        pool.seal(layer, blocks, k.to(pool.device, pool.dtype), v.to(pool.device, pool.dtype))
    return pool


def stored(pool: BlockPool, blocks: list[int]) -> list[dict[str, torch.Tensor]]:
    """The raw planes, one block at a time."""
    return [
        {n: torch.cat([pool.sealed.read(layer, [b])[n] for b in blocks])
         for n in pool.sealed.planes} for layer in range(LAYERS)
    ]  # fmt: skip


def same(a, b) -> bool:
    return all(torch.equal(x[n].view(torch.uint8), y[n].view(torch.uint8))
               for x, y in zip(a, b, strict=True) for n in x)  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_is_what_left(name, device):
    pool = filled(make_pool(name, device), list(range(20)))
    blocks, back = [7, 3, 4, 5, 19, 0], [40, 41, 12, 60, 2, 30]
    before = stored(pool, blocks)
    shelf = HostStore(slab_tokens=4 * SLOTS).build(pool)
    keys = shelf.spill(blocks)
    pool.drop(blocks)
    filled(pool, blocks)  # the device blocks are used again
    shelf.fetch(keys, back)
    assert same(stored(pool, back), before)
    shelf.check(keys)


@pytest.mark.parametrize("name", ["fp32", "fp8", "int3", "k4v2"])
@pytest.mark.parametrize("order", ["straight", "tail", "scattered", "mixed", "one"])
def test_reading_is_what_the_pool_would_give(name, order, device):
    blocks = list(range(20))
    pool = filled(make_pool(name, device), blocks)
    expected = [pool.read(layer, blocks) for layer in range(LAYERS)]
    shelf = HostStore(slab_tokens=4 * SLOTS).build(pool)
    keys = shelf.spill(blocks)
    wanted = {"straight": keys[:8], "tail": keys[9:], "scattered": keys[::5],
              "mixed": [9, 8, 0, 11, 10, 1, 2], "one": [13]}[order]  # fmt: skip
    for layer in range(LAYERS):
        shelf.prefetch(layer, wanted)
    for layer in [2, 0, 1, 1]:
        got = shelf.read(layer, wanted)
        shelf.prefetch((layer + 1) % LAYERS, keys[4:8])
        for x, y in zip(got, expected[layer]):
            assert torch.equal(x, y.unflatten(0, (20, SLOTS))[wanted].flatten(0, 1))


def test_kernels_can_read_the_host_in_place():
    """Address arithmetic as a kernel does it, on the raw bytes of the slab."""
    pool = filled(make_pool("int8"), list(range(11)))
    shelf = HostStore(slab_tokens=4 * SLOTS).build(pool)
    shelf.spill(list(range(11)))
    for layer in range(LAYERS):
        at = shelf.planes(layer)
        for key in range(11):
            slab, row = divmod(key, at.slab_blocks)
            assert at.base[slab] == at.slabs[slab].data_ptr()
            for name, view in at.planes.items():
                start = view.offset_bytes + row * view.block_stride_bytes
                raw = at.slabs[slab][start : start + view.block_stride_bytes].view(view.dtype)
                want = pool.sealed.row(layer, key)[name]
                assert torch.equal(raw.view(torch.uint8), want.flatten().view(torch.uint8))


def test_a_prefetch_never_outlives_the_meaning_of_its_keys():
    pool = filled(make_pool("fp32"), [0, 1])
    shelf = HostStore(slab_tokens=SLOTS).build(pool)
    (key,) = shelf.spill([0])
    shelf.prefetch(0, [key])
    shelf.drop([key])
    assert shelf.spill([1]) == [key]
    assert torch.equal(shelf.read(0, [key])[0], pool.read(0, [1])[0])


def test_keys_live_until_their_last_holder_drops_them():
    pool = filled(make_pool(), list(range(6)))
    shelf = HostStore(slab_tokens=2 * SLOTS).build(pool)
    keys = shelf.spill([0, 1, 2])
    shelf.share(keys[:2])
    shelf.drop(keys)
    assert shelf.live == 2 and shelf.nbytes == shelf.store.slab_bytes
    shelf.check(keys[:2])
    with pytest.raises(AssertionError):
        shelf.check(keys)
    shelf.drop(keys[:2])
    assert shelf.live == 0 and shelf.nbytes == 0
    assert shelf.spill([3, 4]) == [0, 1], "the lowest keys are used again"


def slabs(shelf, count) -> float:
    """GB of `count` slabs."""
    return count * shelf.store.slab_bytes / 1e9


def test_a_full_host_is_an_error_before_anything_changes():
    pool = filled(make_pool(), list(range(12)))
    probe = HostStore(slab_tokens=2 * SLOTS).build(pool)
    shelf = HostStore(slabs(probe, 2.5), slab_tokens=2 * SLOTS).build(pool)
    keys = shelf.spill([0, 1, 2])
    before = stored(pool, list(range(12)))
    for call in (shelf.spill, lambda blocks: shelf.require(len(blocks))):
        with pytest.raises(OutOfHost, match="offload.cap_gb"):
            call([3, 4])
    assert shelf.live == 3 and same(stored(pool, list(range(12))), before)
    shelf.check(keys)
    assert shelf.spill([5]) == [3], "one row of the second slab was left"
    shelf.drop([0, 1])
    shelf.spill([6, 7])
    shelf.check([0, 1, 2, 3])


def test_one_limit_for_all_pools_of_a_store():
    pools = [filled(make_pool(), [0]) for _ in range(2)]
    probe = HostStore(slab_tokens=SLOTS).build(pools[0])
    store = HostStore(slabs(probe, 1), slab_tokens=SLOTS)
    first, second = (store.build(pool) for pool in pools)
    first.spill([0])
    with pytest.raises(OutOfHost):
        second.spill([0])
    del first
    gc.collect()
    second.spill([0])
    assert store.memory.held_bytes == second.nbytes, "the slab went from one to the other"


def test_spare_slabs_make_place_for_another_size():
    store = HostStore(1.0, slab_tokens=SLOTS)
    shelf = store.build(filled(make_pool("fp32"), [0]))
    store.memory.cap_bytes = shelf.store.slab_bytes
    shelf.drop(shelf.spill([0]))
    assert shelf.nbytes == 0 and store.memory.held_bytes == store.memory.cap_bytes
    other = store.build(filled(make_pool("int2"), [0]))
    other.spill([0])
    assert store.memory.held_bytes == other.store.slab_bytes


def test_reserved_memory_is_there_before_it_is_needed():
    store = HostStore(slab_tokens=2 * SLOTS)
    shelf = store.build(filled(make_pool(), list(range(8))))
    shelf.reserve(5 * SLOTS)
    held = store.memory.held_bytes
    assert held == 3 * shelf.store.slab_bytes and shelf.nbytes == 0
    shelf.spill(list(range(5)))
    assert store.memory.held_bytes == held == shelf.nbytes


@pytest.mark.parametrize("seed", range(5))
def test_any_life_of_keys_keeps_books_and_bits(seed):
    dice, pool = random.Random(seed), filled(make_pool("k8v4"), list(range(16)))
    shelf, held = HostStore(slab_tokens=3 * SLOTS).build(pool), {}
    for _ in range(120):
        verb = dice.choice(["spill", "spill", "share", "drop", "drop", "read"])
        if verb == "spill":
            blocks = dice.sample(range(16), dice.randint(1, 5))
            for key, block in zip(shelf.spill(blocks), blocks):
                assert key not in held
                held[key] = [block, 1]
        elif held:
            keys = dice.sample(sorted(held), dice.randint(1, min(5, len(held))))
            if verb == "read":
                got = shelf.read(1, keys)
                want = pool.read(1, [held[key][0] for key in keys])
                assert all(map(torch.equal, got, want))
                continue
            getattr(shelf, verb)(keys)
            for key in keys:
                held[key][1] += 1 if verb == "share" else -1
                if not held[key][1]:
                    del held[key]
        shelf.check([key for key, (_, count) in held.items() for _ in range(count)])


def test_plans_copy_runs_where_that_is_less():
    whole = plan(tuple(range(8)), 4)
    assert whole.runs == ((0, 0, 4, 0), (1, 0, 4, 1)) and whole.rows == range(8)
    tail = plan((6, 7, 8), 4)
    assert tail.runs == ((1, 2, 4, 0), (2, 0, 1, 1)) and tail.rows == range(2, 5)
    assert plan((1, 0), 4).rows == (1, 0)
    scattered = plan((0, 9, 90), 10)
    assert scattered.runs is None and scattered.rows == range(3) and scattered.places == 1


@pytest.mark.parametrize("wrong", [{"cap_gb": 0}, {"cap_gb": -1.0}, {"slab_tokens": 0},
                                   {"slab_tokens": 2.5}, {"slab_tokens": True}])  # fmt: skip
def test_bad_values_are_refused(wrong):
    with pytest.raises(BadInput, match="offload"):
        HostStore(**wrong)
