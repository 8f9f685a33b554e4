"""What of transformers the adapter relies on: one test a line of the table in ARCHITECTURE.md.

A failure here says what the library changed, and which file of kvlab has to follow.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
from toys import ARCHITECTURES
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.model.adapter import PagedLayer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ARCHITECTURE.md"
TITLE = "## What of transformers the code relies on"
PROBE = "library_probe"
WINDOWED = {  # one model of each way in which the library says "sliding window"
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def changed(what: str, file: str) -> str:
    return f"transformers {transformers.__version__} changed: {what}; kvlab/model/{file} relies on it"


class Length(int):
    """A number that can be told from its equals."""


class Hands(CacheLayerMixin):
    """A layer of a cache that hands on itself instead of keys and values."""

    is_compileable = is_sliding = False
    is_croppable = True

    def lazy_initialization(self, *args):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.given = key_states, value_states
        return self, self

    def get_seq_length(self):
        return 3

    def get_mask_sizes(self, query_length):
        return Length(3 + query_length), 0

    def get_max_length(self):
        return -1


class Seen:
    """What the registered functions got: `masks` keyword arguments, `calls` of the attention."""

    def __init__(self):
        self.masks, self.calls, self.token = [], [], object()

    def mask(self, **told):
        self.masks.append(told)
        return self.token

    def attention(self, module, query, key, value, attention_mask, **told):
        self.calls.append((module, query, key, value, attention_mask, told))
        return query.transpose(1, 2).contiguous(), None


@pytest.fixture
def seen():
    probe = Seen()
    AttentionInterface.register(PROBE, probe.attention)
    AttentionMaskInterface.register(PROBE, probe.mask)
    yield probe
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(table)._global_mapping.pop(PROBE)


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture(params=WINDOWED)
def windowed(request, tiny_model):
    return tiny_model(request.param, **WINDOWED[request.param])


def takes_cache(module: nn.Module) -> list[str]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in parameters if Cache in get_args(p.annotation) or p.annotation is Cache
            or (isinstance(p.annotation, str) and "Cache" in p.annotation.split(" | "))]  # fmt: skip


def probed(model, inputs=None, cache=None, tokens: int = 2):
    """One forward under the probe, over a cache of its own kind that has seen 3 columns."""
    model.set_attn_implementation(PROBE)
    if cache is None:
        cache = Cache(layers=[Hands() for _ in range(model.config.num_hidden_layers)])
    ids = torch.ones(2, tokens, dtype=torch.long)
    model(input_ids=ids, **{takes_cache(model)[0]: cache}, **inputs or {})
    return cache


# ---- the cache


def test_cache_parameter(model):
    for module in (model, model.model, model.model.layers[0], model.model.layers[0].self_attn):
        assert len(takes_cache(module)) == 1, changed(
            f"{type(module).__name__}.forward has no single parameter annotated `Cache | None`",
            "library.py, fuse.py")  # fmt: skip
    names = {takes_cache(m)[0] for m in (model, model.model.layers[0])}
    assert names <= {"cache", "past_key_values"}, changed(f"the cache is called {names}", "library.py")


def test_old_name_of_the_cache(model):
    cache = DynamicCache()
    model(input_ids=torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 4, changed(
        "a forward does not take past_key_values=... any more", "adapter.py (README, section 2)")


def test_cache_layer_methods():
    known = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    more = CacheLayerMixin.__abstractmethods__ - known
    assert not more, changed(f"layers of a cache must also have {sorted(more)}", "adapter.py")
    assert not PagedLayer.__abstractmethods__


def test_cache_asks_its_layers():
    cache = Cache(layers=[Hands(), Hands()])
    assert cache.get_seq_length() == 3 and cache.get_query_offset(0) == 3
    assert cache.get_mask_sizes(2, 1) == (5, 0), changed(
        "Cache.get_mask_sizes(query_length, layer_idx) does not ask the layer", "adapter.py")
    for name in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"):
        assert callable(getattr(Cache, name, None)), changed(f"Cache.{name} is gone", "adapter.py")


def test_crop_takes_a_negative_count():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 7, 2), torch.ones(1, 1, 7, 2), 0)
    cache.crop(-2)
    assert cache.get_seq_length() == 5, changed("crop(-2) does not remove two tokens", "adapter.py")


def test_caches_show_their_tensors(model):
    cache = StaticCache(config=model.config, max_cache_len=9)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), **{takes_cache(model)[0]: cache})
    shapes = {tuple(layer.keys.shape) for layer in cache.layers}
    assert shapes == {(1, 2, 9, 32)}, changed("layers of StaticCache have no keys", "peers.py")


# ---- masks


def test_mask_function_is_told(seen, model):
    probed(model, {"attention_mask": torch.ones(2, 5, dtype=torch.long)})
    wanted = {"batch_size": 2, "q_length": 2, "kv_length": 5, "q_offset": 3, "kv_offset": 0,
              "use_vmap": False}  # fmt: skip
    told = seen.masks[0]
    assert {name: told.get(name) for name in wanted} == wanted, changed(
        f"the registered mask function gets {sorted(told)}", "visibility.py")
    names = {"mask_function", "attention_mask", "device", "dtype", "config"}
    assert names <= told.keys(), changed(f"no {names - told.keys()} for masks", "visibility.py")
    assert told["attention_mask"].dtype == torch.bool and told["attention_mask"].shape == (2, 5)


def test_mask_function_gets_the_very_length(seen, model):
    probed(model)
    assert type(seen.masks[0]["kv_length"]) is Length, changed(
        "kv_length is not what Cache.get_mask_sizes gave, by which a PagedCache is known",
        "visibility.py")  # fmt: skip


def test_mask_rules(seen, windowed):
    probed(windowed)
    rules = [told["mask_function"] for told in seen.masks]
    window = sliding_window_causal_mask_function(4)
    sliding = [rule for rule in rules if rule is not causal_mask_function]
    assert len(sliding) == 1, changed("there is not one rule for windowed layers", "visibility.py")
    assert sliding[0].__code__ is window.__code__, changed(
        "a windowed layer's rule is not sliding_window_causal_mask_function", "visibility.py")
    place = torch.arange(6)
    q, kv = place[:, None], place[None]
    for rule, reach in ((window, 4), (causal_mask_function, 99)):
        want = (kv <= q) & (q - kv < reach)
        assert torch.equal(torch.as_tensor(rule(0, 0, q, kv)), want), changed(
            "which keys a rule shows", "visibility.py")  # fmt: skip


def test_other_rules_are_told(seen, tiny_model):
    """What a model adds to the causal rule arrives as another function, or as use_vmap."""
    model = tiny_model("Llama")
    model.set_attn_implementation(PROBE)
    model(input_ids=torch.ones(1, 4).long(), position_ids=torch.tensor([[0, 1, 0, 1]]),
          use_cache=False)  # fmt: skip
    rule = seen.masks[0]["mask_function"]
    assert rule is not causal_mask_function, changed(
        "packed positions without a cache no longer change the rule", "visibility.py")
    assert not rule(0, 0, torch.tensor(2), torch.tensor(1)), "two documents do not see each other"


def test_masks_arrive_as_they_were_made(seen, model):
    probed(model)
    assert all(call[4] is seen.token for call in seen.calls), changed(
        "attention does not get what the mask function made", "adapter.py")


def test_4d_masks_arrive_untouched(seen, model):
    mask = torch.ones(2, 1, 2, 5, dtype=torch.bool)
    probed(model, {"attention_mask": mask})
    assert not seen.masks and all(call[4] is mask for call in seen.calls), changed(
        "a 4D mask does not reach attention as it is", "visibility.py")  # fmt: skip


def test_mask_of_sdpa():
    make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    plain = {"batch_size": 1, "q_length": 3, "kv_length": 3, "q_offset": 0, "kv_offset": 0}
    mask = make(**plain, mask_function=causal_mask_function, attention_mask=None,
                allow_is_causal_skip=False, use_vmap=False, device="cpu", dtype=torch.float32,
                config=None)  # fmt: skip
    assert mask.dtype == torch.bool and torch.equal(mask[0, 0], torch.ones(3, 3).bool().tril()), (
        changed("the mask function of sdpa gives no bool mask, True for what is seen", "dense.py"))


# ---- attention


def test_attention_gets_what_update_gave(seen, model):
    cache = probed(model)
    assert len(seen.calls) == len(cache.layers)
    for layer, (_, query, key, value, *_) in zip(cache.layers, seen.calls):
        assert key is layer and value is layer, changed(
            "attention layers do something with what Cache.update gives", "adapter.py")
        assert query.shape == (2, 4, 2, 32) and layer.given[0].shape == (2, 2, 2, 32), changed(
            "the shapes [B, heads, T, D] of queries, keys and values", "adapter.py")


def test_attention_is_told(seen, model):
    places = torch.tensor([[3, 4], [5, 6]])
    probed(model, {"position_ids": places})
    module, *_, told = seen.calls[0]
    assert {"scaling", "dropout"} <= told.keys(), changed("no scaling for attention", "adapter.py")
    assert told["scaling"] == module.scaling == 32**-0.5
    assert told.get("position_ids") is not None, changed(
        "position_ids do not reach the attention function as a keyword", "adapter.py")
    assert torch.equal(told["position_ids"], places)


def test_attention_is_told_the_window(seen, windowed):
    probed(windowed)
    windows = [call[-1].get("sliding_window") for call in seen.calls]
    assert 4 in windows and set(windows) <= {4, None}, changed(
        "sliding_window does not reach the attention function as a keyword", "adapter.py")
    assert windows == [getattr(call[0], "sliding_window", 4) for call in seen.calls]


def test_attention_of_sdpa(tiny_model):
    model = tiny_model("Llama")
    x = torch.randn(1, 4, 3, 32)
    small = torch.randn(1, 2, 3, 32)
    out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](
        model.model.layers[0].self_attn, x, small, small, None, dropout=0.0, scaling=0.1
    )
    assert out.shape == (1, 3, 4, 32) and weights is None, changed(
        "what the registered sdpa takes and gives", "dense.py")


def test_attention_can_be_set(seen, model):
    model.set_attn_implementation(PROBE)
    assert model.config._attn_implementation == PROBE
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(PROBE, None)
    assert interface == seen.attention, changed(
        "ALL_ATTENTION_FUNCTIONS.get_interface(name, default)", "fuse.py")


# ---- models


def test_layer_parts(model):
    layer = model.model.layers[0]
    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    parts = {"layer": (layer, names),
             "self_attn": (layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim",
                                             "layer_idx", "scaling", "config",
                                             "num_key_value_groups")),
             "mlp": (layer.mlp, ("gate_proj", "up_proj", "down_proj", "act_fn")),
             "norm": (layer.input_layernorm, ("weight", "variance_epsilon"))}  # fmt: skip
    for name, (part, wanted) in parts.items():
        gone = [each for each in wanted if not hasattr(part, each)]
        assert not gone, changed(f"{name} of a decoder layer has no {gone}", "fuse.py")
    normed = hasattr(layer.self_attn, "q_norm")
    assert normed == (model.config.model_type == "qwen3"), changed("head norms", "fuse.py")
    source = inspect.getmodule(type(layer))
    assert hasattr(source, "eager_attention_forward"), changed("the eager attention", "fuse.py")


def test_layer_parameters(model):
    names = set(inspect.signature(type(model.model.layers[0]).forward).parameters)
    wanted = {"hidden_states", "attention_mask", "position_ids", "use_cache", "position_embeddings"}
    assert wanted <= names, changed(f"a layer's forward has no {wanted - names}", "fuse.py")


def test_rotary(model):
    rotary = model.get_decoder().rotary_emb
    assert rotary.rope_type == "default" and rotary.inv_freq.shape == (16,), changed(
        "rope_type and inv_freq of the rotary module", "shape.py, decode.py")
    cos, sin = rotary(torch.zeros(1, 2, 64), torch.tensor([[0, 1]]))
    assert cos.shape == sin.shape == (1, 2, 32), changed("cosines [B, T, D]", "fuse.py")


def test_config_names(windowed):
    config = windowed.config.get_text_config(decoder=True)
    shape = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    assert shape == (2, 4, 2) and config.head_dim == 32, changed("names in configs", "shape.py")
    assert windowed.get_output_embeddings().weight.shape == (128, 64)


# ---- generate


class Calls(DynamicCache):
    """Notes which of its methods `generate()` calls."""

    def __init__(self):
        super().__init__()
        self.crops, self.orders = [], []

    def crop(self, tokens_to_remove):
        self.crops.append(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx):
        self.orders.append(beam_idx)
        super().reorder_cache(beam_idx)


def generated(model, ids, **options):
    """Inputs of each forward, and the cache."""
    cache, inputs = options.pop("cache", None) or Calls(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    model.generate(ids, attention_mask=torch.ones_like(ids), **{takes_cache(model)[0]: cache},
                   do_sample=False, **{"max_new_tokens": 4} | options)  # fmt: skip
    handle.remove()
    return inputs, cache


IDS = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])


def test_generate_calls_by_keyword(model):
    inputs, cache = generated(model, IDS)
    args, first = inputs[0]
    assert not args and {"input_ids", "attention_mask", "position_ids"} <= first.keys(), changed(
        "generate() does not call the model by keywords", "tokens.py")
    assert first[takes_cache(model)[0]] is cache, changed("how generate() names the cache", "tokens.py")
    assert torch.equal(first["position_ids"], torch.arange(8)[None])


def test_generate_wants_the_last_logits(model):
    inputs, _ = generated(model, IDS)
    assert inputs[0][1].get("logits_to_keep") == 1, changed(
        "generate() does not ask for the last logits alone", "tokens.py")


def test_generate_leaves_out_what_is_cached(model):
    _, cache = generated(model, IDS)
    more = torch.cat([IDS, IDS, IDS], 1)
    inputs, _ = generated(model, more, cache=cache)
    given, seen = inputs[0][1]["input_ids"].shape[1], 8 + 3
    assert given == more.shape[1] - seen, changed(
        "generate() does not cut the prompt by Cache.get_seq_length()", "adapter.py")


def test_generate_crops(model):
    _, cache = generated(model, IDS, prompt_lookup_num_tokens=3, max_new_tokens=9)
    assert cache.crops and all(int(n) <= 0 for n in cache.crops), changed(
        f"prompt lookup calls crop with {cache.crops}, not with negative counts", "adapter.py")


def test_generate_reorders(model):
    _, cache = generated(model, IDS, num_beams=3)
    assert cache.orders and all(order.shape == (3,) for order in cache.orders), changed(
        "beam search does not call Cache.reorder_cache(beam_idx [rows])", "adapter.py")


def test_repeat_kv():
    from transformers.integrations.sdpa_attention import repeat_kv

    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(repeat_kv(x, 2), x.repeat_interleave(2, 1)), changed("repeat_kv", "dense.py")


def test_the_table_and_the_tests_are_one():
    lines = PAGE.read_text().partition(TITLE)[2].split("\n## ")[0].splitlines()
    rows = [line.split("|")[-2].strip().strip("`") for line in lines if line.startswith("| `")]
    tests = {name for name in globals() if name.startswith("test_")}
    tests.discard("test_the_table_and_the_tests_are_one")
    assert len(rows) == len(set(rows))
    assert set(rows) == tests
