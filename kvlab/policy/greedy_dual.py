"""Greedy dual policies: a clock that inflates."""

from __future__ import annotations

from kvlab.policy.base import PriorityPolicy


class GDSF(PriorityPolicy):
    """Greedy dual: a block is worth clock + frequency / size; the clock rises to each victim's.

    Cherkasova 1998 (https://www.hpl.hp.com/techreports/98/HPL-98-69R1.pdf), with all costs alike,
    which aims at the hit rate. No parameters. Old worth loses against new without any ageing pass.
    """

    name = "gdsf"

    def __init__(self):
        super().__init__()
        self._clock = 0.0

    def gain(self, meta) -> float:
        """What one use of the block saves, in the unit of the aim."""
        return 1.0

    def priority(self, meta):
        return self._clock + (1 + meta.hits) * self.gain(meta) / meta.size

    def pop(self):
        self._clock, id = self._pop()
        return id


class CostGDSF(GDSF):
    """GDSF where a use of a block saves `meta.cost`: the heart of PGDSF."""

    name = ""

    def gain(self, meta):
        return meta.cost
