"""The library's doors: the layer that `update` hands on, and the attention that is registered.

transformers' attention layers do nothing with the result of `Cache.update` but hand it to the
registered attention function, so `update` stages the new keys and values and returns the layer
itself; the attention function finds cache, queries and new tokens in one place. From there it is
one call to the step under way, and one more to each source that it reads.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin

from kvlab.core import KvlabError
from kvlab.model.dense import dense_attention
from kvlab.model.refusals import refuse_gradients, refuse_unknown
from kvlab.model.visibility import KeyColumns, paged_mask

ATTENTION = "kvlab_paged"


class Untouchable(KvlabError):
    """A model looked at what `update` gave back, instead of handing it to attention."""


class PagedLayer(CacheLayerMixin):
    """One layer's door into the cache; holds nothing but the tokens on their way in."""

    is_compileable = False  # generate() must neither compile nor prebuild a mask
    is_sliding = False
    is_croppable = True

    def __init__(self, cache, index: int, last: bool = False):
        super().__init__()
        self.cache, self.index = weakref.proxy(cache), index  # weakly: the cache owns its layers
        self.last = last  # whether the forward ends with it
        self.pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to reserve: blocks come with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Stage [B, H, T, D] twice; the attention function takes it from here."""
        self.pending = (key_states, value_states)
        return self, self

    def __getattr__(self, name: str):
        if hasattr(Tensor, name) and not name.startswith("_"):
            raise Untouchable(
                f"PagedCache needs the {ATTENTION} attention: make it with "
                "PagedCache.for_model(model), or call model.set_attn_implementation"
                f"({ATTENTION!r}) again"
            )
        raise AttributeError(name)

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return KeyColumns(self.cache.seen + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.pending = None

    def crop(self, *args, **kwargs) -> None:
        """Raises `KvlabError`: what is done to the rows is done to all layers."""
        raise KvlabError("a layer of a PagedCache has no rows of its own: crop, reorder, repeat or "
                         "select those of the cache")

    reorder_cache = batch_repeat_interleave = batch_select_indices = crop

    def __getstate__(self) -> dict:
        """For a copy of the cache; tokens on their way in belong to a step of the original."""
        return vars(self) | {"pending": None}


def paged_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
    position_ids=None, softcap=None, s_aux=None, **told,
):
    """The registered attention: [B, Hq, T, D] -> [B, T, Hq, D]; `key`: a PagedLayer or a tensor.

    Raises `KvlabError` for what a PagedCache cannot do: gradients, dropout, attention weights,
    masks that are not causal with padding, and arguments of attention that it does not know.
    """
    if not isinstance(key, PagedLayer):
        return dense_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            sliding_window=sliding_window, position_ids=position_ids, softcap=softcap, s_aux=s_aux,
            **told,
        )
    refuse_unknown(module, dropout, told)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    cache, index = key.cache, key.index
    (keys, values), key.pending = key.pending, None
    if torch.is_grad_enabled():
        refuse_gradients(query, keys, values)
    try:
        if index == 0:
            cache.open_forward(module, query, keys, values, attention_mask, position_ids)
        forward = cache.forward
        window = forward.enter(index, query, keys, values, attention_mask, softcap)
        out = forward.step.attend(
            index, query, keys, values, scale=scale, window=window, sinks=s_aux
        )
        if key.last:
            cache.close_forward(position_ids)
    except BaseException:
        cache.abort()
        raise
    return out, None


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, paged_mask)
