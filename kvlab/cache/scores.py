"""Scores of sealed blocks from the queries of a step: what `meta.score` is for each policy.

A scorer sees one layer of one sequence as segments of sealed blocks. `part` keeps of a segment
what the end of the layer needs, small and on the device; `scores` turns the parts into one number
a block, higher meaning stay; `weight` says how much a step's number counts against earlier ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab import axes, kinds
from kvlab.core import BadInput
from kvlab.kernel.attend_ref import capped, visible

OBSERVED_QUERIES = 32  # of a step, the last ones: SnapKV's window


class Place(NamedTuple):
    """Where a scorer of tokens is asked: number of the layer in the model, tokens that the sequence
    has seen, and which key/value head where one is asked for at a time."""

    layer: int
    seen: int
    head: int | None = None


def over_layers(reads: Callable[[Scorer], int | None] = lambda scorer: None):
    """Marks an `of_tokens` that takes several layers at once: with L in front of all shapes.

    reads: of a step's last queries, those that it looks at; None: all. Both are said of this very
    function: a subclass that writes its own gets one layer with all queries, or says so anew.
    """
    def marked(of_tokens):
        of_tokens.layered, of_tokens.reads = True, reads
        return of_tokens

    return marked


@kinds.members("observes")
class Scorer:
    """The interface. `queries`: how many of a step's last queries it looks at."""

    name = ""
    queries = OBSERVED_QUERIES
    decodes = False  # whether a single token's shares of attention are its scores too
    looks = 1  # decoded tokens before a choice among tokens that are looked at, where it `decodes`
    joins: torch.dtype | None = None  # of its own count of queries, where it has `joined`
    softcap: float | None = None  # of the model's logits
    caps = False  # whether its scores know of that; asked where there is one
    rotary: Tensor | None = None  # the model's frequencies [D / 2], where positions are plain
    span: tuple[int, int] | None = None  # tokens of a context that this step has repeated
    placed = False  # whether tokens have to stand at 0, 1, ... in their sequence
    place: Place | None = None  # of tokens: told before each `of_tokens`

    def fit(self, layers: int, query_heads: int, width: int) -> None:
        """Raises `BadInput` where it cannot score a model of so many layers and query heads, whose
        keys have this width; asked when a cache that chooses tokens is made."""

    @property
    def layered(self) -> bool:
        """Whether its `of_tokens` takes several layers at once."""
        return getattr(type(self).of_tokens, "layered", False)

    @property
    def reads(self) -> int | None:
        """Of a step's last queries, those that its `of_tokens` looks at; None: all."""
        found = getattr(type(self).of_tokens, "reads", None)
        return None if found is None else found(self)

    def part(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int,
        seen: Tensor | None = None,
    ) -> Tensor:
        """What is kept of one segment: q [Hq, T, D] of the whole step, k and v [N*S, H, D].

        seen: bool [T, N*S] where not every query may see every key: the step's own blocks.
        The last dim of the result is N. With block_size=1 a block is a token.
        """
        raise NotImplementedError

    def scores(self, parts: list[Tensor], lse: Tensor) -> Tensor:
        """fp32 [N of all parts]; `lse` [Hq, T] is over everything that the queries saw."""
        return self.by_head(parts, lse).mean(0)

    def by_head(self, parts: list[Tensor], lse: Tensor) -> Tensor:
        """The same for each head, [Hq or H, N]; one row where all heads choose alike.

        A subclass writes one of the two.
        """
        return self.scores(parts, lse)[None]

    def of_tokens(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, scale: float, shares
    ) -> Tensor:
        """The same of single tokens, all that a layer has: fp32 [H, n], or one row for all heads.

        q [Hq, T, D]: of the step, whose tokens are the last T of k, v [n, H, D]; shares: the
        kernel `token_shares` or its reference.
        """
        last = min(self.queries, q.shape[1])
        seen = visible(last, len(k), len(k) - last, 0, True, None, k.device)
        part = self.part(q[:, -last:], k, v, scale=scale, block_size=1, seen=seen)
        return by_kv_head(self.by_head([part], lse), k.shape[1])

    def renew(self) -> None:
        """As it was made: what it draws comes again from the start."""

    def weight(self, steps: int, queries: int) -> float:
        """Share of a step of `queries` tokens in the score of a block scored `steps` times before.

        The last `self.queries` queries count: a chunk at least that long replaces the score, a
        decoded token moves it by its share, as if the window slid on.
        """
        return min(1.0, queries / self.queries) if steps else 1.0

    def joined(
        self, old: Tensor, count: Tensor, new: Tensor, saw: Tensor, queries: int
    ) -> tuple[Tensor, Tensor]:
        """In the place of `weight`, of tokens: scores and counts [L, H, n] after a step of so many
        `queries`, of which `saw` [n] saw each token, gave them `new`. count: 0 of what is new.
        """
        raise NotImplementedError


