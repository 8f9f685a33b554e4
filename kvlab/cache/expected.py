"""Expected Attention: what queries like those seen would look at."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from kvlab.cache.scores import OBSERVED_QUERIES, Scorer, in_blocks, over_layers


class ExpectedAttention(Scorer):
    """Attention that a token can expect from the queries to come, times its value's norm.

    Expected Attention (Devoto et al. 2025, https://arxiv.org/abs/2510.00636, NVIDIA's kvpress): for
    queries drawn from N(mu, Sigma) the mean of exp(q.k) is exp(mu.k + k' Sigma k / 2), normalized
    over the tokens there are and multiplied by |v|. mu and Sigma are those of the step's queries,
    turned to the mean of the next 512 positions. The first 4 queries of a chunk do not count: a
    sink's is like no other. Where rotary positions are not plain (`rotary` is None), they are
    those of the last 32 queries as they are.
    Differs: the new tokens' own keys do not enter the normalization of the past in chunks.
    """

    name = "expected_attention"
    queries = sys.maxsize
    future = 512  # positions to come

    def part(self, q, k, v, *, scale, block_size, seen=None):
        return in_blocks(self._both(q, k, v, scale).flatten(1, 2), block_size).logsumexp(-1)

    @over_layers()
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        valued, plain = self._both(q, k, v, scale)
        return torch.exp(valued - plain.logsumexp(-1, keepdim=True)).mean(-2)

    def _both(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Logits to expect with the norm of values in them, and without: fp32 [2, ..., H, G, n]."""
        mean, spread = self._to_come(q)
        keys, shape = k.float(), (k.shape[-2], -1)
        x = torch.einsum("...hgd,...nhd->...hgn", mean.unflatten(-2, shape), keys) * scale
        x += torch.einsum("...hgde,...nhd,...nhe->...hgn", spread.unflatten(-3, shape), keys,
                          keys) * (scale * scale / 2)  # fmt: skip
        norms = v.float().norm(dim=-1).clamp_min(1e-20).log()  # [..., n, H]
        return torch.stack([x + norms.transpose(-1, -2)[..., None, :], x])  # they see every key

    def _to_come(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [..., Hq, D] and covariance [..., Hq, D, D] of the queries to expect after q [...,
        Hq, T, D]."""
        drawn = self._turned(q.float())
        mean = drawn.mean(-2)
        off = drawn - mean[..., None, :]
        return mean, off.transpose(-1, -2) @ off / drawn.shape[-2]

    def _turned(self, q: Tensor) -> Tensor:
        """Each query as it would be at the mean of the positions to come."""
        if self.rotary is None or 2 * len(self.rotary) != q.shape[-1]:
            return q[..., -OBSERVED_QUERIES:, :]
        q = q[..., 4:, :] if q.shape[-2] > 64 else q
        steps = torch.arange(1, self.future + 1, device=q.device)
        back = torch.arange(q.shape[-2] - 1, -1, -1, device=q.device)
        turn = self.rotary.to(q.device, torch.float32)
        to_come = torch.polar(torch.ones(1, device=q.device), steps[:, None] * turn).mean(0)
        turns = to_come * torch.polar(torch.ones(1, device=q.device), back[:, None] * turn)
        first, second = q.chunk(2, -1)
        moved = torch.complex(first.contiguous(), second.contiguous()) * turns
        return torch.cat((moved.real, moved.imag), -1)

    def by_head(self, parts, lse):
        valued, plain = torch.cat(parts, -1)
        return torch.exp(valued - plain.logsumexp(-1, keepdim=True))

    def weight(self, steps, queries):
        return min(1.0, queries / OBSERVED_QUERIES) if steps else 1.0
