"""Random compositions of all axes, and the edges: one block, nothing evicted, a full host."""

from __future__ import annotations

import pytest
import stress
import torch

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.model import PagedCache
from kvlab.model.prefill import forward_chunk
from kvlab.offload import HostStore, OutOfHost
from kvlab.window import SinkWindow

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def ids():
    return torch.randint(1, 128, (1, 96), generator=torch.Generator().manual_seed(5))


def fed(model, ids, cache, size=16):
    """Logits [T, V] of `ids` [1, T], in chunks of `size`."""
    return torch.cat([forward_chunk(model, part, cache)[0] for part in ids.split(size, 1)])


def full(model, ids):
    return fed(model, ids, PagedCache.for_model(model, format="fp32", block_size=16))


@pytest.mark.parametrize("seed", range(3))
def test_random_compositions_keep_their_books(model, seed):
    with torch.inference_mode():
        ends = stress.run(model, count=8, tokens=150, seed=100 + seed, told=lambda text: None)
    assert ends["done"] + ends["out of room"] == 8


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_200_compositions_of_2000_tokens(model):
    with torch.inference_mode():
        ends = stress.run(model, count=200, tokens=2000, seed=0)
    assert ends["done"] + ends["out of room"] == 200 and ends["done"] > 150


def test_a_budget_of_one_block_says_so_and_goes_on(model, ids):
    cache = PagedCache.for_model(model, policy="fifo", budget_blocks=1, block_size=16)
    forward_chunk(model, ids[:, :10], cache)
    with pytest.raises(OutOfBlocks, match="raise the budget"):
        forward_chunk(model, ids[:, 10:30], cache)
    cache.abort()
    cache.check()
    assert cache.get_seq_length() == 10 and cache.stats().resident_tokens == 10
    for token in ids[0, 10:40]:
        forward_chunk(model, token[None, None], cache)
        cache.check()
    assert cache.stats().blocks == 1 and cache.stats().evictions == 2


def test_less_than_a_block_is_refused_before_anything_is_built(model):
    with pytest.raises(BadInput, match="less than one block"):
        PagedCache.for_model(model, policy="fifo", budget_bytes=10)
    with pytest.raises(BadInput, match="more than 0"):
        CacheSpec(policy="fifo", budget_blocks=0)


@pytest.mark.parametrize("middle, rerotate", [(True, False), (False, False), (False, True)])
def test_a_window_larger_than_the_prompt_changes_nothing(model, ids, middle, rerotate):
    window = SinkWindow(sinks=4, recent=1000, middle=middle, rerotate=rerotate)
    more = {"policy": "lru", "budget_blocks": 50} if middle else {}
    cache = PagedCache.for_model(model, format="fp32", block_size=16, window=window, **more)
    torch.testing.assert_close(fed(model, ids, cache), full(model, ids), rtol=1e-4, atol=1e-4)
    assert cache.stats().evictions == 0 and cache.stats().resident_tokens == ids.shape[1]


@pytest.mark.parametrize("name", stress.SUMMARIZERS)
def test_a_summary_of_nothing_changes_nothing(model, ids, name):
    cache = PagedCache.for_model(
        model, format="fp32", block_size=16, policy="fifo", budget_blocks=50, summary=name
    )
    torch.testing.assert_close(fed(model, ids, cache), full(model, ids), rtol=1e-4, atol=1e-4)
    assert cache.groups[0].summaries.nbytes == 0


def test_a_full_host_loses_nothing(model, ids):
    axes = {"format": "fp32", "block_size": 16, "policy": "fifo", "budget_blocks": 3}
    small = HostStore(cap_gb=40e-6, slab_tokens=16)
    cache = PagedCache.for_model(model, offload=small, **axes)
    done = 0
    with pytest.raises(OutOfHost, match="offload.cap_gb"):
        while done < ids.shape[1]:
            forward_chunk(model, ids[:, done : done + 16], cache)
            done += 16
    cache.abort()
    cache.check()
    stats = cache.stats()
    assert cache.get_seq_length() == done == stats.tokens and 0 < done < ids.shape[1]
    assert stats.host_bytes > 0 and stats.evictions > 0
    cache.crop(-8)  # what is there is whole: the same tokens give the plain model's logits again
    again = forward_chunk(model, ids[:, done - 8 : done], cache)[0]
    want = full(model, ids[:, :done])[-8:]
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.stats().host_bytes == 0


def test_a_crop_that_one_row_cannot_do_is_done_to_none(model, ids):
    cache = PagedCache.for_model(
        model, format="fp32", block_size=16, window=SinkWindow(0, 16, middle=False)
    )
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0  # rows of 53 and 60 tokens: only the longer one keeps what a crop of 14 cuts
    model(ids[:, :60].repeat(2, 1), attention_mask=mask, past_key_values=cache)
    before = [cache.length(row) for row in cache.rows]
    refused = 0
    for count in range(1, 40):
        try:
            cache.crop(-count)
        except KvlabError:
            refused += 1
            assert [cache.length(row) for row in cache.rows] == before
        else:
            before = [n - count for n in before]
        cache.check()
    assert refused
