"""What a format may lose on a model that was not measured.

An interval over documents says nothing of other models: what int8 loses on one of the two measured
lies outside the other's. Between models the logarithm of KL varies; how much is pooled over all
formats, and the t interval of one more model is told. Perplexity goes by KL: its change divided by
KL is pooled likewise, and told for the largest KL of that interval. Formats of one model are taken
for independent, which they are not quite; two models are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from kvlab.advice.table import Figure, Loss, losses

LEVEL = 0.975


class Elsewhere(NamedTuple):
    """On another model, 95 %. kl: nats, its value the models' geometric mean; perplexity: change in
    %, its value the models' mean."""

    kl: Figure
    perplexity: Figure

    def told(self) -> str:
        """Perplexity's interval and KL's upper end; the lower one is the noise of the arithmetic
        that the rows were measured in."""
        low, high = self.perplexity[1:]
        return f"perplexity {low:+.1f} to {high:+.1f} %, KL at most {self.kl.high:.2g} nats"


def elsewhere(rows: Sequence[Loss], table: Sequence[Loss] | None = None) -> Elsewhere | None:
    """Of the format whose rows, one for each model, these are; None of the baseline.

    table: whose models' variation is pooled; by default all formats that ship.
    """
    rows = [row for row in rows if row.kl]
    if not rows:
        return None
    spread, freedom, low, high = _pooled(table)
    logs = [math.log(row.kl.value) for row in rows]
    reach = t.ppf(LEVEL, freedom) * spread * math.sqrt(1 + 1 / len(logs))
    middle = float(np.mean(logs))
    kl = Figure(*(math.exp(middle + side * reach) for side in (0, -1, 1)))
    mean = float(np.mean([row.perplexity.value for row in rows]))
    return Elsewhere(kl, Figure(mean, 100 * kl.high * low, 100 * kl.high * high))


def _pooled(table: Sequence[Loss] | None) -> tuple[float, int, float, float]:
    """Deviation of ln KL between models and its degrees of freedom; the interval of perplexity's
    change (as a fraction) over KL for one more model."""
    squares, freedom, ratios = 0.0, 0, []
    every = [row for row in (losses() if table is None else table) if row.kl]
    for options in dict.fromkeys(row.options for row in every):
        rows = [row for row in every if row.options == options]
        if len(rows) < 2:
            continue
        logs = np.log([row.kl.value for row in rows])
        squares += float(((logs - logs.mean()) ** 2).sum())
        freedom += len(rows) - 1
        ratios += [row.perplexity.value / 100 / row.kl.value for row in rows]
    reach = t.ppf(LEVEL, len(ratios) - 1) * np.std(ratios, ddof=1) * math.sqrt(1 + 1 / len(ratios))
    middle = float(np.mean(ratios))
    return math.sqrt(squares / freedom), freedom, middle - float(reach), middle + float(reach)
