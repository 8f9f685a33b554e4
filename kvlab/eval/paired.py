"""Variants against each other: what an axis adds to eviction at the same budget."""

from __future__ import annotations

from collections.abc import Iterator

from kvlab import stats
from kvlab.cache import CacheSpec
from kvlab.core import Measurement
from kvlab.eval.base import Runner
from kvlab.eval.evaluate import Evaluate


class Paired(Evaluate):
    """As `Evaluate`; variants of one budget are also paired with each other.

    Plain eviction is the control of what summarizes, retrieves or offloads under the same budget.
    Token by token, so what makes a text hard cancels, and an interval that excludes 0 is a
    difference. A resumed run pairs only what it has measured itself.
    """

    def _quality(self, folder, loaded, texts, todo: list[Runner]) -> None:
        super()._quality(folder, loaded, texts, todo)
        bounded = [r for r in todo if r.spec.bounded]
        controls = [r for r in bounded if is_plain(r.spec)]
        for runner in (r for r in bounded if r not in controls):
            same = [c for c in controls if budget(c.spec) == budget(runner.spec)]
            rows = [row for control in same for row in paired(runner, control, self.seed)]
            folder.add(runner.name, runner.params, rows)


def is_plain(spec: CacheSpec) -> bool:
    """Whether what is evicted is gone."""
    return not (spec.summary.makes or spec.retrieval.selects or spec.offload.keeps)


def budget(spec: CacheSpec) -> tuple:
    return spec.budget_percent, spec.budget_bytes, spec.budget_blocks


def paired(runner: Runner, control: Runner, seed: int) -> Iterator[Measurement]:
    """By how much `runner` is worse (above 0) or better than `control` on the same tokens."""
    name = control.spec.policy().name
    count = sum(map(len, runner.nll))
    ratio = stats.paired_ratio_percent(runner.nll, control.nll, seed=seed)
    yield Measurement(f"perplexity_over_{name}_percent", ratio.value, "%", "lower", ratio.low,
                      ratio.high, count)
    gaps = [a - b for a, b in zip(runner.kl, control.kl)]
    gap = stats.mean_interval(gaps, seed=seed)
    yield Measurement(f"kl_minus_{name}_nats", gap.value, "nats", "lower", gap.low, gap.high, count)
