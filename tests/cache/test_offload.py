"""With offload nothing is lost: a budget of a few blocks gives the full cache's results."""

from __future__ import annotations

import pytest
import torch
from driver import Driver, held_bytes, make

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, OutOfBlocks
from kvlab.format import NAMES
from kvlab.model import PagedCache, prefill
from kvlab.model.decode import Decoder
from kvlab.model.prefill import forward_chunk
from kvlab.offload import HostStore, OutOfHost
from kvlab.window import SinkWindow

TIGHT = {"policy": "fifo", "offload": "host"}


def store(slab_tokens=32, **more) -> HostStore:
    return HostStore(slab_tokens=slab_tokens, **more)


def run(model, ids, cache, chunk, steps=12):
    logits = [prefill(model, ids, cache, chunk_tokens=chunk).logits[:, None]]
    for token in range(steps):
        logits.append(forward_chunk(model, ids[:, token : token + 1], cache))
    return torch.cat(logits, 1)


@pytest.fixture
def ids():
    return torch.randint(1, 128, (1, 90), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("groups", ["all", "per_layer"])
@pytest.mark.parametrize("policy", ["fifo", "lru", "attention_mass", "random"])
@pytest.mark.parametrize("format, tolerance", [("fp32", 1e-5), ("fp8", 0.02)])
def test_logits_are_those_of_the_full_cache(tiny_model, ids, format, tolerance, policy, groups):
    """In a lossy format a sum in another order can push a later token's key over a rounding edge;
    `test_every_format_is_read_as_it_was_stored` has no such edges."""
    model, axes = tiny_model(), {"format": format, "block_size": 8}
    full = run(model, ids, PagedCache.for_model(model, **axes), 16)
    cache = PagedCache.for_model(
        model, **axes, policy=policy, budget_blocks=4, offload=store(), groups=groups,
        workspace_tokens=24,
    )
    got = run(model, ids, cache, 16)
    torch.testing.assert_close(got, full, rtol=0, atol=tolerance)
    cache.check()
    stats = cache.stats()
    assert stats.resident_tokens <= 32 and stats.evictions and stats.host_bytes > 0
    cache.reset()
    cache.check()
    assert cache.stats().host_bytes == 0 and held_bytes(cache) == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_gives_the_same_tokens(tiny_model, ids, batch):
    model = tiny_model()
    ids = ids.expand(batch, -1).clone()
    ids[:, 0] = torch.arange(1, batch + 1)
    outputs = []
    for axes in ({}, {**TIGHT, "budget_blocks": 14 * batch, "offload": store()}):
        cache = PagedCache.for_model(model, format="fp32", block_size=8, **axes)
        outputs.append(model.generate(ids, past_key_values=cache, max_new_tokens=30,
                                      do_sample=False))
        cache.check()
    assert torch.equal(*outputs) and cache.stats().evictions > 0


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_many_lives_of_sequences(kernels):
    """Forks share host blocks, crops cut into them, the model's own window reaches them."""
    cache = make(head_dim=32, policy="fifo", budget_blocks=12, offload=store(8),
                 workspace_tokens=8, kernels=kernels)  # fmt: skip
    driver = Driver(cache)
    first = driver.open()
    for count in (13, 1, 1, 1, 30, 24, 1):
        driver.step([first], [count])
    assert cache.groups[0].away.key(first, 2) is not None
    second = driver.fork(first)
    driver.truncate(first, 66)
    driver.truncate(second, 10)  # inside a block that lies in host memory
    driver.step([first, second], [3, 1])
    driver.step([first, second], [1, 1])
    driver.step([first, second], [2, 5], window=17)
    driver.step([second], [9])
    cache.check()
    driver.close(first)
    driver.step([second], [1])
    cache.check()
    driver.close(second)
    cache.check()
    assert cache.stats().host_bytes == 0


@pytest.mark.parametrize("format", NAMES)
def test_every_format_is_read_as_it_was_stored(format):
    cache = make(head_dim=32, format=format, budget_blocks=5, offload=store(16), policy="lru",
                 workspace_tokens=12)  # fmt: skip
    driver = Driver(cache)
    seqs = [driver.open(), driver.open()]
    for counts in ([11, 3], [1, 6], [1, 1], [4, 4]):
        driver.step(seqs, counts)
    assert cache.groups[0].away.blocks
    cache.check()


def host_of(cache, blocks) -> float:
    """GB that `blocks` host blocks of `cache` take, with a slab for each."""
    shelf = cache.groups[0].away.shelf
    return blocks * shelf.store.slab_bytes / 1e9


def test_a_full_host_loses_nothing(tiny_model, ids):
    model = tiny_model()
    axes = {"format": "fp32", "block_size": 8, "policy": "fifo", "budget_blocks": 4}
    probe = PagedCache.for_model(model, **axes, offload=store(8))
    host = store(8, cap_gb=host_of(probe, 5.5))
    cache = PagedCache.for_model(model, **axes, offload=host)
    with pytest.raises(OutOfHost, match="offload.cap_gb"):
        prefill(model, ids, cache, chunk_tokens=16)
    cache.check()
    assert cache.get_seq_length() == 64 and cache.stats().resident_tokens <= 32
    host.memory.cap_bytes *= 4
    cache.abort()
    got = prefill(model, ids[:, 64:], cache, chunk_tokens=16).logits
    full = PagedCache.for_model(model, format="fp32", block_size=8)
    expected = prefill(model, ids, full, chunk_tokens=16).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_relative_budget_that_meets_a_full_host_can_go_on(tiny_model, ids):
    model = tiny_model()
    axes = {"format": "fp32", "block_size": 8, "policy": "fifo", "budget_percent": 25.0}
    probe = PagedCache.for_model(model, **axes, offload=store(8))
    host = store(8, cap_gb=host_of(probe, 3.5))
    cache = PagedCache.for_model(model, **axes, offload=host)
    with pytest.raises(OutOfHost):
        prefill(model, ids, cache, chunk_tokens=16)
    cache.check()
    stands = cache.get_seq_length()
    with pytest.raises(OutOfHost):  # before the step: a second try changes nothing, either
        prefill(model, ids[:, stands : stands + 16], cache, chunk_tokens=16)
    cache.abort()
    assert cache.get_seq_length() == stands == cache.length(cache.rows[0])
    host.memory.cap_bytes *= 8
    done = cache.get_seq_length()
    assert done == cache.length(cache.rows[0])
    got = prefill(model, ids[:, done:], cache, chunk_tokens=16).logits
    full = PagedCache.for_model(model, format="fp32", block_size=8)
    expected = prefill(model, ids, full, chunk_tokens=16).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", [{}, {"policy": "fifo", "budget_blocks": 4, "offload": "host"}])
def test_what_prefill_made_can_be_written_outside_inference_mode(tiny_model, ids, axes):
    model = tiny_model()
    cache = PagedCache.for_model(model, format="fp32", block_size=8, **axes)
    prefill(model, ids[:, :40], cache, chunk_tokens=8)
    with torch.no_grad():
        for at in range(40, 60):
            model(input_ids=ids[:, at : at + 1], position_ids=torch.tensor([[at]]),
                  past_key_values=cache)  # fmt: skip
    cache.check()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fifo", "random"])
@pytest.mark.parametrize("dtype, format, tolerance", [
    (torch.float32, "fp32", 1e-4), (torch.bfloat16, "fp8", 0.1),
])  # fmt: skip
def test_copies_and_kernels_wait_for_each_other(tiny_model, dtype, format, tolerance, policy):
    """Many small pieces on two streams, then captured steps that read host memory in place."""
    model, axes = tiny_model().to("cuda", dtype), {"format": format, "block_size": 16}
    ids = torch.randint(1, 128, (1, 3000), generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for more in ({}, {"policy": policy, "budget_blocks": 12, "offload": store(64),
                      "workspace_tokens": 128}):  # fmt: skip
        cache = PagedCache.for_model(model, **axes, **more)
        logits = [prefill(model, ids, cache, chunk_tokens=128).logits]
        decoder = Decoder(model, cache, driver="graph")
        logits += [decoder.step(ids[:, at]).clone() for at in range(40)]
        cache.check()
        found.append(torch.cat(logits).float())
    torch.testing.assert_close(*found, rtol=0, atol=tolerance)


def test_a_step_larger_than_the_budget_is_still_refused(tiny_model, ids):
    model = tiny_model()
    cache = PagedCache.for_model(model, block_size=8, budget_blocks=4, **TIGHT)
    with pytest.raises(OutOfBlocks):
        prefill(model, ids, cache, chunk_tokens=64)
    cache.check()


@pytest.mark.parametrize("axes, hint", [
    ({}, "give a budget"),
    ({"budget_blocks": 8}, "policy=fifo"),
    ({"budget_blocks": 8, "policy": "lru", "window": SinkWindow(middle=False)}, "window.middle"),
])  # fmt: skip
def test_offload_that_could_never_act_is_refused(axes, hint):
    with pytest.raises(BadInput, match=hint):
        make(offload=HostStore(), **axes)


def test_specs_take_it_by_name():
    assert CacheSpec(offload="host").offload.keeps
