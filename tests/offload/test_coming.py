"""Prefixes that come back layer by layer: each layer waits for its own copy, for no later one."""

from __future__ import annotations

import copy

import pytest
import torch
from late import Late, LateStore

from kvlab.model import Packed, PagedCache, prefill
from kvlab.offload import HostStore
from kvlab.pool import Coming

PROMPT = list(range(1, 60))


def cached(model, offload, **axes):
    given = {"format": "fp32", "block_size": 8, "prefix": "hash", "offload": offload,
             "policy": "fifo", "budget_blocks": 40} | axes  # fmt: skip
    cache = PagedCache.for_model(model, **given)
    prefill(model, torch.tensor([PROMPT]), cache)
    cache.finish()
    return cache


@pytest.mark.parametrize("axes", [
    {}, {"format": "int8", "groups": "per_layer"}, {"kernels": "triton", "block_size": 16},
    {"offload": {"mode": "write_through"}, "policy": "lru", "budget_blocks": 30},
], ids=str)  # fmt: skip
def test_the_same_logits_behind_copies_that_come_late(axes, tiny_model):
    if "kernels" in axes:
        pytest.importorskip("triton")
    model, found = tiny_model(), []
    axes, how = {k: v for k, v in axes.items() if k != "offload"}, axes.get("offload", {})
    for store in (HostStore(**how), LateStore(**how)):
        cache = cached(model, store, **axes)
        assert cache.spill_prefixes()
        asked = torch.tensor([[*PROMPT[:-3], 90, 91, 92, 93]])
        result = prefill(model, asked, cache)
        assert result.cached >= 48
        found.append(result.logits)
        cache.finish()
        cache.check()
    assert torch.equal(*found)
    assert store.lanes[0].log[0] == "begin" and not store.lanes[0].waiting


def test_a_layer_waits_for_its_own_copy_alone(tiny_model):
    """What ran before the copy of each layer is all that computes the layers before it."""
    model, store = tiny_model(num_hidden_layers=4), LateStore()
    cache = cached(model, store)
    cache.spill_prefixes()
    lane, group = store.lanes[0], cache.groups[0]
    attend = group.attend

    def noted(ask):
        lane.log.append(f"in {ask.layer}")
        out = attend(ask)
        lane.log.append(f"out {ask.layer}")
        return out

    group.attend = noted
    seq = cache.open([*PROMPT, 77, 78])
    assert cache.length(seq) == 56 and lane.log == ["begin"]
    Packed(model, cache).forward([seq], [[*PROMPT[56:], 77, 78]])
    order = [x for n in range(4) for x in (f"in {n}", n, f"out {n}")]
    assert lane.log == ["begin", *order]


def test_what_touches_the_rows_waits(tiny_model):
    """Spilled again, copied, closed or decoded before any layer was read: nothing is lost."""
    model, store = tiny_model(), LateStore()
    cache = cached(model, store)
    lane = store.lanes[0]
    for act in (lambda seq: cache.core.begin([seq], [1]) and cache.core.abort(),
                lambda seq: copy.deepcopy(cache.core).requests.close(seq)):  # fmt: skip
        cache.spill_prefixes()
        seq = cache.open([*PROMPT, 5])
        assert lane.waiting
        act(seq)
        cache.close(seq)
        cache.spill_prefixes()
        assert not lane.waiting
        cache.check()
    result = prefill(model, torch.tensor([[*PROMPT, 5]]), cache)
    other = cached(model, HostStore())
    assert torch.equal(result.logits, prefill(model, torch.tensor([[*PROMPT, 5]]), other).logits)


def test_slabs_that_are_read_are_not_given_to_others(tiny_model):
    """In mode exclusive a prefix that comes back leaves its slab, and the next one may take it."""
    model, store = tiny_model(), LateStore(slab_tokens=16)
    cache = cached(model, store)
    cache.spill_prefixes()
    cache.open([*PROMPT, 5])
    assert store.lanes[0].waiting
    store.memory.take(cache.groups[0].away.shelf.store.slab_bytes, torch.device("cpu"))
    assert not store.lanes[0].waiting


def test_a_later_copy_stands_for_those_before():
    lane, done = Late(), []
    coming = Coming(lane)
    coming.settle()
    finish = coming.start([lambda n=n: done.append(n) for n in range(3)])
    coming.need(1)
    coming.need(0)
    assert done == [0, 1]
    coming.start([lambda n=n: done.append(n) for n in range(3, 6)])
    coming.need(0)
    assert done == [0, 1, 2, 3]
    finish()
    coming.settle()
    assert done == list(range(6))
    coming.need(2)


@pytest.mark.gpu
def test_copies_beside_the_computation_on_a_gpu(tiny_model):
    model, found = tiny_model().to("cuda", torch.bfloat16), []
    ids = torch.randint(1, 128, (1, 5000), device="cuda")
    for store in (HostStore(), HostStore(layerwise=True)):
        cache = PagedCache.for_model(model, format="bf16", block_size=16, prefix="hash",
                                     policy="fifo", budget_blocks=400, offload=store)  # fmt: skip
        for _ in range(3):
            result = prefill(model, ids, cache)
            cache.finish()
            cache.spill_prefixes()
        found.append(result.logits)
    assert result.cached == 4992 and torch.equal(*found)
