"""Token by token: how far a variant's prediction is from the full cache's."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from kvlab.kernel import divergence_ref
from kvlab.pool import fused_kernels


class TokenScores(NamedTuple):
    """On the device of the logits, [T] each: nll in nats and KL(full || variant) in nats, fp32;
    whether the top-1 is the same, bool."""

    nll: Tensor
    kl: Tensor
    same: Tensor


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats, fp32 [T], of `targets` [T] under `logits` [T, V]."""
    return _room(logits).surprise(logits, targets)


def compare(logits: Tensor, full: Tensor, targets: Tensor) -> TokenScores:
    """`logits` and `full` [T, V] of variant and full cache; `targets` [T] the next tokens. Nothing
    waits for the device."""
    return TokenScores(*_room(logits).divergence(logits, full, targets))


def _room(logits: Tensor) -> ModuleType:
    return fused_kernels(logits.device.type) or divergence_ref
