"""The decode driver: the same tokens as `generate()`, eager, static and captured."""

import logging

import pytest
import torch
from toys import ARCHITECTURES
from transformers import DynamicCache

from kvlab import PagedCache
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.format import by_name
from kvlab.model import decode
from kvlab.model.decode import Decoder, generate, sampled
from kvlab.model.fuse import fused
from kvlab.model.prefill import forward_chunk, prefill
from kvlab.retrieval import Quest

NEW = 12
CUDA = torch.cuda.is_available()


def ragged(lengths=(9, 23, 16)):
    """Left-padded ids and mask."""
    width = max(lengths)
    ids = torch.randint(1, 128, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return ids * mask, mask


def library(model, ids, mask=None, new=NEW):
    """The tokens of the library's own loop over its own cache."""
    model.set_attn_implementation("sdpa")
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config),
        do_sample=False, max_new_tokens=new,
    )
    return out[:, ids.shape[1] :]


def paged(model, **axes):
    return PagedCache.for_model(model, **{"format": "fp32", "block_size": 8} | axes)


@pytest.mark.parametrize("driver", ["auto", "static"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_of_generate(architecture, driver, tiny_model):
    model = tiny_model(architecture)
    ids, mask = ragged()
    want, want_ragged = library(model, ids[1:2]), library(model, ids, mask)
    cache = paged(model)
    assert torch.equal(generate(model, ids[1:2], cache, NEW, driver=driver), want)
    assert cache.length(cache.rows[0]) == cache.get_seq_length() == ids.shape[1] + NEW - 1
    cache = paged(model)
    got = generate(model, ids, cache, NEW, attention_mask=mask, driver=driver)
    assert torch.equal(got, want_ragged)
    cache.check()


def test_a_residual_longer_than_the_text_is_the_full_cache(tiny_model):
    """What is never read as stored costs nothing: ragged rows, through `generate()` of both."""
    model, (ids, mask) = tiny_model(), ragged()
    want = library(model, ids, mask, 10)
    axes = {"format": by_name("int2", residual=40), "block_size": 8}
    assert torch.equal(generate(model, ids, paged(model, **axes), 10, attention_mask=mask), want)
    cache = paged(model, **axes)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False,
                         max_new_tokens=10)  # fmt: skip
    assert torch.equal(got[:, ids.shape[1] :], want)
    short = paged(model, format="int2")
    assert not torch.equal(generate(model, ids, short, 10, attention_mask=mask), want)
    cache.check()


@pytest.mark.parametrize("axes", [
    {}, {"groups": "per_layer"},
    {"policy": "attention_mass", "evict": "block", "budget_blocks": 2},
    {"policy": "lru", "budget_percent": 50},
    {"policy": "fifo", "budget_percent": 50, "offload": "host"},
    {"retrieval": Quest(48, recent=8)},
    {"retrieval": Quest(48, recent=8), "policy": "fifo", "budget_percent": 50, "offload": "host"},
    {"policy": "snapkv", "budget_percent": 50, "budget": "adakv", "block_size": 8},
    {"format": by_name("int8", residual=16)},
])
def test_the_static_step_through_the_kernels(axes, tiny_model):
    """Tables, appended tokens and sealed blocks, in Triton's interpreter or on the GPU."""
    pytest.importorskip("triton")
    model = tiny_model().to("cuda" if CUDA else "cpu")
    caches = [paged(model, **{"kernels": k, "block_size": 16} | axes) for k in ("torch", "triton")]
    ids = torch.randint(1, 128, (1, 30), device=model.device)
    logits = []
    for cache in caches:
        prefill(model, ids, cache)
        decoder = Decoder(model, cache, driver="static")
        logits.append(torch.stack([decoder.step(ids[:, i]).clone() for i in range(4)]))
        cache.check()  # a block was filled and the next begun
    torch.testing.assert_close(*logits, atol=5e-4, rtol=2e-3)
    assert caches[0].stats().evictions == caches[1].stats().evictions
    assert ("policy" in axes) == bool(caches[0].stats().evictions)


def test_a_step_that_is_looked_at_is_never_replayed(tiny_model, monkeypatch):
    """TOVA looks before each choice; a graph reads tables that nobody wrote for such a step."""
    model, ids = tiny_model(), torch.randint(1, 128, (1, 40))
    axes = {"policy": "tova", "budget_percent": 50, "block_size": 1}
    got, want = paged(model, **axes), paged(model, **axes)
    for cache in (got, want):
        prefill(model, ids, cache)
    decoder = Decoder(model, got, driver="static")
    decoder.driver = "graph"
    monkeypatch.setattr(decoder, "_capture", None)
    for i in range(12):
        token = ids[:, i]
        torch.testing.assert_close(decoder.step(token), forward_chunk(model, token[None], want)[0])
    assert got.stats() == want.stats()


def test_says_why_it_runs_eagerly(tiny_model, caplog):
    if CUDA:
        pytest.skip("a CUDA device would capture")
    model = tiny_model()
    cache = paged(model)
    with pytest.raises(BadInput, match="at least one token"):
        Decoder(model, cache)
    prefill(model, torch.ones(1, 3, dtype=torch.long), cache)
    decode._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        decoder = Decoder(model, cache)
    assert "CUDA device" in decoder.why_eager and decoder.why_eager in caplog.text
    with pytest.raises(BadInput, match="eval.driver"):
        Decoder(model, cache, driver="graph")
    with pytest.raises(BadInput, match="one of"):
        Decoder(model, cache, driver="fast")


def test_a_step_that_fails_leaves_the_cache_as_it_was(tiny_model):
    model = tiny_model()
    cache = paged(model, budget_blocks=2)
    prefill(model, torch.ones(1, 15, dtype=torch.long), cache)
    decoder, token = Decoder(model, cache, driver="static"), torch.ones(1, dtype=torch.long)
    decoder.step(token)
    with pytest.raises(OutOfBlocks):
        decoder.step(token)
    assert cache.length(cache.rows[0]) == 16
    with pytest.raises(KvlabError, match="1 rows"):
        decoder.step(torch.ones(2, dtype=torch.long))
    cache.check()


def test_goes_on_after_a_crop(tiny_model):
    model, ids = tiny_model(), torch.randint(1, 128, (1, 21))
    cache = paged(model)
    prefill(model, ids[:, :13], cache)
    decoder = Decoder(model, cache, driver="static")
    for i in range(13, 18):
        decoder.step(ids[:, i])
    cache.crop(-3)
    got = [decoder.step(ids[:, i]).clone() for i in range(15, 21)]
    other = paged(model)
    want = forward_chunk(model, ids, other)[0, 15:]
    torch.testing.assert_close(torch.cat(got), want, atol=1e-4, rtol=1e-4)


def test_end_token_and_sampling(tiny_model):
    model, ids = tiny_model(), torch.randint(1, 128, (2, 9))
    plain = generate(model, ids, paged(model), NEW)
    eos = int(plain[0, 3])
    ended = generate(model, ids, paged(model), NEW, eos=eos)
    first = (plain[0] == eos).nonzero()[0, 0]
    assert torch.equal(ended[0, : first + 1], plain[0, : first + 1])
    assert (ended[0, first:] == eos).all()
    drawn = [
        generate(model, ids, paged(model), NEW,
                 choose=sampled(0.8, 5, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    greedy = generate(model, ids, paged(model), NEW, choose=sampled(1e-3, 1))
    assert torch.equal(greedy, plain)
    with pytest.raises(BadInput, match="temperature"):
        sampled(0)


@pytest.fixture
def large(tiny_model):
    """Three layers with the head shape of Qwen3-0.6B, in bf16 on the GPU."""
    model = tiny_model(
        head_dim=128, hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.05,
    )
    return model.cuda().bfloat16()


def decoded(model, ids, start, driver, **axes):
    """Logits fp32 [T - start, B, V] of feeding ids[:, start:] one at a time."""
    cache = PagedCache.for_model(model, **axes)
    prefill(model, ids[:, :start], cache)
    decoder = Decoder(model, cache, driver=driver)
    logits = [decoder.step(ids[:, i]).float() for i in range(start, ids.shape[1])]
    cache.check()
    return torch.stack(logits), decoder, cache


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("axes", [
    {"format": "bf16"}, {"format": "fp8"}, {"format": "int4", "block_size": 128},
    {"format": "k4v2"}, {"format": "int8", "block_size": 16},
    {"format": "int8", "policy": "attention_mass", "budget_blocks": 24, "block_size": 16,
     "evict": "block"},
    {"format": "bf16", "policy": "fifo", "budget_percent": 50, "offload": "host"},
    {"format": "bf16", "retrieval": Quest(budget_tokens=128, recent=32), "block_size": 16},
    {"format": by_name("int4", residual=128), "block_size": 64},
    {"format": by_name("int2g", residual=64), "block_size": 32},
])
def test_replays_agree_with_eager_over_many_blocks(axes, rows, large):
    """Against fp32 attention through plain torch: no further off than the eager bf16 forward."""
    axes = axes | ({"budget_blocks": 24 * rows} if "budget_blocks" in axes else {})
    ids = torch.randint(1, 128, (rows, 600), device="cuda")
    got, decoder, cache = decoded(large, ids, 200, "graph", **axes)
    assert decoder.captured
    eager, _, other = decoded(large, ids, 200, "eager", **axes)
    assert cache.stats().evictions == other.stats().evictions
    again, _, _ = decoded(large, ids, 200, "graph", **axes)
    assert torch.equal(got, again), "replays repeat to the bit"
    if axes.get("policy", "fifo") == "fifo" and "retrieval" not in axes:  # no ties between blocks
        assert (got - eager).norm() <= 0.2 * eager.norm()
        want, _, _ = decoded(large.float(), ids, 200, "eager", **axes | {"kernels": "torch"})
        errors = [(x - want).norm() / want.norm() for x in (got, eager)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3, errors


@pytest.mark.gpu
def test_a_grown_table_is_captured_again(large):
    ids = torch.randint(1, 128, (1, 600), device="cuda")
    got, decoder, cache = decoded(large, ids, 8, "graph", format="bf16", block_size=4)
    want, _, _ = decoded(large, ids, 8, "eager", format="bf16", block_size=4)
    assert cache.groups[0].sources.sealed.decoding.max_blocks > 64
    assert (got - want).norm() <= 0.05 * want.norm()
    length = cache.length(cache.rows[0])
    assert decoder.timed(lambda replay: replay() or 1.0) == 1.0
    assert cache.length(cache.rows[0]) == length
    more = decoder.step(ids[:, 0]).float()
    other = decoded(large, torch.cat([ids, ids[:, :1]], 1), 600, "eager", format="bf16")[0]
    assert (more - other[0]).norm() <= 0.05 * more.norm()
    cache.check()


@pytest.mark.gpu
def test_fused_layers_are_no_further_from_fp32_than_the_library(large):
    ids = torch.randint(1, 128, (1, 64), device="cuda")
    large.set_attn_implementation("sdpa")

    def run(model):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            return torch.cat([
                model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[0].float()
                for i in range(64)
            ])

    plain = run(large)
    with fused(large):
        got = run(large)
    want = run(large.float())
    assert (got - want).norm() <= 1.2 * (plain - want).norm()
