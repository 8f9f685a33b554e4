"""How a cache is handed to modules of transformers: by their own signature, never by a name."""

from __future__ import annotations

import inspect
from functools import cache
from typing import get_args

from torch import nn
from transformers.cache_utils import Cache

from kvlab.core import KvlabError


def cache_parameter(module: nn.Module) -> str:
    """The parameter of `module.forward` that takes a `Cache`.

    It was `past_key_values` and is `cache` from transformers 5.24 on. A wrapper that hides its
    signature is asked for the first module inside that shows one. Raises `KvlabError` if none does.
    """
    for inner in module.modules():
        name = _parameter(type(inner).forward)
        if name is not None:
            return name
    raise KvlabError(f"{type(module).__name__}.forward has no parameter for a Cache, so kvlab does "
                     "not know how this version of transformers hands one on")


@cache
def _parameter(forward) -> str | None:
    for parameter in inspect.signature(forward).parameters.values():
        told = parameter.annotation
        named = isinstance(told, str) and "Cache" in told.replace("|", " ").split()
        if told is Cache or Cache in get_args(told) or named:
            return parameter.name
    return None


def forward_with(model: nn.Module, cache: Cache, **inputs):
    """The model's output of `inputs`, computed over `cache`.

    Raises `KvlabError` if the forward came back and left the cache as it was: then it ran without.
    """
    before = int(cache.get_seq_length())
    out = model(**inputs, **{cache_parameter(model): cache}, use_cache=True)
    tokens = inputs["input_ids"].shape[1]
    if int(cache.get_seq_length()) != before + tokens:
        raise KvlabError(f"{type(model).__name__}.forward took {tokens} tokens and did not put "
                         "them into the cache that it was given")
    return out
