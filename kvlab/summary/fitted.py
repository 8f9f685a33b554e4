"""Attention Matching: masses and outputs of the reference queries, by least squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.core import BadInput, check_number
from kvlab.summary.base import Entries, Queries, logits, shares
from kvlab.summary.merged import LEAST_BIAS, Merged
from kvlab.summary.solve import TINY, nnls, ridge

KEYS = ("merged", "selected")
MOST_MASS = 40.0  # natural log of how often over one entry may count; its square is still finite
WORSE = 1e-3      # of the error that a fit may have more than its start: rounding, not a failure
HUGE = torch.finfo(torch.bfloat16).max  # entries are kept in bf16


class Fitted(Merged):
    """Keys first, then the bias so that the mass matches, then the values so that the output does.

    Attention Matching (https://arxiv.org/abs/2602.16284). The bias is the log of non-negative least
    squares weights on exp(q k), the values are least squares on the output, both over the queries
    that the model asked last.
    keys: `selected` are the tokens of largest root mean square attention, as in the paper;
    `merged` are the centroids of `Merged`. damping: how strongly bias and values are held where
    they start (the merged ones); queries to come are not the ones fitted. Also differs: each query
    counts by the share of its attention that goes to what is summarized; one past is summarized
    piece by piece while it is evicted, not once after the prompt; heads have equal budgets.
    A head whose fit is not finite, or answers its queries worse than what it started from, is
    merged instead, and `fallbacks` counts it.
    ratio, max_entries, grouping, steps: as `Merged`. solver_steps: of the bias.
    """

    name = "fitted"

    def __init__(
        self, ratio: float = 0.05, max_entries: int | None = None, grouping: str = "alike",
        steps: int = 4, keys: str = "merged", damping: float = 0.3, solver_steps: int = 100,
    ):
        super().__init__(ratio, max_entries, grouping, steps)
        if keys not in KEYS:
            raise BadInput("summary.keys", keys, "known: " + ", ".join(KEYS))
        check_number("summary.damping", damping, 0, whole=False, above=True)
        check_number("summary.solver_steps", solver_steps)
        self.keys, self.damping, self.solver_steps = keys, damping, solver_steps

    def reduce(self, past: Entries, count: int, queries: Queries) -> Entries:
        merged = self.keys == "merged"
        start = super().reduce(past, count, queries) if merged else selected(past, count, queries)
        want = asked(past, queries)
        fitted = self.fit(start, want, queries)
        good = finite(fitted) & (want.miss(fitted, queries) <= want.miss(start, queries) + WORSE)
        if good.all():
            return fitted
        self._fallbacks += int((~good).sum())
        plain = start if merged else super().reduce(past, count, queries)
        return Entries(*(
            torch.where(good.view(1, -1, *[1] * (x.dim() - 2)), x, y) for x, y in zip(fitted, plain)
        ))

    def fit(self, start: Entries, want: Answers, queries: Queries) -> Entries:
        """`start` with bias and values refined until it answers `queries` as wanted."""
        found = want.relative(start, queries)  # [H, m, c]
        mass, share = torch.exp(found.clamp_max(MOST_MASS)), want.share
        ones = torch.ones_like(mass[:, 0])
        gain = nnls(
            mass * share[..., None], share, ones, damping=self.damping, steps=self.solver_steps
        ).clamp_min(1e-30).log()
        weights = (found + gain[:, None]).softmax(-1) * share[..., None]
        aim = want.out * share[..., None]
        v = ridge(weights, aim, heads_first(start.v), damping=self.damping)
        bias = (start.bias + gain.T).clamp_min(LEAST_BIAS)
        return Entries(start.k, heads_first(v).contiguous(), bias)


class Answers(NamedTuple):
    """What queries get from a past: out [H, m, D], own [H, m] its log mass and share [H, m] of all
    that they see; fp32."""

    out: Tensor
    own: Tensor
    share: Tensor

    def relative(self, entries: Entries, queries: Queries) -> Tensor:
        """[H, m, c]: log of the mass of each entry, in that of the whole past."""
        return logits(queries.q, entries) - self.own[..., None]

    def miss(self, entries: Entries, queries: Queries) -> Tensor:
        """[H]: mean squared error of all attention with `entries` for the past, in squares of what
        the past gives, if the rest of what the queries see has values of 0."""
        found = self.relative(entries, queries)
        mass = self.share * found.logsumexp(-1).clamp_max(MOST_MASS).exp()
        part = (mass / (mass + (1.0 - self.share)).clamp_min(TINY))[..., None]
        size = self.out.abs().amax((1, 2), keepdim=True).clamp_min(TINY)
        got = torch.einsum("hmc,chd->hmd", found.softmax(-1), entries.v / size.transpose(0, 1))
        aim = self.out / size * self.share[..., None]
        return (got * part - aim).square().mean((1, 2)) / aim.square().mean((1, 2)).clamp_min(TINY)


def asked(past: Entries, queries: Queries) -> Answers:
    """What `queries` get from `past`."""
    seen = logits(queries.q, past)
    own = seen.logsumexp(-1)
    out = torch.einsum("hmn,nhd->hmd", torch.exp(seen - own[..., None]), past.v)
    return Answers(out, own, torch.exp(own - queries.lse))


def finite(entries: Entries) -> Tensor:
    """bool [H]: whether all of a head's entries are finite where they will be kept."""
    return (entries.v.abs() <= HUGE).all(-1).all(0) & entries.bias.isfinite().all(0)


def selected(past: Entries, count: int, queries: Queries) -> Entries:
    """The `count` entries of largest root mean square share of attention, per KV head."""
    score = shares(queries, past).square().mean(1)
    best = score.topk(count, dim=-1).indices.sort(-1).values.T  # [c, H]
    k, v = (x.gather(0, best[..., None].expand(-1, -1, x.shape[-1])) for x in (past.k, past.v))
    return Entries(k, v, past.bias.gather(0, best))


def heads_first(x: Tensor) -> Tensor:
    """[n, H, D] <-> [H, n, D]."""
    return x.transpose(0, 1)
