"""The library's own caches under our attention: baselines run on a model that kvlab switched."""

from __future__ import annotations

import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.core import KvlabError
from kvlab.model.visibility import PLAIN_CHUNK, Visibility


def dense_attention(module, query, key, value, mask, *, scaling=None, dropout=0.0, **told):
    """[B, Hq, T, D] over whole keys and values [B, H, n, D] -> [B, T, Hq, D]; the library's sdpa.

    A plain chunk behind a plain past needs no q x kv mask, which at 200k tokens would be gigabytes;
    the library would build one.
    """
    if isinstance(mask, Visibility):
        raise KvlabError("a mask made for a PagedCache came with the keys of another cache")
    if mask is not PLAIN_CHUNK:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **told
        )
    keys, values = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
        dropout_p=dropout, scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None
