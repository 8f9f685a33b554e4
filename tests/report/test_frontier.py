"""The non-dominated set, and lines of one method over its budgets."""

from __future__ import annotations

import numpy as np
import pytest

from kvlab.report import canvas
from kvlab.report.budgets import budget_figures, methods
from kvlab.report.entries import entries
from kvlab.report.frontier import best, frontier_figures, frontier_table, non_dominated, searched
from kvlab.report.marks import series
from kvlab.report.names import words
from kvlab.report.page import Page
from kvlab.report.source import Run

NAMES = ("kl_mean_nats", "cache_logical_bytes", "decode_tokens_per_second")


def rows(variant, *values, **params):
    about = {"unit": "", "better": None, "low": None, "high": None, "count": 1}
    return [{"variant": variant, "params": params, "name": n, "value": float(v), **about}
            for n, v in zip(NAMES, values)]  # fmt: skip


def test_non_dominated_against_the_definition():
    points = np.random.default_rng(0).integers(0, 4, (60, 3)).astype(float)
    kept = non_dominated(points)
    for i, p in enumerate(points):
        beaten = any((q <= p).all() and (q < p).any() for q in points)
        assert kept[i] == (not beaten)
    assert non_dominated(np.ones((3, 2))).all()


def search():
    found = rows("full", 0, 100, 50, baseline=True)
    found += rows("small", 0.5, 10, 80, search="nsga2")
    found += rows("good", 0.1, 50, 60, search="nsga2")
    found += rows("bad", 0.6, 60, 60, search="nsga2")
    return entries([Run("run", found)])


def test_the_set_its_table_and_its_figure():
    everything = search()
    assert [e.variant for e in searched(everything)] == ["small", "good", "bad"]
    assert [e.variant for e in best(everything)] == ["small", "good"]
    [table] = frontier_table(everything)
    assert table.title.endswith("2 of 3 measured")
    assert [row[:3] for row in table.cells] == [["1", "small", "10.0"], ["2", "good", "50.0"]]
    [(stem, _, caption, draw)] = frontier_figures(everything)
    assert stem == "frontier" and "3 compositions" in caption
    draw()


def test_no_search_no_frontier():
    everything = entries([Run("run", rows("a", 1, 2, 3) + rows("b", 2, 1, 3))])
    assert frontier_table(everything) == frontier_figures(everything) == []


def test_methods_are_variants_without_their_budgets():
    found = rows("bf16", 0, 100, 1, baseline=True)
    for share in (5, 10):
        found += rows(f"lru {share}%", 0.1, share, 1)
        found += rows(f"random {share}% (control)", 0.2, share, 1, control="random eviction")
        found += rows(f"window.sinks=4 window.recent={share}", 0.3, share, 1)
    found += rows("lfu cache.budget_blocks=3", 0.3, 3, 1)
    everything = entries([Run("run", found)])
    found += rows("int4", 0.05, 25, 1)
    everything = entries([Run("run", found)])
    assert list(methods(everything)) == ["lru", "random (control)", "window.sinks=4", "lfu", "int4"]
    [(stem, _, _, draw)] = budget_figures(everything)
    assert stem == "loss_by_budget"
    made = draw().axes[0]
    told = {t.get_text(): t.get_color() for t in made.texts}
    assert set(told) == {"LRU", "random (control)", "4 sinks", "LFU", "int4"}
    assert len(set(told.values())) == 5  # no colour twice
    assert budget_figures([e for e in everything if e.variant in ("bf16", "int4", "lfu")]) == []


def test_names_at_the_ends_do_not_meet():
    assert canvas.spread([0.0, 1.0, 2.0], 0.5) == [0.0, 1.0, 2.0]
    found = canvas.spread([0.5, 0.52, 0.5, 0.9], 0.1)
    assert found[3] == 0.9 and sorted(found)[1] - sorted(found)[0] >= 0.1 - 1e-9
    assert abs(sum(found[:3]) / 3 - sum([0.5, 0.52, 0.5]) / 3) < 1e-9  # moved about their middle
    assert found[0] < found[2] < found[1]


