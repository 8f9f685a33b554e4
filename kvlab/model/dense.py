"""The library's own caches under our attention: baselines run on a model that kvlab switched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.core import KvlabError
from kvlab.kernel.attend_ref import capped
from kvlab.model.visibility import PLAIN_CHUNK, Visibility


def dense_attention(module, query, key, value, mask, *, scaling=None, dropout=0.0, **told):
    """[B, Hq, T, D] over whole keys and values [B, H, n, D] -> [B, T, Hq, D]; the library's sdpa.

    A plain chunk behind a plain past needs no q x kv mask, which at 200k tokens would be gigabytes;
    the library would build one.
    """
    if isinstance(mask, Visibility):
        raise KvlabError("a mask made for a PagedCache came with the keys of another cache")
    softcap, sinks = told.pop("softcap", None), told.pop("s_aux", None)
    if softcap is not None or sinks is not None:
        keys, values = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        logits = query.float() @ keys.float().transpose(2, 3)
        logits = capped(logits * (query.shape[-1] ** -0.5 if scaling is None else scaling), softcap)
        return _weighed(logits, mask, values, sinks, dropout).to(query.dtype), None
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


def _weighed(logits: Tensor, mask, values: Tensor, sinks: Tensor | None, dropout: float) -> Tensor:
    """logits fp32 [B, Hq, T, n], what sdpa would get as mask, values [B, Hq, n, D] and sinks [Hq]
    -> [B, T, Hq, D]. Logits that sdpa cannot make: the matrix of weights is built."""
    tokens, keys = logits.shape[2:]
    if mask is None or mask is PLAIN_CHUNK:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=logits.device).tril(keys - tokens)
    seen = mask.dtype == torch.bool
    logits = logits.masked_fill(~mask, -torch.inf) if seen else logits + mask.float()
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(len(logits), -1, tokens, 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)[..., :keys].nan_to_num(0.0)  # a query that sees nothing
    return (F.dropout(weights, dropout) @ values.float()).transpose(1, 2).contiguous()
