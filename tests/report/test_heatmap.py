"""Heatmaps: one panel a variant, the full cache first, and no cell in a table."""

from __future__ import annotations

from kvlab.report.entries import entries
from kvlab.report.heatmap import PANELS, _wilson, cells, heatmaps
from kvlab.report.source import Run


def row(variant, tokens, depth, value, **params):
    about = {"tokens": tokens, "depth_percent": depth, **params}
    return {"variant": variant, "params": about, "name": "needle_recall_at_percent",
            "value": value, "unit": "%", "better": "higher", "low": None, "high": None,
            "count": 6}  # fmt: skip


def rows(variants):
    return [
        row(name, tokens, depth, 50.0, **({"baseline": True} if name == "full" else {}))
        for name in variants for tokens in (1024, 3000) for depth in (0, 50, 100)
    ]


def test_the_full_cache_comes_first():
    [(stem, _, caption, draw)] = heatmaps([Run("run", rows(["int4", "full"]))])
    assert stem == "recall_heatmap" and "6 questions" in caption
    made = draw()
    assert [axes.get_title() for axes in made.axes[:2]] == ["full", "int4"]
    assert [t.get_text() for t in made.axes[0].get_xticklabels()] == ["1k", "3000"]
    assert cells(Run("run", rows(["int4"])))["int4"][1][3000, 50] == (50.0, 6)


def test_many_variants_take_several_figures():
    found = heatmaps([Run("run", rows([f"v{i}" for i in range(PANELS + 1)]))])
    assert [picture[0] for picture in found] == ["recall_heatmap", "recall_heatmap-2"]
    for *_, draw in found:
        draw()


def test_cells_make_no_entries():
    total = row("int4", 1024, 0, 90.0) | {"name": "needle_recall_percent"}
    total["params"] = {"tokens": 1024}
    [entry] = entries([Run("run", [*rows(["int4"]), total])])
    assert entry.conditions == {} and list(entry.rows) == ["needle_recall_percent"]


def test_no_cells_no_figure():
    assert heatmaps([Run("run", [])]) == []


def test_one_length_is_drawn_as_bars_with_intervals():
    found = [row("int4", 1024, depth, value) for depth, value in ((0, 50.0), (50, 100.0))]
    [(_, _, caption, draw)] = heatmaps([Run("run", found)])
    assert "at 1,024 tokens" in caption and "Wilson" in caption
    [axes] = draw().axes
    assert [bar.get_width() for bar in axes.patches] == [50.0, 100.0]
    [low, high] = _wilson(50.0, 6)
    assert 18.7 < low < 18.9 and 81.1 < high < 81.3  # of 3 in 6
