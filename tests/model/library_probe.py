"""A probe of transformers: what its models hand to registered attention and mask functions."""

from __future__ import annotations

import inspect
from typing import get_args

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

PROBE = "library_probe"
WINDOWED = {  # the ways in which the library says "sliding window"
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def changed(what: str, file: str) -> str:
    version = transformers.__version__
    return f"transformers {version} changed: {what}; kvlab/model/{file} relies on it"


def takes_cache(module: nn.Module) -> list[str]:
    """The parameters of its forward that are annotated as a cache."""
    parameters = inspect.signature(type(module).forward).parameters
    told = {name: p.annotation for name, p in parameters.items()}
    named = {name for name, a in told.items() if isinstance(a, str) and "Cache" in a.split(" | ")}
    return [name for name, a in told.items() if name in named or a is Cache or Cache in get_args(a)]


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


def probed(model, inputs=None, cache=None, tokens: int = 2):
    """One forward under the probe, over a cache of its own kind that has seen 3 columns."""
    model.set_attn_implementation(PROBE)
    if cache is None:
        cache = Cache(layers=[Hands() for _ in range(model.config.num_hidden_layers)])
    ids = torch.ones(2, tokens, dtype=torch.long)
    model(input_ids=ids, **{takes_cache(model)[0]: cache}, **inputs or {})
    return cache
