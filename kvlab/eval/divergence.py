"""Token by token: how far a variant's prediction is from the full cache's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SLICE_TOKENS = 256  # float32 logits of this many tokens are held at a time


class TokenScores(NamedTuple):
    """float64 [T] each: nll in nats, KL(full || variant) in nats, whether the top-1 is the same."""

    nll: np.ndarray
    kl: np.ndarray
    same: np.ndarray


def nll(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Negative log likelihood in nats of `targets` [T] under `logits` [T, V]."""
    parts = [
        -torch.log_softmax(x.float(), -1).gather(-1, y[:, None])[:, 0]
        for x, y in zip(logits.split(SLICE_TOKENS), targets.split(SLICE_TOKENS))
    ]
    return torch.cat(parts).double().cpu().numpy()


def compare(logits: Tensor, full: Tensor, targets: Tensor) -> TokenScores:
    """`logits` and `full` [T, V] of variant and full cache; `targets` [T] the next tokens."""
    rows = [
        _compare_slice(x.float(), y.float(), t)
        for x, y, t in zip(*(z.split(SLICE_TOKENS) for z in (logits, full, targets)))
    ]
    return TokenScores(*(torch.cat(c).double().cpu().numpy() for c in zip(*rows)))


def _compare_slice(x: Tensor, full: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_q, log_p = torch.log_softmax(x, -1), torch.log_softmax(full, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)
    same = (x.argmax(-1) == full.argmax(-1)).float()
    return -log_q.gather(-1, targets[:, None])[:, 0], kl, same
