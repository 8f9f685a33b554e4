"""What a decoder layer computes around its attention, for one token per row: plain torch.

`layer_triton` has the same names and signatures, with fewer kernels: at one token each weight is
read once, and what costs is the number of launches. Rows B, inner width K, outer width N.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Finish(NamedTuple):
    """Weights of a layer behind its attention: output projection, norm and MLP."""

    o: Tensor
    gain: Tensor
    eps: float
    gate: Tensor
    up: Tensor
    down: Tensor


class Start(NamedTuple):
    """Weights of a layer before its attention: norm, q, k, v, and the norms of their heads."""

    gain: Tensor
    eps: float
    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor] | None
    heads: int
    kv_heads: int
    q_gain: Tensor | None
    k_gain: Tensor | None
    head_eps: float


Heads = tuple[Tensor, Tensor, Tensor]


def chained(
    ops, x: Tensor, mixed: Tensor | None, finish: Finish | None, start: Start | None,
    cos: Tensor | None, sin: Tensor | None,
) -> tuple[Tensor, Heads | None]:
    """`chain` out of the functions below, as the module `ops` has them."""
    if finish is not None:
        x = ops.linear_add(mixed, finish.o, x)
        inner = ops.gated_linear(x, finish.gain, finish.eps, finish.gate, finish.up)
        x = ops.linear_add(inner, finish.down, x)
    if start is None:
        return x, None
    qkv = ops.norm_linear(x, start.gain, start.eps, start.weights, start.biases)
    sizes = start.heads, start.kv_heads, start.q_gain, start.k_gain, start.head_eps
    return x, ops.rotate(qkv, *sizes, cos, sin)


def chain(
    x: Tensor, mixed: Tensor | None, finish: Finish | None, start: Start | None,
    cos: Tensor | None, sin: Tensor | None,
) -> tuple[Tensor, Heads | None]:
    """From one attention to the next: a layer's rest, and the beginning of the layer after it.

    x: [B, K], a layer's input; mixed: what its attention gave, [B, Hq * D]; finish: its weights;
    start: those of the next layer; cos, sin: [B, D]. Without `finish`, x goes into `start` as it
    is. Returns the next layer's input and its q, k, v as of `rotate` (None without `start`).
    """
    return chained(sys.modules[__name__], x, mixed, finish, start, cos, sin)


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
