"""What is drawn of several runs, of few values, and of one thing measured twice."""

from __future__ import annotations

import pytest

from kvlab.report import canvas
from kvlab.report.budgets import budget_figures
from kvlab.report.entries import entries
from kvlab.report.figures import drawings
from kvlab.report.marks import bars_or_dots, row_names
from kvlab.report.names import metric
from kvlab.report.source import Run


def row(name, variant, value, **params):
    about = metric(name)
    return {"name": name, "variant": variant, "value": float(value), "unit": about.unit,
            "better": about.better, "low": None, "high": None, "count": 4, "params": params}


def run_of(name, rows):
    return Run(name, rows, label=name)


def stems(*runs):
    return [d.stem for d in drawings(entries(list(runs)), list(runs))]


def test_of_two_models_a_variant_has_one_line():
    """Forty bars of two models stood under each other, 40 cm high."""
    two = [run_of(name, [row("ttft_ms", v, 10 * i + j, model=name)
                         for i, v in enumerate(("int8", "int4", "int2"), 1)])
           for j, name in enumerate(("small", "large"))]  # fmt: skip
    made, [axes] = canvas.figure()
    bars_or_dots(axes, entries(two), "ttft_ms")
    assert [t.get_text() for t in axes.get_yticklabels()] == ["int8", "int4", "int2"]
    assert [t.get_text() for t in made.legends[0].texts] == ["small", "large"]
    assert len({patch.get_y() for patch in axes.patches}) == 6  # none hides another


def test_memory_of_two_models_has_a_panel_for_each():
    two = [run_of(name, [row("cache_allocated_bytes", v, 2**20 * (i + j), model=name)
                         for i, v in enumerate(("full", "int4", "int2"), 1)])
           for j, name in enumerate(("small", "large"))]  # fmt: skip
    [memory] = [d for d in drawings(entries(two), two) if d.stem == "memory"]
    axes = memory.draw().axes
    assert [a.get_title(loc="left") for a in axes] == ["small", "large"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["full", "int4", "int2"]


@pytest.mark.parametrize(("values", "drawn"), [((1, 2), False), ((1, 1, 2, 2), False),
                                               ((1, 2, 3), True)])  # fmt: skip
def test_fewer_than_three_values_are_no_figure(values, drawn):
    found = [row("ttft_ms", f"v{i}", value) for i, value in enumerate(values)]
    assert ("ttft_ms" in stems(run_of("run", found))) is drawn


def test_what_is_the_reciprocal_of_a_figure_is_no_other():
    found = [row(name, f"v{i}", value, prefix=i) for i in range(3) for name, value in (
        ("prefill_seconds", 1 + i), ("prefill_tokens_per_second", 100 / (1 + i)))]  # fmt: skip
    assert stems(run_of("run", found)) == ["speed"]
    alone = [r for r in found if r["name"] == "prefill_seconds"]
    assert stems(run_of("run", alone)) == ["prefill_seconds"]


def budgets(model, percents, loss="kl_mean_nats"):
    found = [row("cache_logical_bytes", "full", 100, model=model, tokens=64, baseline=True)]
    for percent in percents:
        for variant in ("snapkv", "lru", "tova"):
            put = {"variant": f"{variant} {percent}%", "model": model, "tokens": 64}
            found += [row("cache_logical_bytes", value=percent, **put),
                      row(loss, value=len(variant) / percent, **put)]  # fmt: skip
    return found


def test_runs_of_one_model_are_one_figure_of_budgets():
    """Loss and recall of one model, measured in two runs, were two figures."""
    both = [run_of("loss", budgets("m", (50, 25))),
            run_of("recall", budgets("m", (50, 25), "needle_recall_percent"))]  # fmt: skip
    [(stem, *_, draw)] = budget_figures(entries(both))
    assert stem == "loss_by_budget" and len(draw().axes) == 2


def test_a_model_of_one_budget_beside_one_of_several_has_its_loss_drawn():
    two = [run_of("small", budgets("a", (50, 25))), run_of("large", budgets("b", (25,)))]
    assert stems(*two)[:2] == ["loss_by_budget-small", "kl_mean_nats-large"]


@pytest.mark.parametrize(("name", "ends", "shown"), [
    ("top1_agreement_percent", (99.88, 100.01), (99.88, 100.0)),
    ("kl_mean_nats", (-0.025, 0.106), (0.0, 0.106)),
    ("kl_minus_random_nats", (-0.025, 0.106), (-0.025, 0.106)),  # a difference may be negative
    ("needle_recall_percent", (-3.0, 103.0), (0.0, 100.0)),
    ("perplexity_delta_percent", (-0.1, 120.0), (-0.1, 120.0)),
])  # fmt: skip
def test_an_interval_ends_where_its_measurement_does(name, ends, shown):
    """124 committed rows of early runs cross it, as an agreement of 99.98 [99.88, 100.01] %."""
    old = row(name, "a", sum(ends) / 2) | dict(zip(("low", "high"), ends))
    [entry] = entries([run_of("run", [old])])
    assert (entry.rows[name]["low"], entry.rows[name]["high"]) == shown


def test_settings_are_told_in_words():
    found = [row("ttft_ms", "bf16", t, tier=tier, prompt_tokens=t)
             for t, tier in ((97_499, "device"), (447_138, "host"))]  # fmt: skip
    assert row_names(entries([run_of("run", found)])) == [
        "bf16, from the device, 97,499 prompt tokens", "bf16, from the host, 447,138 prompt tokens"]
