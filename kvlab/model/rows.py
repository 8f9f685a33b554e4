"""Which rows and columns of a batch an operation of the library's cache means."""

from __future__ import annotations

from collections.abc import Callable
from operator import index

import torch
from torch import Tensor

from kvlab.core import BadInput


def removed_columns(tokens_to_remove) -> int:
    """How many columns `crop(tokens_to_remove)` takes; 0 or more.

    Raises `BadInput` for a positive count, which older versions of the library read as the length
    to crop to and newer ones refuse, and for what is no whole number.
    """
    try:
        count = index(tokens_to_remove)
    except TypeError:
        count = None
    if count is None or count > 0 or tokens_to_remove is False:
        raise BadInput("tokens_to_remove", tokens_to_remove, "must be a whole number, 0 or less: "
                       "crop(-n) forgets the last n tokens")
    return -count


def selected_rows(
    rows: int, key: str, value, select: Callable[[Tensor], Tensor]
) -> list[int]:
    """Which of `rows` rows stand where after `select`, an operation on the first dim of a tensor.

    key, value: its argument, for the error. Raises `BadInput` where the operation is impossible,
    gives no batch, or an empty one.
    """
    value = value.tolist() if isinstance(value, Tensor) else value
    try:
        chosen = select(torch.arange(rows))
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(key, value, f"cannot be applied to {rows} rows: {reason}") from error
    if chosen.dim() != 1:
        raise BadInput(key, value, "must give a batch of rows; give a list or a 1-dim tensor")
    if not len(chosen):
        raise BadInput(key, value, "leaves no row; cache.finish() ends a request")
    return chosen.tolist()
