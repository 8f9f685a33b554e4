"""One forward of a model over a cache, without anybody who looks at its tokens."""

from __future__ import annotations

from torch import Tensor

from kvlab.core import KvlabError
from kvlab.model.columns import Columns
from kvlab.model.library import forward_with


def run_chunk(
    model, ids: Tensor, cache, *, mask: Tensor | None = None, last: bool = False
) -> Tensor:
    """Logits [B, T, V] of `ids` [B, T] after what a `PagedCache` holds, of which no `teller` hears;
    `last`: of the last column only. mask: [B, T], 0 for padding; None: there is none.
    """
    columns = cache.columns if cache.rows else Columns(len(ids))
    if len(ids) != columns.rows:
        raise KvlabError(f"the cache holds {columns.rows} rows, the batch has {len(ids)}")
    return forward_with(
        model, cache, input_ids=ids, position_ids=columns.positions(mask, ids.shape[1], ids.device),
        attention_mask=columns.mask(mask, ids.shape[1], ids.device),
        **({"logits_to_keep": 1} if last else {}),
    ).logits
