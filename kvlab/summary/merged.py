"""Centroids: tokens that the queries can hardly tell apart become one entry."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kvlab.core import BadInput
from kvlab.summary.base import Entries, Queries, Summary, products, shares
from kvlab.summary.groups import alike, contiguous

GROUPINGS = ("alike", "contiguous")
LEAST_BIAS = -30.0  # exp of it is nothing beside any token; an empty group gets it


class Merged(Summary):
    """Each group becomes its centroid, weighted by attention, with the group's mass as bias.

    KeepKV (https://arxiv.org/abs/2504.09936) merges with a count of the tokens in the logit; here
    the bias is the log of what the reference queries gave the group over what they give its
    centroid, so that the mean mass of every group is conserved. Also differs: groups are found by
    weighted k-means over the logits and values (`alike`) or are runs of neighbours (`contiguous`),
    per KV head; keys merge as they are, at different rotary positions.
    ratio, max_entries: as `Summary`. steps: of k-means.
    """

    name = "merged"

    def __init__(
        self, ratio: float = 0.05, max_entries: int | None = None, grouping: str = "alike",
        steps: int = 4,
    ):
        super().__init__(ratio, max_entries)
        if grouping not in GROUPINGS:
            raise BadInput("summary.grouping", grouping, "known: " + ", ".join(GROUPINGS))
        if steps < 1:
            raise BadInput("summary.steps", steps, "must be at least 1")
        self.grouping, self.steps = grouping, steps

    def reduce(self, past: Entries, count: int, queries: Queries) -> Entries:
        mass = shares(queries, past).mean(1) + 1e-12  # [H, n]; unattended tokens count equally
        if self.grouping == "contiguous":
            groups = contiguous(past, count)
        else:
            groups = alike(past, count, queries, mass, self.steps)
        return conserved(centroids(past, groups, count, mass), groups, mass, queries)


def centroids(past: Entries, groups: Tensor, count: int, weights: Tensor) -> Entries:
    """Weighted means of keys and values of each group, weights [H, n]; bias 0."""
    member = one_hot(groups, count).float() * weights[..., None]
    member = member / member.sum(1, keepdim=True).clamp_min(1e-30)
    k, v = (torch.einsum("hnc,nhd->chd", member, x) for x in (past.k, past.v))
    return Entries(k, v, torch.zeros_like(past.bias[:count]))


def conserved(merged: Entries, groups: Tensor, mass: Tensor, queries: Queries) -> Entries:
    """`merged` with the bias that gives each group its mean `mass` [H, n] under `queries` back."""
    wanted = torch.einsum("hnc,hn->hc", one_hot(groups, merged.count).float(), mass)
    given = torch.exp(products(queries.q, merged.k) - queries.lse[..., None]).mean(1)
    bias = wanted.clamp_min(1e-30).log() - given.clamp_min(1e-30).log()
    return merged._replace(bias=bias.T.clamp_min(LEAST_BIAS).contiguous())


class MergeMean(Summary):
    """Means of neighbouring tokens with no bias: what merging is without its mass.

    ratio, max_entries: as `Summary`.
    """

    name = "merge_mean"

    def reduce(self, past: Entries, count: int, queries: Queries) -> Entries:
        groups = contiguous(past, count)
        return centroids(past, groups, count, past.bias.T.exp())
