"""Scores by task: one line a variant, one column a task, the mean over all of them."""

from __future__ import annotations

from kvlab.report.entries import entries
from kvlab.report.scores import score_tables
from kvlab.report.source import Run


def row(variant, task, value, gap=(0, -1, 1), **params):
    about = {"task": task, "tokens": 4096, "query_aware": False, "model": "m"} | params
    names = {"task_score_percent": (value, value - 5, value + 5), "task_score_delta_points": gap}
    return [{"variant": variant, "params": about, "name": name, "value": v, "unit": "%",
             "better": "higher", "low": low, "high": high, "count": 20}
            for name, (v, low, high) in names.items()]  # fmt: skip


def test_tasks_become_columns_and_their_mean_the_last(tmp_path):
    rows = [*row("full", "vt", 80), *row("full", "cwe", 40),
            *row("lru 50%", "vt", 20, (-60, -70, -50)), *row("lru 50%", "cwe", 38, (-2, -9, 5)),
            *row("fifo 50%", "vt", 10),
            *row("full", "vt", 70, query_aware=True), *row("full", "cwe", 30, query_aware=True)]
    outside, inside = score_tables(entries([Run("r", rows)]))
    assert outside.title == "Scores by task, %, m, tokens 4096, question outside"
    assert outside.headings == ["variant", "vt", "cwe", "mean of 2 ↑"]
    assert outside.cells == [["full", "80.00", "40.00", "60.00"],
                             ["lru 50%", "20.00 (-60)", "38.00", "29.00"],
                             ["fifo 50%", "10.00", "", ""]]  # fmt: skip
    assert inside.title.endswith("question inside") and inside.cells[0][1] == "70.00"


def test_one_task_needs_no_such_table():
    assert score_tables(entries([Run("r", row("full", "vt", 80))])) == []
