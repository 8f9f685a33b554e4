"""Scores by task: a line for each variant, a column for each task, and their mean.

Over RULER's thirteen tasks at one length the mean is RULER's score. A cell says the score, and how
far it is from the full cache's where the interval of that difference excludes 0.
"""

from __future__ import annotations

import json

from kvlab.report.entries import Entry
from kvlab.report.names import number
from kvlab.report.tables import Table

SCORE, GAP = "task_score_percent", "task_score_delta_points"
APART = ("model", "tokens", "answer_tokens", "query_aware")  # settings that get tables of their own


def score_tables(everything: list[Entry]) -> list[Table]:
    """None where fewer than two tasks were measured."""
    groups: dict[str, list[Entry]] = {}
    for entry in everything:
        if SCORE in entry.rows:
            groups.setdefault(json.dumps(_settings(entry)), []).append(entry)
    return [table for found in groups.values() if (table := _table(found)).headings]


def _settings(entry: Entry) -> dict:
    params = entry.rows[SCORE]["params"]
    return {"run": entry.run.name} | {k: params[k] for k in APART if k in params}


def _table(found: list[Entry]) -> Table:
    tasks = list(dict.fromkeys(_task(e) for e in found))
    if len(tasks) < 2:
        return Table("")
    about = {k: v for k, v in _settings(found[0]).items() if k not in ("run", "model")}
    query = about.pop("query_aware", None)
    told = [f"{k.replace('_', ' ')} {v}" for k, v in about.items()]
    told += [] if query is None else [f"question {'inside' if query else 'outside'}"]
    model = str(_settings(found[0]).get("model", ""))
    table = Table(", ".join(["Scores by task, %", *filter(None, [model]), *told]))
    variants = dict.fromkeys(e.variant for e in found)
    cells = {(e.variant, _task(e)): e for e in found}
    table.column("variant", list(variants), numeric=False)
    for task in tasks:
        table.column(task, [_cell(cells.get((v, task))) for v in variants])
    table.column(f"mean of {len(tasks)} ↑", [_mean([cells.get((v, t)) for t in tasks])
                                             for v in variants])  # fmt: skip
    return table


def _task(entry: Entry) -> str:
    return str(entry.rows[SCORE]["params"].get("task", ""))


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    value, gap = entry.rows[SCORE]["value"], entry.rows.get(GAP)
    sure = gap and gap["low"] is not None and (gap["low"] > 0 or gap["high"] < 0)
    return f"{number(value)} ({gap['value']:+.0f})" if sure else number(value)


def _mean(found: list[Entry | None]) -> str:
    """Of a variant that was through all tasks."""
    if any(entry is None for entry in found):
        return ""
    return number(sum(entry.rows[SCORE]["value"] for entry in found) / len(found))
