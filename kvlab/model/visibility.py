"""What each query may see, as transformers says it: one rule for all rows, and padding by row.

The library asks the registered mask function once for each kind of layer. For a `PagedCache` no
mask over queries and keys is ever built: the function hands on the rule and the 2D mask, and the
cache looks whether it can follow. For every other cache the library's own mask is built, but for a
plain chunk behind a plain past, which attention can tell from the lengths.
"""

from __future__ import annotations

from types import FunctionType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from kvlab.core import KvlabError

PLAIN_CHUNK = "a chunk that sees all of the past and itself causally"  # in the place of a mask


class KeyColumns(int):
    """The number of key columns; as only a `PagedCache` gives it, it tells whose mask is asked."""


class Visibility(NamedTuple):
    """rule: the library's function of batch, head, query and key column; padding: bool [B, n] or
    None, the caller's 2D mask; custom: whether the caller bent the rule by functions of his own."""

    rule: FunctionType
    padding: Tensor | None
    custom: bool


def paged_mask(
    *, q_length: int, kv_length: int, q_offset=0, kv_offset: int = 0,
    mask_function=causal_mask_function, attention_mask: Tensor | None = None,
    use_vmap: bool = False, **told,
):
    """The registered mask function: a `Visibility` for our caches, else what sdpa would get."""
    if isinstance(kv_length, KeyColumns):
        return Visibility(mask_function, attention_mask, use_vmap)
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_length + kv_offset
    chunk = ends_together and 1 < q_length < kv_length and not use_vmap
    if chunk and mask_function is causal_mask_function and _hides_nothing(
        attention_mask, kv_length + kv_offset
    ):
        return PLAIN_CHUNK
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, **told,
    )


def _hides_nothing(mask: Tensor | None, columns: int) -> bool:
    return mask is None or (mask.shape[-1] >= columns and bool(mask[:, :columns].all()))


def window_of(mask: Visibility | Tensor | None) -> int | None:
    """The sliding window that `mask` asks for, or the chunks, see `first_seen`.

    The library's attention goes by the mask alone, and a 4D mask of the caller's says it all.
    Raises `KvlabError` for any other rule than causal attention, with such a window or without.
    """
    if not isinstance(mask, Visibility):
        return None
    if not mask.custom and mask.rule is causal_mask_function:
        return None
    for window in () if mask.custom else found_in(mask.rule, int):
        if same_rule(mask.rule, sliding_window_causal_mask_function(window)):
            return window
        if any(same_rule(mask.rule, chunked_causal_mask_function(window, pads))
               for pads in found_in(mask.rule, Tensor)):
            return -window
    raise KvlabError("a PagedCache attends causally, with a sliding window, in chunks or to all; "
                     "this forward asks for another rule, which only the library's caches follow")


def found_in(rule, kind: type) -> list:
    """What a function closes over of this very type, the functions inside it too."""
    if isinstance(rule, tuple):
        return [x for part in rule for x in found_in(part, kind)]
    if isinstance(rule, FunctionType):
        return found_in(tuple(c.cell_contents for c in rule.__closure__ or ()), kind)
    return [rule] if type(rule) is kind else []


def same_rule(a, b) -> bool:
    """Whether two functions are the same code over the same values, closures included."""
    if a is b:
        return True
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        inner = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ is b.__code__ and same_rule(*map(tuple, inner))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_rule, a, b))
    return type(a) is type(b) and isinstance(a, (int, float, str, bool, type(None))) and a == b


def tokens_of(
    mask: Visibility | Tensor | None, batch: int, tokens: int, columns: int
) -> np.ndarray | None:
    """Which of the columns are tokens, bool [B, columns] on the host; None where all are.

    The last `tokens` of the columns are the queries. A 2D mask that is too short hides the rest,
    as in the library; 4D masks count if they are causal with padding, and are refused otherwise.
    """
    if isinstance(mask, Tensor):
        real = _from_4d(mask, batch, tokens, columns)
    elif mask is None or mask.padding is None or _hides_nothing(mask.padding, columns):
        return None
    else:
        real = pad(mask.padding, (0, max(0, columns - mask.padding.shape[-1])))[:, :columns]
    if real.dim() != 2 or len(real) != batch:
        raise KvlabError(f"an attention mask of shape {list(real.shape)} does not fit a batch of "
                         f"{batch} rows and {columns} columns")
    return None if bool(real.all()) else real.cpu().numpy()


def _from_4d(mask: Tensor, batch: int, tokens: int, columns: int) -> Tensor:
    """The 2D mask that says the same as `mask` [B or 1, heads or 1, T, columns]; else refused."""
    if mask.dim() != 4 or tuple(mask.shape[2:]) != (tokens, columns) or len(mask) not in (1, batch):
        raise KvlabError(f"an attention mask of shape {list(mask.shape)} does not fit {batch} rows "
                         f"of {tokens} tokens over {columns} columns")
    seen = _visible(mask)
    if bool((seen != seen[:, :1]).any()):
        raise KvlabError("an attention mask that differs from head to head is nothing that a "
                         "PagedCache follows")
    seen = seen[:, 0].expand(batch, -1, -1)
    real = seen[:, -1]
    reach = torch.arange(columns, device=mask.device) - (columns - tokens)
    causal = reach <= torch.arange(tokens, device=mask.device)[:, None]
    if not torch.equal(seen, causal & real[:, None]):
        raise KvlabError("a PagedCache follows 4D attention masks that are causal with padding; "
                         "this one hides or shows tokens in another way")
    return real


def _visible(mask: Tensor) -> Tensor:
    """Bool, from a bool mask or one that is added to the logits."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise KvlabError(f"a 4D attention mask of {mask.dtype} says neither what is seen nor what "
                         "is added to the logits; give bool or floating point")
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool((~hidden & (mask != 0)).any()):
        raise KvlabError("an attention mask that adds other numbers than 0 and -inf to the logits "
                         "is nothing that a PagedCache follows")
    return ~hidden