class Mass(Scorer):
    """Share of attention that a block gets, the mean over heads, queries and steps.

    The last 32 queries of a chunk stand for all of them; `kvlab.cache.observed` has tokens by all.
    half_life: tokens after which what was seen counts half; None: every step counts alike.
    """

    name = "mass"
    decodes = caps = True

    def __init__(self, half_life: float | None = None):
        if half_life is not None and not half_life > 0:
            raise BadInput("half_life", half_life, "must be a positive number of tokens, or null")
        self.half_life = half_life

    def part(self, q, k, v, *, scale, block_size, seen=None):
        found = logits(q, k, scale, seen, self.queries, self.softcap)
        return in_blocks(found, block_size).logsumexp(-1)

    def by_head(self, parts, lse):
        joined = torch.cat(parts, -1)
        total = lse[:, -joined.shape[1] :, None]
        return torch.exp(joined - total).mean(1)

    @property
    def layered(self):
        return self.softcap is None and super().layered

    @over_layers(lambda scorer: scorer.queries)
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        if self.softcap is not None:
            return Scorer.of_tokens(self, q, k, v, lse, scale=scale, shares=shares)
        last = min(self.queries, q.shape[-2])
        return shares(q[..., -last:, :], k, lse[..., -last:], scale=scale)

    def weight(self, steps, queries):
        least = 1 - 0.5 ** (queries / self.half_life) if self.half_life else 0.0
        return max(1.0 / (steps + 1), least)


class SnapKV(Mass):
    """Attention that the last 64 queries give to a block and to its nearest neighbours.

    SnapKV (Li et al. 2024, https://arxiv.org/abs/2404.14469), with the defaults of its code.
    pool: "mean" or "max" over `kernel` tokens (5), so that what surrounds a find stays too.
    Differs: pooled for each query before the mean over queries, since a segment does not know the
    softmax's total yet; a pool ends where a segment ends; one choice for all heads of a group.
    """

    name = "snapkv"
    decodes = False

    queries = 64

    def __init__(self, pool: str = "mean", kernel: int = 5):
        super().__init__()
        if pool not in ("max", "mean"):
            raise BadInput("pool", pool, "must be max or mean")
        if kernel < 1 or kernel % 2 == 0:
            raise BadInput("kernel", kernel, "must be an odd number of tokens, at least 1")
        self.pool, self.kernel = pool, kernel

    def part(self, q, k, v, *, scale, block_size, seen=None):
        pooled = self._pooled(logits(q, k, scale, seen, self.queries, self.softcap))
        return in_blocks(pooled, block_size).logsumexp(-1)

    def _pooled(self, x: Tensor) -> Tensor:
        """Log weights [Hq, T, n] pooled over tokens; a mean is taken of the weights themselves."""
        if self.pool == "max":
            return F.max_pool1d(x, self.kernel, stride=1, padding=self.kernel // 2)
        top = x.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        sums = F.avg_pool1d(torch.exp(x - top), self.kernel, 1, self.kernel // 2)
        return torch.log(sums) + top

    @property
    def layered(self):
        return self.pool == "mean" and super().layered

    @over_layers(lambda scorer: scorer.queries)
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        if self.pool == "max" or self.softcap is not None:  # of each query, before the mean
            return Scorer.of_tokens(self, q, k, v, lse, scale=scale, shares=shares)
        found = super().of_tokens(q, k, v, lse, scale=scale, shares=shares)
        return F.avg_pool1d(found, self.kernel, 1, self.kernel // 2)

    weight = Scorer.weight


class TOVA(Mass):
    """Attention of the last token alone, anew at every step.

    TOVA (Oren et al. 2024, https://arxiv.org/abs/2401.06104): the token to which the newest one
    pays least attention leaves. Differs: blocks instead of tokens, and in a chunk of prefill the
    last token speaks for all. As in the paper, the mean over heads makes one choice for a layer.
    """

    name = "tova"
    queries = 1
    weight = Scorer.weight

    @over_layers(lambda scorer: scorer.queries)
    def of_tokens(self, q, k, v, lse, *, scale, shares):
        found = super().of_tokens(q, k, v, lse, scale=scale, shares=shares)
        return found.mean(-2, keepdim=True)


by_name = partial(axes.by_name, "observes")


def scorer_of(observes: object) -> Scorer:
    """What a policy `observes`, as a scorer that nobody else has: from its name or dotted path, or
    a pair of that and a dict of settings, or its class, or a copy of an instance. Raises `BadInput`
    for anything else.
    """
    if isinstance(observes, str):
        found = by_name(observes)
    elif isinstance(observes, tuple):
        found = by_name(observes[0], **observes[1])
    else:
        found = observes() if isinstance(observes, type) else copy.deepcopy(observes)
    if not isinstance(found, Scorer):
        raise BadInput("observes", observes, "must be a scorer's name, or a subclass of "
                       "kvlab.cache.scores.Scorer, or an instance of one")
    return found


def logits(
    q: Tensor, k: Tensor, scale: float, seen: Tensor | None, last: int,
    softcap: float | None = None,
) -> Tensor:
    """fp32 [Hq, T, n] of the last queries of q [Hq, T, D] with k [n, H, D]; -inf where not seen."""
    grouped = in_groups(q[:, -last:], k.shape[1])
    x = torch.einsum("hgtd,nhd->hgtn", grouped, k.float()).flatten(0, 1) * scale
    x = capped(x, softcap)
    return x if seen is None else x.masked_fill(~seen[-last:], -torch.inf)


def by_kv_head(scores: Tensor, heads: int) -> Tensor:
    """Scores [Hq or H, N] as [H, N]: query heads that share a key/value head speak with one voice.

    One row, for all heads, stays one.
    """
    return scores if len(scores) == 1 else scores.unflatten(0, (heads, -1)).mean(1)


def in_groups(q: Tensor, heads: int) -> Tensor:
    """Queries [Hq, T, D] by the key/value head that they read, fp32 [H, Hq / H, T, D]."""
    return q.float().reshape(heads, -1, *q.shape[1:])


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """[..., N*S] -> [..., N, S]."""
    return x.unflatten(-1, (-1, block_size))
