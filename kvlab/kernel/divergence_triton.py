"""How far predictions lie apart; same names and signatures as the references in `divergence_ref`.

A vocabulary of 150,000 makes every fp32 copy of a chunk's logits gigabytes. Here a program takes
one token and reads its logits where they lie, once for the normalizers and once for the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time


@triton.jit
def folded(x, start, top, total, best, BLOCK: tl.constexpr):
    """One more block `x` of a row: its largest logit, the sum of exponentials around it, and where
    the largest stands first."""
    high = tl.max(x, 0)
    best = tl.where(high > top, start + tl.argmax(x, 0), best)
    new = tl.maximum(top, high)
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0), best


@triton.jit
def divergence_kernel(
    logits, full, targets, nll, kl, same, V, row_stride, full_stride,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program: a token. Without PAIRED only `nll` is written."""
    t = tl.program_id(0).to(tl.int64)
    own, other = logits + t * row_stride, full + t * full_stride
    i = tl.arange(0, BLOCK)
    x_top = tl.full([], -float("inf"), tl.float32)
    x_total, x_best = tl.full([], 0.0, tl.float32), tl.full([], 0, tl.int32)
    y_top, y_total, y_best = x_top, x_total, x_best
    for start in range(0, V, BLOCK):
        there = start + i < V
        x = tl.load(own + start + i, mask=there, other=-float("inf")).to(tl.float32)
        x_top, x_total, x_best = folded(x, start, x_top, x_total, x_best, BLOCK)
        if PAIRED:
            y = tl.load(other + start + i, mask=there, other=-float("inf")).to(tl.float32)
            y_top, y_total, y_best = folded(y, start, y_top, y_total, y_best, BLOCK)
    x_norm = x_top + tl.log(x_total)
    tl.store(nll + t, x_norm - tl.load(own + tl.load(targets + t)).to(tl.float32))
    if PAIRED:
        y_norm = y_top + tl.log(y_total)
        parts = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            there = start + i < V
            x = tl.load(own + start + i, mask=there, other=0.0).to(tl.float32)
            y = tl.load(other + start + i, mask=there, other=0.0).to(tl.float32)
            part = tl.exp(y - y_norm) * ((y - y_norm) - (x - x_norm))
            parts += tl.where(there, part, 0.0)
        tl.store(kl + t, tl.maximum(tl.sum(parts, 0), 0.0))
        tl.store(same + t, (x_best == y_best).to(tl.int8))


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """See `divergence_ref.surprise`."""
    nll, logits = torch.empty(len(logits), device=logits.device), _rows(logits)
    divergence_kernel[(len(logits),)](
        logits, logits, targets, nll, nll, nll, logits.shape[1], logits.stride(0), 0,
        PAIRED=False, BLOCK=BLOCK, num_warps=8,
    )
    return nll


def divergence(
    logits: Tensor, full: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `divergence_ref.divergence`."""
    logits, full = _rows(logits), _rows(full)
    nll, kl = torch.empty(2, len(logits), device=logits.device)
    same = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    divergence_kernel[(len(logits),)](
        logits, full, targets, nll, kl, same.view(torch.int8), logits.shape[1], logits.stride(0),
        full.stride(0), PAIRED=True, BLOCK=BLOCK, num_warps=8,
    )
    return nll, kl, same


def _rows(logits: Tensor) -> Tensor:
    """With the vocabulary contiguous."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
