"""The library's own caches under our attention, so that baselines need no q x kv mask either."""

from __future__ import annotations

import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import repeat_kv

from kvlab.core import KvlabError


def dense_attention(module, query, key, value, mask, scale, window):
    """[B, Hq, T, D] over whole keys and values [B, H, n, D] -> [B, T, Hq, D]."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None and not bool(mask.all()):
        raise KvlabError("padded batches need a PagedCache under this attention")
    if window is not None and keys > window:
        raise KvlabError("a sliding window needs a PagedCache under this attention")
    groups = module.num_key_value_groups
    bias = causal_lower_right(queries, keys) if 1 < queries < keys else None
    out = F.scaled_dot_product_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=bias,
        is_causal=bias is None and queries > 1, scale=scale,
    )
    return out.transpose(1, 2).contiguous()


def padding_mask(batch_size=None, q_length=None, attention_mask=None, **_):
    """Hand the 2D padding mask through at prefill; never build a q x kv mask."""
    return None if attention_mask is None or q_length == 1 else attention_mask