def test_a_loss_of_nothing_does_not_flatten_an_axis():
    values = [1e-9, 0.1, 0.0, -1.0]
    assert canvas.floored(values) == pytest.approx([1e-4, 0.1, 0.0, -1.0])
    assert canvas.lifted(values, canvas.floored(values)) == [True, False, False, False]


def test_a_point_that_lies_lower_than_it_is_drawn_tells_its_value():
    """A noise floor of 7.6e-07 nats stood at 1e-05, level with int8's 8.9e-06."""
    found = rows("bf16", 0, 100, 1, baseline=True) + rows("int8", 1e-5, 50, 1)
    made, [axes] = canvas.figure()
    everything = [e for e in entries([Run("run", found + rows("int4", 0.1, 25, 1))])
                  if not e.is_baseline]  # fmt: skip
    series(axes, everything, "kl_mean_nats", lambda e: 1.0, everything)
    assert [t.get_text() for t in axes.texts] == ["int8: 1.0e-05", "int4"]


@pytest.mark.parametrize(("variant", "said"), [
    ("snapkv 10% cache.evict=token", "SnapKV, 10 %, by token"),
    ("lru 5% host quest retrieval.budget_tokens=816",
     "Quest, 816 tokens read, LRU, 5 % on the device"),
    ("fifo 5% host", "FIFO, 5 % on the device, rest on the host"),
    ("sink window.recent=64 int8 expected_attention 50%",
     "int8, expected attention, 50 %, 64 newest kept"),
    ("sink snapkv", "SnapKV, newest kept"), ("sink window.recent=64", "window, 64 recent"),
    ("int4 lru 5% window 4+64 b16", "int4, LRU, 5 %, blocks of 16, 4 sinks + 64 newest kept"),
    ("shuffled key_norm 10% (control)", "shuffled key norm, 10 % (control)"),
    ("attention_mass 10% random summary.ratio=0.04",
     "attention mass, 10 %, random entries, 0.04 of the tokens as entries"),
    ("attention_mass random", "attention mass, random entries"),  # the method of the line above
    ("int4 format.key.axis=token", "int4, keys scaled by token"),
    ("static fused graph", "transformers' static cache, fused layers"),
    ("int8 lru 100 blocks", "int8, LRU, 100 blocks"),
    ("noise floor", "noise floor"), ("static, fused, graph", "static, fused, graph"),
    ("random 10% (control)", "random, 10 % (control)"),
])  # fmt: skip
def test_variants_are_told_in_words(variant, said):
    assert words(variant) == said


def test_speed_beside_other_work_is_no_objective():
    found = rows("bf16", 0, 100, 1, baseline=True)
    for name, *values in (("small", 0.2, 10, 1), ("fast", 0.3, 10, 9)):
        found += [dict(row, params={"search": "x"}) for row in rows(name, *values)]
    quiet, busy = (Run("run", found, {"host": {"load_average": load, "cores": 2}})
                   for load in (0.4, 7.0))  # fmt: skip
    assert [e.variant for e in best(entries([quiet]))] == ["small", "fast"]
    assert [e.variant for e in best(entries([busy]))] == ["small"]
    assert "counts for nothing" in frontier_figures(entries([busy]))[0][2]
    assert "speeds were measured beside other work" in Page("", "", [busy], [], []).banners[0]
    assert Page("", "", [quiet], [], []).banners == []


def test_a_bare_window_has_a_name():
    found = rows("full", 0, 100, 1, baseline=True)
    for recent in (256, 1024):
        found += rows(f"window.recent={recent}", 0.3, recent / 50, 1)
    assert list(methods(entries([Run("run", found)]))) == ["window"]
    assert words("window.sinks=1 cache.block_size=1") == "1 sink, blocks of 1"
