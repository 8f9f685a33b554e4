"""What is told of a model that was not measured covers the models that were."""

from __future__ import annotations

import pytest

from kvlab.advice.table import Figure, formats, losses, measured
from kvlab.advice.transfer import elsewhere

LOSSY = [options for options in formats() if all(row.kl for row in measured(options))]


@pytest.mark.parametrize("options", LOSSY, ids=" ".join)
def test_each_model_lies_within_what_is_told_from_the_others(options):
    rows = measured(options)
    for row in rows:
        there = elsewhere([other for other in rows if other is not row])
        assert there.kl.low < row.kl.value < there.kl.high
        assert there.perplexity.low < row.perplexity.value < there.perplexity.high


def test_more_models_tell_more_and_the_baseline_nothing():
    rows = measured(("format=int4",))
    one, both = elsewhere(rows[:1]).kl, elsewhere(rows).kl
    assert one.high / one.low > both.high / both.low > 1
    assert elsewhere(measured(("format=bf16",))) is None


def test_models_that_agree_leave_little_room():
    alike = [row._replace(model=model, kl=Figure(1e-3 * bits, 0, 1), options=(f"format={bits}",),
                          perplexity=Figure(0.05 * bits, 0, 1))
             for row in losses()[1:2] for bits in (1, 2, 3) for model in "abc"]  # fmt: skip
    there = elsewhere(alike[:3], alike)
    assert there.kl == pytest.approx((1e-3, 1e-3, 1e-3))
    assert there.perplexity == pytest.approx((0.05, 0.05, 0.05))
