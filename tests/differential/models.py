"""Tiny random models of every architecture that the adapter admits, and the caches they run on."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers
from transformers import DynamicCache, StaticCache

from kvlab import PagedCache

VOCAB, PAD, STATIC_LENGTH = 64, 0, 160
_LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)],
         "long_factor": [1.5 + 0.5 * i for i in range(8)]}


def _rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | more}


MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4, "head_dim": 8}),
    "llama_mqa": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama_linear": ("Llama", _rope("linear", factor=4.0)),
    "llama_yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama3": ("Llama", _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=16)),
    "llama_dynamic": ("Llama", _rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}),
    "llama_longrope": ("Llama", _rope("longrope", factor=4.0, original_max_position_embeddings=16,
                                      **_LONG) | {"max_position_embeddings": 64}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {"num_attention_heads": 6, "head_dim": 8}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6,
                               "max_window_layers": 0}),
    "qwen2_mixed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6,
                              "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_mixed": ("Qwen3", {"use_sliding_window": True, "sliding_window": 5,
                              "layer_types": ["sliding_attention", "full_attention"]}),
}
STATEFUL_ROPE = ("llama_dynamic", "llama_longrope")  # frequencies follow the longest so far
_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": PAD, "initializer_range": 0.2,  # wide: errors show, greedy tokens are no ties
}


@cache
def _built(name: str, seed: int):
    architecture, changes = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**copy.deepcopy(_SHAPE | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


def build(name: str, attention: str = "sdpa", seed: int = 0):
    """A model of its own, with the same weights at each call."""
    model = copy.deepcopy(_built(name, seed))
    model.set_attn_implementation(attention)
    return model


def windows(model) -> set[int | None]:
    """The attention windows of its layers; None for a layer that sees everything."""
    config = model.config
    if config.model_type == "mistral":
        return {config.sliding_window}
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return {config.sliding_window if kind == "sliding_attention" else None for kind in kinds}


def library_cache(kind: str, model):
    """An empty cache of the library; None for kind "none"."""
    if kind == "dynamic":
        return DynamicCache()
    if kind == "dynamic_config":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=STATIC_LENGTH)


def paged_cache(setup, model) -> PagedCache:
    """The null-policy composition that `setup` names, on `model`."""
    axes = {"format": "fp32", "block_size": setup.block, "groups": setup.groups,
            "workspace_tokens": setup.workspace, "kernels": setup.kernels}
    if setup.groups == "per_head":  # tokens are chosen, and all of them stay
        axes |= {"evict": "token", "policy": "snapkv", "budget_percent": 100.0}
    elif setup.prefix == "hash":
        axes |= {"prefix": "hash", "policy": "lru", "budget_blocks": 2048 // setup.block}
    return PagedCache.for_model(model, **axes)
