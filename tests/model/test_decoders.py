"""Decoders of many architectures over a PagedCache: as over the library's cache, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from decoders import DECODERS, MIXED, SHAPE, make_decoder
from transformers import DynamicCache

from kvlab import PagedCache
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError
from kvlab.kernel import attend_ref, attend_sdpa
from kvlab.model import decode, portrait
from kvlab.model.fuse import fusible
from kvlab.model.load import LoadedModel
from kvlab.model.prefill import forward_chunk
from kvlab.source.sum import Sum

PROMPT, NEW, BLOCK = 50, 6, 4
REFUSED = {"deepseek_v3": "latents as in MLA"}
SERVED = [name for name in DECODERS if name not in REFUSED]


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, PROMPT), generator=torch.Generator().manual_seed(1))


def continued(model, ids, cache):
    return model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False,
                          pad_token_id=0)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", SERVED)
def test_generate_chunks_and_steps_equal_the_library(name, ids):
    model = make_decoder(name)
    want, logits = continued(model, ids, DynamicCache()), model(ids).logits
    cache = PagedCache.for_model(model, format="fp32", block_size=BLOCK)
    assert torch.equal(continued(model, ids, cache), want)
    cache.check()
    for group in cache.groups:
        window, held = group.pool.shape.window, group.ledger.held_count
        tokens = PROMPT + NEW if window is None else abs(window) + 32 + 2 * BLOCK
        assert held <= 2 * -(-tokens // BLOCK)
    cache.reset()
    parts = [forward_chunk(model, ids[:, at : at + 17], cache) for at in range(0, PROMPT, 17)]
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-4)
    cache.reset()
    steps = decode.generate(model, ids, cache, NEW, chunk_tokens=13, driver="static")
    assert torch.equal(steps, want[:, PROMPT:])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "cohere2", "llama4"])
def test_the_librarys_cache_on_a_switched_model_is_the_same_model(name, ids):
    model = make_decoder(name)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    want = model(ids, attention_mask=mask).logits
    PagedCache.for_model(model)
    cache, got = DynamicCache(), []
    for at in range(0, PROMPT, 17):
        given = mask[:, : at + 17]
        got.append(model(ids[:, at : at + 17], attention_mask=given, past_key_values=cache).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss", "llama4"])
@pytest.mark.parametrize("groups", ["all", "per_layer"])
def test_padding_forks_and_crops_under_mixed_windows(name, groups, ids):
    model = make_decoder(name)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "num_beams": 2,
               "pad_token_id": 0}  # fmt: skip
    want = model.generate(ids, past_key_values=DynamicCache(), **options)
    cache = PagedCache.for_model(model, format="fp32", block_size=BLOCK, groups=groups)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    cache.check()
    cache.reset()
    whole = forward_chunk(model, ids, cache)
    cache.crop(-5)
    again = forward_chunk(model, ids[:, -5:], cache)
    torch.testing.assert_close(again, whole[:, -5:], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "llama4"])
def test_prompts_are_shared_under_mixed_windows(name, ids):
    model = make_decoder(name)
    want = continued(model, ids, DynamicCache())
    cache = PagedCache.for_model(model, format="fp32", block_size=BLOCK, prefix="hash")
    for known in (0, PROMPT - PROMPT % BLOCK):
        assert torch.equal(continued(model, ids, cache), want)
        assert cache.audit()[-1]["hit_tokens"] == known
        cache.finish()
        cache.check()


def test_a_portrait_leaves_the_model_as_it_was(ids):
    model = make_decoder("gemma3")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shapes = portrait(model).shapes
    assert [shape.window for shape in shapes] == [12, None, 12]
    assert {shape.k_width for shape in shapes} == {24} and SHAPE["hidden_size"] // 4 != 24
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.config.sliding_window = 9
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 9 if layer.self_attn.sliding_window else None
    assert portrait(model).shapes[0].window == 9


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_cannot_be_right_is_refused_by_its_reason(name, reason):
    with pytest.raises(BadInput, match=reason):
        PagedCache.for_model(make_decoder(name))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "which is no attention over"),
     ("Qwen3Next", {"layer_types": ["linear_attention"] * 2 + ["full_attention"]},
      "2 of its 3 layers are of kind linear_attention"),
     ("T5", {}, "has an encoder")],
)  # fmt: skip
def test_layers_that_keep_a_state_are_refused(kind, changes, reason):
    config = getattr(transformers, f"{kind}Config")()
    for key, value in (SHAPE | changes).items():
        setattr(config, key, copy.deepcopy(value))
    model = torch.nn.Module()  # refused before a layer of it would run
    model.config = config
    with pytest.raises(BadInput, match=reason):
        portrait(model)


def test_another_cap_than_the_cache_was_made_for_is_refused(ids):
    model = make_decoder("gemma2")
    cache = PagedCache.for_model(model, block_size=BLOCK)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 30.0
    with pytest.raises(KvlabError, match="softly capped at 2.0, and this model asks for 30.0"):
        forward_chunk(model, ids, cache)


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [({"policy": "expected_attention", "budget_percent": 50, "evict": "block"},
      "without the soft cap"),
     ({"policy": "lru", "budget_percent": 50, "summary": "merged"}, "caps its own softly")],
)  # fmt: skip
def test_what_does_not_know_of_a_soft_cap_is_refused(axes, sentence):
    with pytest.raises(BadInput, match=sentence):
        PagedCache.for_model(make_decoder("gemma2"), **axes)


@pytest.mark.parametrize("policy", ["attention_mass", "snapkv", "tova", "key_norm"])
def test_policies_that_score_run_under_a_soft_cap(policy, ids):
    model = make_decoder("gemma2")
    cache = PagedCache.for_model(model, block_size=BLOCK, policy=policy, budget_percent=50,
                                   evict="block")
    for at in range(0, PROMPT, 17):
        assert torch.isfinite(forward_chunk(model, ids[:, at : at + 17], cache)).all()
    cache.check()
    assert cache.stats().evictions


def test_only_layers_that_compute_the_same_are_fused():
    assert not any(fusible(layer) for name in ("granite", "smollm3", "ernie4_5", "hunyuan")
                   for layer in make_decoder(name).model.layers)  # fmt: skip
    shape = {**SHAPE, "head_dim": 16, "layer_types": MIXED, "sliding_window": 9}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    assert all(map(fusible, model.model.layers))


@pytest.mark.parametrize("causal", [False, True])
def test_a_soft_cap_in_slices_is_the_reference(causal, monkeypatch):
    monkeypatch.setattr(attend_sdpa, "MOST_LOGITS", 4 * 12 * 5)
    q, k, v = torch.randn(4, 12, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    how = {"scale": 0.5, "causal": causal, "softcap": 1.5, "window": 6}
    want = attend_ref.attend(q, k, v, **how)
    torch.testing.assert_close(attend_sdpa.attend(q, k, v, **how), want)
    logits = torch.einsum("htd,nhd->htn", q, k.repeat_interleave(2, 1)) * 0.5
    seen = attend_ref.visible(12, 12, 0, 0, causal, 6, "cpu")
    weights = (1.5 * torch.tanh(logits / 1.5)).masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("htn,nhd->htd", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(want[0], out)


def test_sinks_take_weight_and_give_nothing():
    q, k, v = torch.randn(4, 3, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    sinks = torch.randn(4)
    total = Sum(None, sinks)
    for half in (slice(0, 6), slice(6, 10)):
        total.add(attend_ref.attend(q, k[half], v[half], scale=0.3))
    logits = torch.einsum("htd,nhd->htn", q, k.repeat_interleave(2, 1)) * 0.3
    both = torch.cat([logits, sinks[:, None, None].expand(-1, 3, 1)], -1)
    want = torch.einsum("htn,nhd->htd", both.softmax(-1)[..., :-1], v.repeat_interleave(2, 1))
    torch.testing.assert_close(total.result()[0], want)
    torch.testing.assert_close(total.result()[1], both.logsumexp(-1))
    nothing = torch.zeros(4, 3, 8), torch.full((4, 3), -torch.inf)
    assert not attend_ref.with_sinks(nothing, sinks)[0].any()


def test_a_row_says_what_is_done_the_long_way():
    def loaded(name):
        return LoadedModel(make_decoder(name), None, "", True, name, "random")

    assert loaded("gemma2").about()["decoder"] == "the library's forward in 3 of 3 layers"
    told = loaded("gemma2").about(CacheSpec(kernels="triton"))
    assert told["kernels"] == "plain torch: logits are softly capped at 2"
    assert "kernels" not in loaded("gemma2").about(CacheSpec(kernels="torch"))
