"""Loss against bytes where one method was measured under several budgets: a line for each method.

A method is what stays of a variant's name without its budget: `lru 10%` and `lru 25%` are points of
one line, and so are windows that differ in their recent part and choices that read more or fewer
tokens. What was measured at one budget only (a format, a summary) is a point. Negative controls are
dashed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvlab.report import canvas
from kvlab.report.entries import Entry
from kvlab.report.names import arrow, metric, number, words

HELD = "cache_logical_bytes"
LOSSES = ("kl_mean_nats", "perplexity_delta_percent", "needle_recall_percent")
CONTROLS = 3  # of one figure
NEAR = 1.05  # shares of bytes that differ by less are one
_BUDGET = re.compile(
    r"(\d+(\.\d+)?%|cache\.budget_\w+=\S+|window\.recent=\S+|retrieval\.budget_tokens=\S+|"
    r"summary\.ratio=\S+)"
)


def method(entry: Entry) -> str:
    """A variant's name without what sets its bytes; of a bare `window.recent=256` its axis."""
    told = " ".join(word for word in entry.variant.split() if not _BUDGET.fullmatch(word))
    return told or entry.variant.partition(".")[0]


def methods(everything: list[Entry]) -> dict[str, list[Entry]]:
    """Method -> its entries by bytes; none where no method has two budgets."""
    found: dict[str, list[Entry]] = {}
    for entry in everything:
        floor = entry.control.startswith("full against itself")  # the noise floor, no method
        if entry.value(HELD) and any(name in entry.rows for name in LOSSES) and not floor:
            found.setdefault(method(entry), []).append(entry)
    if not any(_several(es) for es in found.values()):
        return {}
    return {name: sorted(es, key=lambda e: e.value(HELD)) for name, es in found.items()
            if not all(e.is_baseline for e in es)}  # fmt: skip


def _several(entries: list[Entry]) -> bool:
    """A method in earnest with several budgets that are several sizes."""
    sizes = [share(e) for e in entries]
    return not entries[0].control and max(sizes) > NEAR * min(sizes)


def budget_figures(everything: list[Entry]) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    """(file name, title, caption, how to draw); nothing where no budget was varied. Runs that
    varied budgets themselves, as of two models, have a figure each: a line through both would mean
    nothing."""
    subjects = _subjects(everything)
    parts = [part for part in subjects if methods(part)]
    if len(subjects) < 2 or not parts:
        return _budget_figure(everything, "", "")
    return [drawing for part in parts for drawing in _budget_figure(
        part, f"-{canvas.file_name(part[0].run.name)}", f", {part[0].run.label}")]


def _subjects(everything: list[Entry]) -> list[list[Entry]]:
    """Entries by what they were measured on: a model at one length. Runs that do not say it are a
    subject each; runs of one model, as of its loss and of its recall, are one."""
    found: dict[str, list[Entry]] = {}
    for e in everything:
        told = {key: {str(r["params"][key]) for r in e.run.rows if r["params"].get(key)}
                for key in ("model", "tokens")}  # fmt: skip
        known = e.run.name if not told["model"] else repr([sorted(v) for v in told.values()])
        found.setdefault(known, []).append(e)
    return list(found.values())


def of_one_budget(everything: list[Entry]) -> list[list[Entry]]:
    """Entries of the models that have no figure of budgets beside others that have one: in earnest
    and by loss."""
    subjects = _subjects(everything)
    if len(subjects) < 2 or not any(map(methods, subjects)):
        return []
    left = [[e for e in part if e.rows and not e.is_baseline] for part in subjects
            if not methods(part)]  # fmt: skip
    return [sorted(part, key=lambda e: e.value(LOSSES[0]) or 0.0) for part in left if part]


def _budget_figure(
    everything: list[Entry], ending: str, whose: str
) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    lines = methods(everything)
    if not lines:
        return []
    drawn, left = _chosen(lines)
    told = [n for n in LOSSES if any(n in e.rows for es in lines.values() for e in es)]

    def draw() -> Figure:
        height = max(3.6, 0.24 * len(drawn) + 1)
        made, panels = canvas.figure(len(told), width=8.8, height=height * len(told), stacked=True)
        for axes, name in zip(panels, told):
            there = {m: [e for e in es if name in e.rows] for m, es in drawn.items()}
            values = [(e, e.value(name)) for es in there.values() for e in es]
            drawn_at = canvas.loss_places(v for _, v in values)
            lifted = dict(zip((id(e) for e, _ in values), drawn_at))
            ends = [_line(axes, label, es, name, index, lifted)
                    for index, (label, es) in enumerate(there.items()) if es]  # fmt: skip
            _finish(axes, name, lines)
            canvas.name_ends(axes, ends)
        return made

    caption = (
        "Each method at several budgets, bytes of the blocks in use in percent of the full "
        "cache's; negative controls are dashed and grey, bars are 95 % intervals. What loses less "
        "than a thousandth of the largest loss lies at the bottom."
    ) + f" {left} more methods and controls are in the tables." * bool(left)
    return [(f"loss_by_budget{ending}", f"Loss by budget{whose}", caption, draw)]


def _chosen(lines: dict[str, list[Entry]]) -> tuple[dict[str, list[Entry]], int]:
    """Methods that get a colour each, then a few controls, and how many are left out: those of the
    most budgets are kept."""
    control = {name: bool(entries[0].control) for name, entries in lines.items()}
    ranked = sorted(lines, key=lambda name: -len({e.variant for e in lines[name]}))
    kept = [n for n in ranked if not control[n]][: len(canvas.COLOURS)]
    kept += [n for n in ranked if control[n]][:CONTROLS]
    return {n: lines[n] for n in sorted(kept, key=control.get)}, len(lines) - len(kept)


def _line(
    axes: Axes, label: str, entries: list[Entry], name: str, index: int, lifted: dict[int, float]
) -> tuple[float, float, str, str]:
    """Draws one method; where its name belongs, and its colour."""
    look = canvas.look(index) | {"markersize": 5}
    look["linestyle"] = ("--" if entries[0].control else "-") if len(entries) > 1 else "none"
    if entries[0].control:
        look |= {"color": canvas.GREY, "alpha": 0.7, "markerfacecolor": "white"}
    rows = [e.rows[name] for e in entries]
    ends = [
        [max(0, r["value"] - (r["value"] if r["low"] is None else r["low"])) for r in rows],
        [max(0, (r["value"] if r["high"] is None else r["high"]) - r["value"]) for r in rows],
    ]
    x, y = [share(e) for e in entries], [lifted[id(e)] for e in entries]
    axes.errorbar(x, y, yerr=ends, capsize=2, **look)
    lower = canvas.lifted([r["value"] for r in rows], y)
    for place, height, low in zip(x, y, lower):
        if low:
            canvas.open_mark(axes, place, height, look["color"])
    told = f": {number(rows[-1]['value'])}" * lower[-1]
    return x[-1], y[-1], words(label) + told, look["color"]


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
    values = canvas.loss_places(
        e.value(name) for es in lines.values() for e in es if name in e.rows
    )
    if name != "needle_recall_percent":
        canvas.rescale(axes, "y", values)
