"""How far predictions lie apart, token by token; the ground truth of `divergence_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

SLICE_TOKENS = 256  # float32 logits of this many tokens are held at a time


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats, fp32 [T], of `targets` [T] under `logits` [T, V]."""
    parts = [
        -torch.log_softmax(x.float(), -1).gather(-1, y[:, None])[:, 0]
        for x, y in zip(logits.split(SLICE_TOKENS), targets.split(SLICE_TOKENS))
    ]
    return torch.cat(parts)


def divergence(
    logits: Tensor, full: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `logits` against `full`, both [T, V] of any float dtype, with `targets` [T] the next
    tokens: negative log likelihood of these under `logits` and KL(full || logits), nats, fp32 [T];
    whether the likeliest token is the same, of equals the first, bool [T].
    """
    rows = [
        _slice(x.float(), y.float(), t)
        for x, y, t in zip(*(z.split(SLICE_TOKENS) for z in (logits, full, targets)))
    ]
    return tuple(torch.cat(column) for column in zip(*rows))


def _slice(x: Tensor, full: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_q, log_p = torch.log_softmax(x, -1), torch.log_softmax(full, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)
    return -log_q.gather(-1, targets[:, None])[:, 0], kl, x.argmax(-1) == full.argmax(-1)
