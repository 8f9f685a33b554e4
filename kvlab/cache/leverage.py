"""Compactor: how far a key lies out, and what its neighbours look at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.cache.keys import Whole
from kvlab.cache.scores import by_kv_head
from kvlab.core import BadInput, check_number, checked_seed

SINKS = 8  # at the start of a sequence: their keys are like no other and would set the measure


class Compactor(Whole):
    """Approximate leverage of keys before rotation, blended with attention within pieces of text.

    Compactor (Chari and Van Durme 2025, https://arxiv.org/abs/2507.08143): the statistical leverage
    x (X'X)^-1 x' of centred keys in a Gaussian sketch, plus the attention that a token gets from
    all queries of its piece, earlier ones included, times its value's norm; both as z-scores over a
    layer. sketch: dims of it (48); piece: tokens (256); blend: weight of the leverage (0.35; where
    NVIDIA's kvpress takes the compression ratio). A token is scored once, with its own chunk.
    Differs: where rotary positions are not plain, keys are taken as they are.
    """

    name = "compactor"
    caps = False

    def __init__(self, sketch: int = 48, piece: int = 256, blend: float = 0.35, seed: int = 0):
        if min(sketch, piece) < 1:
            raise BadInput("compactor", (sketch, piece), "needs at least one dim and one token")
        check_number("observes.blend", blend, 0, whole=False)
        self.sketch, self.piece, self.blend = sketch, piece, blend
        self.seed = checked_seed("observes.seed", seed)

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        tokens = q.shape[1]
        skip = min(SINKS, tokens - 1) if len(k) == tokens else 0
        q, own = q[:, skip:].float(), [x[len(x) - tokens + skip :].float() for x in (k, v)]
        found = self.blend * normal(self.leverage(own[0]))
        found = found + normal(self.attention(q, *own, scale))
        score = torch.zeros(k.shape[1], len(k), device=k.device)
        score[:, len(k) - tokens :] = found.amax()  # of sinks
        score[:, len(k) - tokens + skip :] = found
        return score

    def leverage(self, k: Tensor) -> Tensor:
        """Of keys [n, H, D] that follow one another, fp32 [H, n]."""
        x = self._plain(k).transpose(0, 1)
        x = x - x.mean(1, keepdim=True)
        width = x.shape[-1]
        if width > self.sketch:
            draw = torch.Generator().manual_seed(self.seed)
            sketch = torch.randn(x.shape[0], width, self.sketch, generator=draw)
            x = x @ sketch.to(x.device) / self.sketch**0.5
        gram = x.transpose(1, 2) @ x
        ridge = 1e-2 * torch.eye(gram.shape[-1], device=x.device)  # kvpress has the same
        solved = torch.linalg.solve(gram + ridge, x.transpose(1, 2))
        return (x * solved.transpose(1, 2)).sum(-1).clamp_min(0)

    def _plain(self, k: Tensor) -> Tensor:
        """Keys turned back by their places; what all of them are turned by changes no leverage."""
        if self.rotary is None or 2 * len(self.rotary) != k.shape[-1]:
            return k
        angle = torch.arange(len(k), device=k.device)[:, None] * self.rotary.to(k.device)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = k.chunk(2, -1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What each token gets from the queries of its piece, times |v|, fp32 [H, n]."""
        heads, found = k.shape[1], []
        for at in range(0, len(k), self.piece):
            mine = slice(at, at + self.piece)
            grouped = q[:, mine].unflatten(0, (heads, -1))
            x = torch.einsum("hgtd,nhd->hgtn", grouped, k[mine]) * scale
            found.append(by_kv_head(x.softmax(-1).sum(2).flatten(0, 1), heads))
        got = torch.cat(found, -1) * v.norm(dim=-1).T
        return F.avg_pool1d(got, 3, stride=1, padding=1)

    def weight(self, steps, queries):
        return 0.0 if steps else 1.0


def normal(x: Tensor) -> Tensor:
    """With mean 0 and deviation 1 over all of it."""
    return (x - x.mean()) / x.std().clamp_min(1e-6)
