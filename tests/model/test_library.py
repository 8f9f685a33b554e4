"""What of transformers' caches, models and generate() the code relies on: one test a line of the
table in ARCHITECTURE.md.

A failure here says what the library changed, and which file of kvlab has to follow.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import test_library_attention as attention
import torch
from library_probe import WINDOWED, Hands, changed, takes_cache
from toys import ARCHITECTURES
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin

from kvlab.model.adapter import PagedLayer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ARCHITECTURE.md"
TITLE = "## What of transformers the code relies on"


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture(params=WINDOWED)
def windowed(request, tiny_model):
    return tiny_model(request.param, **WINDOWED[request.param])


# ---- the cache


def test_cache_parameter(model):
    for module in (model, model.model, model.model.layers[0], model.model.layers[0].self_attn):
        assert len(takes_cache(module)) == 1, changed(
            f"{type(module).__name__}.forward has no single parameter annotated `Cache | None`",
            "library.py, fuse.py")  # fmt: skip
    names = {takes_cache(m)[0] for m in (model, model.model.layers[0])}
    known = {"cache", "past_key_values"}
    assert names <= known, changed(f"the cache is called {names}", "library.py")


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
    """Inputs of each forward of `ids` [1, T] behind one column of padding, and the cache."""
    cache, inputs = options.pop("cache", None) or Calls(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    model.generate(ids, attention_mask=mask, **{takes_cache(model)[0]: cache}, do_sample=False,
                   **{"max_new_tokens": 4} | options)  # fmt: skip
    handle.remove()
    return inputs, cache


IDS = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])


def test_generate_calls_by_keyword(model):
    inputs, cache = generated(model, IDS)
    args, first = inputs[0]
    assert not args and {"input_ids", "attention_mask", "position_ids"} <= first.keys(), changed(
        "generate() does not call the model by keywords", "tokens.py")
    given = first.get(takes_cache(model)[0])
    assert given is cache, changed("how generate() names the cache", "tokens.py")
    assert torch.equal(first["position_ids"], (torch.arange(8) - 1).clamp(min=0)[None])


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


def test_the_table_and_the_tests_are_one():
    lines = PAGE.read_text().partition(TITLE)[2].split("\n## ")[0].splitlines()
    cells = [line.split("|")[-2].strip() for line in lines if line.startswith("| ")]
    rows = [cell.strip("`") for cell in cells if cell.startswith("`")]
    names = {name for name in (*globals(), *vars(attention)) if name.startswith("test_")}
    names -= {"test_library_attention", "test_the_table_and_the_tests_are_one"}
    assert len(rows) == len(set(rows))
    assert set(rows) == names
