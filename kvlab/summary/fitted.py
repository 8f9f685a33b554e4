"""Attention Matching: masses and outputs of the reference queries, by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.summary.base import Entries, Queries, logits, shares
from kvlab.summary.merged import LEAST_BIAS, Merged
from kvlab.summary.solve import nnls, ridge

KEYS = ("merged", "selected")


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
        if damping <= 0:
            raise BadInput("summary.damping", damping, "must be above 0")
        if solver_steps < 1:
            raise BadInput("summary.solver_steps", solver_steps, "must be at least 1")
        self.keys, self.damping, self.solver_steps = keys, damping, solver_steps

    def reduce(self, past: Entries, count: int, queries: Queries) -> Entries:
        if self.keys == "merged":
            start = super().reduce(past, count, queries)
        else:
            start = selected(past, count, queries)
        return self.fit(start, past, queries)

    def fit(self, start: Entries, past: Entries, queries: Queries) -> Entries:
        """`start` with bias and values refined until it answers `queries` as `past` does."""
        seen = logits(queries.q, past)
        own = seen.logsumexp(-1)  # [H, m]
        out = torch.einsum("hmn,nhd->hmd", torch.exp(seen - own[..., None]), past.v)
        share = torch.exp(own - queries.lse)
        mass = torch.exp(logits(queries.q, start) - own[..., None])  # [H, m, c], of the own mass
        ones = torch.ones_like(mass[:, 0])
        gain = nnls(
            mass * share[..., None], share, ones, damping=self.damping, steps=self.solver_steps
        )
        mass = mass * gain[:, None]
        weights = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30) * share[..., None]
        v = ridge(weights, out * share[..., None], heads_first(start.v), damping=self.damping)
        bias = start.bias + gain.clamp_min(1e-30).log().T
        return Entries(start.k, heads_first(v).contiguous(), bias.clamp_min(LEAST_BIAS))


def selected(past: Entries, count: int, queries: Queries) -> Entries:
    """The `count` entries of largest root mean square share of attention, per KV head."""
    score = shares(queries, past).square().mean(1)
    best = score.topk(count, dim=-1).indices.sort(-1).values.T  # [c, H]
    k, v = (x.gather(0, best[..., None].expand(-1, -1, x.shape[-1])) for x in (past.k, past.v))
    return Entries(k, v, past.bias.gather(0, best))


def heads_first(x: Tensor) -> Tensor:
    """[n, H, D] <-> [H, n, D]."""
    return x.transpose(0, 1)
