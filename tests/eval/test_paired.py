"""What an axis adds, paired with plain eviction of the same budget."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.cache import CacheSpec
from kvlab.eval.runner import Runner
from kvlab.eval.text_loss import BudgetLoss, is_plain


def runner(name, extra=0.0, **axes):
    spec = CacheSpec(policy="fifo", **{"budget_percent": 10.0} | axes)
    rng = np.random.default_rng(0)
    nll = [rng.exponential(size=600) for _ in range(2)]
    raws = {n: {"nll": x + extra, "kl": 0.1 * x + extra} for n, x in enumerate(nll)}
    return Runner(name, {}, spec, raws=raws)


def test_a_constant_gap_is_found_without_spread():
    found = BudgetLoss().versus(runner("a", -0.01, summary="merged"), runner("b"), 0)
    rows = {m.name: m for m in found}
    gap, ratio = rows["kl_minus_fifo_nats"], rows["perplexity_over_fifo_percent"]
    assert gap[1:2] + gap[4:6] == pytest.approx((-0.01, -0.01, -0.01)) and gap.count == 1200
    assert ratio.value == pytest.approx(100 * np.expm1(-0.01))


def test_only_the_same_budget_is_paired():
    task, full = BudgetLoss(), Runner("full", {}, CacheSpec())
    whole = [full, runner("plain"), runner("told", summary="merged"),
             runner("other", budget_percent=5.0), runner("alone", summary="fitted",
                                                         budget_percent=20.0)]  # fmt: skip
    found = {r.name: [m.name for o in whole for m in task.versus(r, o, 0)] for r in whole}
    assert found.pop("told") == ["perplexity_over_fifo_percent", "kl_minus_fifo_nats"]
    assert not any(found.values())
    assert is_plain(full.spec) and not is_plain(whole[2].spec)
