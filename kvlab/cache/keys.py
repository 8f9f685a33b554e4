"""Scores from keys and values alone: no query is looked at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.cache.scores import Scorer, in_blocks, over_layers
from kvlab.core import BadInput, checked_seed


class KeyNorm(Scorer):
    """Keys of small norm attract attention: the inverse of a block's mean key norm.

    Devoto et al. 2024, https://arxiv.org/abs/2406.11430. Looks at no query, and a block's score
    never changes. Differs: blocks instead of tokens, the same ones for all heads of a group; the
    paper keeps the first two layers whole, here all layers are alike.
    """

    name = "key_norm"
    caps = True  # it looks at no logit

    def part(self, q, k, v, *, scale, block_size, seen=None):
        return in_blocks(k.float().norm(dim=-1).T, block_size).mean(-1)

    def by_head(self, parts, lse):
        return 1.0 / torch.cat(parts, -1).clamp_min(1e-20)

    def scores(self, parts, lse):
        return 1.0 / torch.cat(parts, -1).mean(0).clamp_min(1e-20)

    @over_layers(lambda scorer: 0)
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        return 1.0 / k.float().norm(dim=-1).transpose(-1, -2).clamp_min(1e-20)


class KeyDiff(Scorer):
    """Keys unlike the others stay: one minus the cosine between a key and the mean direction.

    KeyDiff (Park et al. 2025, https://arxiv.org/abs/2504.15364): the anchor is the mean of the
    normalized keys that there are. Of a block, the mean over its tokens. Anew at every step, since
    the anchor moves.
    """

    name = "key_diff"
    queries = 1
    caps = True  # it looks at no logit

    def part(self, q, k, v, *, scale, block_size, seen=None):
        normal = F.normalize(k.float(), dim=-1).permute(1, 2, 0)
        return in_blocks(normal, block_size).mean(-1)  # a block's mean is linear in its keys

    def by_head(self, parts, lse):
        directions = torch.cat(parts, -1)  # [H, D, N]
        anchor = F.normalize(directions.mean(-1), dim=-1)
        return 1 - torch.einsum("hdn,hd->hn", directions, anchor)

    def weight(self, steps, queries):
        return 1.0


class RandomScore(Scorer):
    """A number drawn for each token and head: what any scorer has to beat.

    seed: of the draws, on the CPU, so that a run repeats on any device.
    """

    name = "random"
    queries = 1

    def __init__(self, seed: int = 0):
        self._generator, self._seed = torch.Generator(), checked_seed("observes.seed", seed)
        self.renew()

    def renew(self):
        self._generator.manual_seed(self._seed)

    def part(self, q, k, v, *, scale, block_size, seen=None):
        drawn = torch.rand(k.shape[1], k.shape[0] // block_size, generator=self._generator)
        return drawn.to(k.device)

    def by_head(self, parts, lse):
        return torch.cat(parts, -1)

    @over_layers(lambda scorer: 0)
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        drawn = torch.rand(*k.shape[:-3], k.shape[-2], k.shape[-3], generator=self._generator)
        return drawn.to(k.device, non_blocking=True)

    def weight(self, steps, queries):
        """Once drawn, a number stays: else what is old would have had to win many times."""
        return 0.0 if steps else 1.0


class Whole(Scorer):
    """A scorer of tokens only: it needs all that a layer has at once, side by side."""

    caps = True  # it looks at no logit

    def part(self, q, k, v, *, scale, block_size, seen=None):
        raise BadInput("policy", self.name, "ranks tokens and no blocks; cache.evict=token")

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        raise NotImplementedError


class LagKV(Whole):
    """Tokens whose channels stick out, measured by the tokens that come after them.

    LagKV (Liang et al. 2025, https://arxiv.org/abs/2504.04704): in partitions of `lag` tokens, keys
    and values are scaled by channel to the range of the next partition; a token's standard
    deviation over channels, softmax over the partition, mean of keys and values. A token's rank in
    its partition is its score, so all partitions keep alike. The first `sinks` tokens, and the last
    partition, which has no next one, rank highest.
    Differs: what was kept before is cut into partitions anew, together with what came since.
    """

    name = "lagkv"

    def __init__(self, lag: int = 128, sinks: int = 4):
        if lag < 2 or sinks < 0:
            raise BadInput("lag", (lag, sinks), "must be at least 2 tokens, with no fewer than 0 "
                           "sinks")
        self.lag, self.sinks = lag, sinks

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        n, heads, _ = k.shape
        parts = max(0, n - self.sinks) // self.lag
        score = torch.ones(heads, n, device=k.device)
        if parts < 2:  # nothing can be measured: the newest stay
            new = max(0, n - self.sinks)
            score[:, self.sinks :] = torch.arange(new, device=k.device) / max(1, new)
            return score
        cut = slice(self.sinks, self.sinks + parts * self.lag)
        found = sum(self._spread(x[cut].float()) for x in (k, v)) / 2  # [H, parts - 1, lag]
        rank = found.argsort(-1).argsort(-1) / self.lag
        score[:, self.sinks : self.sinks + rank[0].numel()] = rank.flatten(1)
        return score

    def _spread(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.lag)).permute(2, 0, 1, 3)  # [H, parts, lag, D]
        low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
        scaled = (x[:, :-1] - low) / (high - low).clamp_min(1e-12)
        return scaled.std(-1).softmax(-1)

    def weight(self, steps, queries):
        return 1.0
