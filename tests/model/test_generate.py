"""PagedCache as a cache of transformers: `generate()` answers as with the library's own cache."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toys import ARCHITECTURES
from transformers import DynamicCache

from kvlab import PagedCache
from kvlab.core import KvlabError
from kvlab.model.load import ReferenceModel
from kvlab.model.prefill import forward_chunk

BOOKS = Path(__file__).resolve().parents[2] / "kvlab" / "assets" / "books" / "heldout.jsonl.xz"
NEW = 12


def prompts(lengths=(9, 23, 16)):
    """Left-padded ids and mask."""
    width = max(lengths)
    ids = torch.randint(1, 128, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return ids * mask, mask


def answer(model, ids, mask=None, cache=None, attention="sdpa", **options):
    """Generated ids, without the prompt."""
    if cache is None:
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return out[:, ids.shape[1] :]


def paged(model, **axes):
    return PagedCache.for_model(model, **{"format": "fp32", "block_size": 8} | axes)


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.mark.parametrize("chunk", [None, 5, 16])
def test_greedy_ragged_batch(model, chunk):
    ids, mask = prompts()
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    expected = answer(model, ids, mask)
    cache = paged(model)
    assert torch.equal(answer(model, ids, mask, cache, **options), expected)
    cache.check()
    assert cache.stats().tokens == int(mask.sum()) + 3 * (NEW - 1), "padding is not stored"
    assert expected.unique().numel() > 5, "a model that repeats itself tests nothing"


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_do_not_depend_on_the_chunk(model, chunk):
    ids = prompts((40,))[0]
    model.set_attn_implementation("sdpa")
    expected = model(ids).logits
    cache = paged(model)
    parts = [forward_chunk(model, part, cache) for part in ids.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_sampling_with_a_seed(model):
    ids, mask = prompts()
    answers = []
    for cache in (None, "paged"):
        cache = cache and paged(model)
        torch.manual_seed(5)
        answers.append(answer(model, ids, mask, cache, do_sample=True, top_k=20))
    assert torch.equal(*answers)


def test_beams(model):
    ids, mask = prompts()
    expected = answer(model, ids, mask, num_beams=3)
    cache = paged(model)
    assert torch.equal(answer(model, ids, mask, cache, num_beams=3), expected)
    cache.check()
    assert len(cache.rows) == 9


def test_prompt_lookup(model):
    ids = prompts((6,))[0].repeat(1, 5)
    expected = answer(model, ids, prompt_lookup_num_tokens=4)
    cache = paged(model)
    assert torch.equal(answer(model, ids, None, cache, prompt_lookup_num_tokens=4), expected)
    cache.check()


def test_a_filled_cache_goes_on(model):
    ids = prompts((21,))[0]
    expected = answer(model, ids, max_new_tokens=2 * NEW)
    cache = paged(model)
    first = answer(model, ids, None, cache)
    seen = torch.cat([ids, first], 1)
    assert cache.get_seq_length() == seen.shape[1] - 1
    assert torch.equal(torch.cat([first, answer(model, seen, None, cache)], 1), expected)
    cache.reset()
    assert cache.stats().allocated_bytes == 0
    assert torch.equal(answer(model, ids, None, cache), first)


@pytest.mark.parametrize("chunk", [None, 5])
def test_mistral_sliding_window(tiny_model, chunk):
    model = tiny_model("Mistral", sliding_window=8)
    ids, mask = prompts((30, 22, 5))
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    wide = answer(tiny_model("Mistral"), ids, mask)
    expected = answer(model, ids, mask, attention="eager")
    assert not torch.equal(expected, wide), "the window must matter here"
    cache = paged(model, block_size=4)
    assert torch.equal(answer(model, ids, mask, cache, **options), expected)


def test_decoding_in_a_batch_of_another_size_is_refused(tiny_model):
    model = tiny_model()
    cache = paged(model)
    forward_chunk(model, prompts((6, 6))[0], cache)
    with pytest.raises(KvlabError, match="holds 2 rows"):
        forward_chunk(model, prompts((6,))[0], cache)
    cache.check()


def test_another_attention_is_told_what_to_do(tiny_model):
    model = tiny_model()
    cache = paged(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(KvlabError, match="PagedCache.for_model"):
        forward_chunk(model, prompts((6,))[0], cache)


def loss(logits, ids) -> float:
    return F.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).item()


def test_perplexity_of_the_reference_model():
    """Within 1e-5 relative of the library's cache in fp32, whatever the chunk."""
    loaded = ReferenceModel(dtype="float32").load("cpu")
    with lzma.open(BOOKS, "rt") as file:
        text = json.loads(file.readline())["text"]
    ids = loaded.tokenizer(text[20_000:24_000], return_tensors="pt").input_ids[:, :600]
    assert ids.shape[1] == 600
    model = loaded.model
    with torch.inference_mode():
        expected = loss(model(ids, past_key_values=DynamicCache(config=model.config)).logits, ids)
    for chunk in (600, 256, 100):
        cache = paged(model, block_size=64)
        parts = [forward_chunk(model, part, cache) for part in ids.split(chunk, 1)]
        assert loss(torch.cat(parts, 1), ids) == pytest.approx(expected, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_on_cuda_is_close(tiny_model, architecture):
    model = tiny_model(architecture).to("cuda", torch.bfloat16)
    ids = prompts((200,))[0].cuda()
    model.set_attn_implementation("sdpa")
    expected = model(ids).logits.float()
    cache = paged(model, format="bf16")
    got = torch.cat([forward_chunk(model, part, cache) for part in ids.split(64, 1)], 1).float()
    assert (got - expected).abs().mean() < 0.03 * expected.abs().mean()
    agree = (got.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agree > 0.95
