"""Variants against each other: what an axis adds to eviction at the same budget."""

from __future__ import annotations

from collections.abc import Iterator

from kvlab import stats
from kvlab.cache import CacheSpec
from kvlab.core import Measurement
from kvlab.eval.base import Runner, done
from kvlab.eval.evaluate import Evaluate


class Paired(Evaluate):
    """As `Evaluate`; variants of one budget are also paired with each other.

    Plain eviction is the control of what summarizes, retrieves or offloads under the same budget.
    Token by token, so what makes a text hard cancels, and an interval that excludes 0 is a
    difference.
    """

    def _beside(self, folder, runner: Runner, whole: list[Runner]) -> Iterator[Measurement]:
        yield from super()._beside(folder, runner, whole)
        if not runner.spec.bounded or is_plain(runner.spec):
            return
        for control in whole:
            name = f"kl_minus_{control.spec.member.name}_nats"
            if (control.spec.bounded and is_plain(control.spec) and not done(folder, runner, name)
                    and budget(control.spec) == budget(runner.spec)):
                yield from paired(runner, control, self.seed)


def is_plain(spec: CacheSpec) -> bool:
    """Whether what is evicted is gone."""
    return not (spec.summary.makes or spec.retrieval.selects or spec.offload.keeps)


def budget(spec: CacheSpec) -> tuple:
    division = spec.budget.name, *sorted(vars(spec.budget).items())
    return spec.budget_percent, spec.budget_bytes, spec.budget_blocks, division


def paired(runner: Runner, control: Runner, seed: int) -> Iterator[Measurement]:
    """By how much `runner` is worse (above 0) or better than `control` on the same tokens."""
    name = control.spec.member.name
    count = sum(map(len, runner.nll))
    ratio = stats.paired_ratio_percent(runner.nll, control.nll, seed=seed)
    yield Measurement(f"perplexity_over_{name}_percent", ratio.value, "%", "lower", ratio.low,
                      ratio.high, count)
    gaps = [a - b for a, b in zip(runner.kl, control.kl)]
    gap = stats.mean_interval(gaps, seed=seed)
    yield Measurement(f"kl_minus_{name}_nats", gap.value, "nats", "lower", gap.low, gap.high, count)
