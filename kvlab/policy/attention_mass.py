"""Keep what the model looks at: the mean that a query gives, or H2O's sum."""

from __future__ import annotations

from kvlab.core import check_number
from kvlab.policy.base import PriorityPolicy


class AttentionMass(PriorityPolicy):
    """The block or token that a query gives least attention leaves: heavy hitters stay.

    After H2O (Zhang et al. 2023, https://arxiv.org/abs/2306.14048; `policy=h2o`), with a mean where
    H2O has a sum, since with a sum what is old wins. By token and head it is the mean of all
    queries that saw the token, which kvpress calls observed attention. By block `meta.score` is the
    share of attention, the mean over heads, the last 32 queries of a step, and steps.
    half_life: tokens after which what was seen counts half, so that what once mattered can leave;
    None: every query, or step, counts alike.
    """

    name = "attention_mass"
    scored = True
    observes: object = "mass"
    by_token: object = "observed"

    def __init__(self, half_life: float | None = None):
        super().__init__()
        check_number("policy.half_life", half_life, 0, whole=False, above=True, null=True)
        self.half_life = half_life
        if half_life is not None:
            how = {"half_life": half_life}
            self.observes, self.by_token = ("mass", how), ("observed", how)

    def priority(self, meta):
        return meta.score, meta.last
