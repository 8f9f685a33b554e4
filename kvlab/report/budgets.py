"""Loss against bytes where one method was measured under several budgets: a line for each method.

A method is what stays of a variant's name without its budget: `lru 10%` and `lru 25%` are points of
one line, and so are windows that differ in their recent part. Negative controls are dashed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvlab.report import canvas
from kvlab.report.entries import Entry
from kvlab.report.names import arrow, metric

HELD = "cache_logical_bytes"
LOSSES = ("kl_mean_nats", "perplexity_delta_percent", "needle_recall_percent")
_BUDGET = re.compile(r"(\d+(\.\d+)?%|cache\.budget_\w+=\S+|window\.recent=\S+)")


def method(entry: Entry) -> str:
    """A variant's name without what sets its bytes."""
    return " ".join(word for word in entry.variant.split() if not _BUDGET.fullmatch(word))


def methods(everything: list[Entry]) -> dict[str, list[Entry]]:
    """Method -> its entries by bytes, of methods with two budgets at least."""
    found: dict[str, list[Entry]] = {}
    for entry in everything:
        if entry.value(HELD) and any(name in entry.rows for name in LOSSES):
            found.setdefault(method(entry), []).append(entry)
    several = {name: es for name, es in found.items() if len({e.variant for e in es}) > 1}
    return {name: sorted(es, key=lambda e: e.value(HELD)) for name, es in several.items()}


def budget_figures(everything: list[Entry]) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    """(file name, title, caption, how to draw); nothing where no budget was varied."""
    lines = methods(everything)
    if not lines:
        return []
    told = [n for n in LOSSES if any(n in e.rows for es in lines.values() for e in es)]

    def draw() -> Figure:
        made, panels = canvas.figure(len(told), width=4.4 * len(told) + 1.0, height=4.8)
        for axes, name in zip(panels, told):
            for index, (label, entries) in enumerate(lines.items()):
                _line(axes, label, [e for e in entries if name in e.rows], name, index)
            _finish(axes, name, lines)
        canvas.legend(made, panels[0])
        return made

    caption = (
        "Each method at several budgets, bytes of the blocks in use in percent of the full "
        "cache's; negative controls are dashed, bars are 95 % intervals."
    )
    return [("loss_by_budget", "Loss by budget", caption, draw)]


def _line(axes: Axes, label: str, entries: list[Entry], name: str, index: int) -> None:
    if not entries:
        return
    look = canvas.look(index) | {"markersize": 5}
    look["linestyle"] = "--" if entries[0].control else "-"
    if entries[0].control:
        look |= {"alpha": 0.55, "markerfacecolor": "white"}
    rows = [e.rows[name] for e in entries]
    ends = [
        [max(0, r["value"] - (r["value"] if r["low"] is None else r["low"])) for r in rows],
        [max(0, (r["value"] if r["high"] is None else r["high"]) - r["value"]) for r in rows],
    ]
    x = [share(e) for e in entries]
    axes.errorbar(x, [r["value"] for r in rows], yerr=ends, label=label, capsize=2, **look)


def share(entry: Entry) -> float:
    """Bytes of the blocks in use, in percent of the full cache's (in bytes where there is none).

    Allocated bytes come in slabs of 1,024 tokens, too coarse for small budgets of short texts.
    """
    full = entry.baseline.value(HELD) if entry.baseline else None
    return 100 * entry.value(HELD) / full if full else entry.value(HELD)


def _finish(axes: Axes, name: str, lines: dict[str, list[Entry]]) -> None:
    about = metric(name)
    axes.set_ylabel(f"{about.heading}, {about.unit}{arrow(about.better)}")
    axes.set_xlabel("bytes of blocks in use, % of the full cache's")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    values = [e.value(name) for es in lines.values() for e in es if name in e.rows]
    if name != "needle_recall_percent":
        canvas.rescale(axes, "y", values)
