"""H2O: keep what the model looks at."""

from __future__ import annotations

from kvlab.policy.base import PriorityPolicy


class AttentionMass(PriorityPolicy):
    """The block that attracts least attention leaves: heavy hitters stay.

    H2O (Zhang et al. 2023, https://arxiv.org/abs/2306.14048). The recent tokens that
    H2O keeps are the window's business (`window=sink`). `meta.score` is the block's share of
    attention, summed over heads and averaged over the steps since it was sealed, given by the live
    cache. Differs from H2O: whole blocks instead of tokens, the same ones for all heads of a layer
    group, and the average instead of the sum, with which old blocks would always win.
    half_life: tokens after which what was seen counts half, so that what once mattered can leave;
    None, as in H2O: every step counts alike.
    """

    name = "attention_mass"
    scored = True
    observes: object = "mass"
    by_token: object = "mass"

    def __init__(self, half_life: float | None = None):
        super().__init__()
        self.half_life = half_life
        if half_life is not None:
            self.observes = self.by_token = "mass", {"half_life": half_life}

    def priority(self, meta):
        return meta.score, meta.last
