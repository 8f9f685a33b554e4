"""The short table of axes_quality names the controls that lie outside the interval."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kvlab.report.entries import Entry

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "axes_quality" / "table.py"
spec = importlib.util.spec_from_file_location("axes_table", SCRIPT)
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


def row(value, low, high):
    return {"value": value, "low": low, "high": high, "params": {}}


def entry(name, **rows):
    return Entry(None, name, {}, {"cache_logical_bytes": row(50, None, None), **rows})


def test_a_line_says_what_is_beaten_and_what_is_not():
    full = entry("full")
    full.rows["cache_logical_bytes"] = row(100, None, None)
    mine = entry(
        "snapkv 50% retrieval.recent=32", kl_minus_random_nats=row(-2, -3, -1),
        kl_minus_window_nats=row(0, -1, 1), kl_minus_shuffled_nats=row(2, 1, 3),
        needle_recall_minus_random_points=row(20, 3, 40), kl_mean_nats=row(0.5, 0.4, 0.6),
    )  # fmt: skip
    mine.baseline = full
    cells = [cell.strip() for cell in table.line(mine).split("|")[1:-1]]
    assert cells == ["snapkv 50%", "1/2.0", "", "0.5000 [0.4000, 0.6000]", "", "",
                     "KL: random; recall: random", "KL: shuffled"]  # fmt: skip
