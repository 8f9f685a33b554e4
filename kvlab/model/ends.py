"""Tokens that end a row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvlab.core import BadInput

EndTokens = int | Iterable[int] | Tensor | None


def end_tokens(eos: EndTokens, device) -> Tensor | None:
    """Ids [n] on `device`; None where nothing ends a row.

    eos: one id, several (what `generation_config.eos_token_id` holds), or None.
    Raises `BadInput` for anything but whole numbers, 0 or more.
    """
    given = eos.tolist() if isinstance(eos, Tensor) else eos
    many = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    ids = [] if given is None else list(many)
    if any(isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**63
           for id in ids):
        raise BadInput("eos", eos, "must be a token id, a list of them, or None")
    return torch.tensor(ids, device=device) if ids else None


def check_new_tokens(max_new_tokens: int) -> None:
    """Raises `BadInput` for a number of new tokens that is no whole number, or below 1."""
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise BadInput("max_new_tokens", max_new_tokens, "must be a whole number, at least 1")
