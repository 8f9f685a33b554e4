"""What a cache must know of a model: its shape and its rotary frequencies."""

from __future__ import annotations

from torch import Tensor

from kvlab.cache import CacheSpec


def model_geometry(config, spec: CacheSpec):
    """Geometry of a transformers config; `num_key_value_heads` counts, never the query heads."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return spec.geometry(config.num_hidden_layers, heads, kv_heads, dim)


def sliding_window(attention) -> int | None:
    """The sliding window in tokens that an attention layer of the library goes by, None without.

    Layers that differ in it know their own; in other models the config has the one of all layers.
    """
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(getattr(attention, "config", None), "sliding_window", None)


def rotary_frequencies(model) -> Tensor | None:
    """The frequencies [D / 2] by which keys are rotated; None where they depend on the length."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
        return None
    return getattr(rotary, "inv_freq", None)
