"""What a decoder layer computes around its attention, for one token per row: plain torch.

`layer_triton` has the same names and signatures, with fewer kernels: at one token each weight is
read once, and what costs is the number of launches. Rows B, inner width K, outer width N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_linear(
    x: Tensor, gain: Tensor | None, eps: float, weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """RMSNorm of x [B, K] (none without `gain` [K]), then each of `weights` [N_i, K] side by side.

    biases: one [N_i] per weight. Returns [B, sum of N_i].
    """
    x = x if gain is None else F.rms_norm(x, gain.shape, gain, eps)
    return torch.cat([F.linear(x, *pair) for pair in zip(weights, biases or [None] * 3)], 1)


def gated_linear(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate y) * (up y) of y = RMSNorm(x): [B, K] -> [B, N]; `gate`, `up` are [N, K]."""
    x = F.rms_norm(x, gain.shape, gain, eps)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual [B, N] + weight [N, K] times x [B, K]."""
    return residual + F.linear(x, weight)


def rotate(
    qkv: Tensor, heads: int, kv_heads: int, q_gain: Tensor | None, k_gain: Tensor | None,
    eps: float, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, (Hq + 2 H) D] into heads, norm them where there is a gain [D], apply RoPE.

    cos, sin: [B, D], the second half repeating the first or not. Returns q [B, Hq, D], k and v
    [B, H, D], each contiguous.
    """
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 1)
    turned = []
    for x, gain in ((q, q_gain), (k, k_gain)):
        x = x if gain is None else F.rms_norm(x, gain.shape, gain, eps)
        half = x.shape[-1] // 2
        swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
        turned.append(x * cos[:, None] + swapped * sin[:, None])
    return turned[0], turned[1], v.contiguous()
