"""Figures of replayed traces: hit rates over capacity, formats against policies, the chooser.

They take measurement rows as `measurements.jsonl` and `results.jsonl` hold them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvlab import axes as table
from kvlab.core import BadInput
from kvlab.report import canvas
from kvlab.report.names import words

HIT = "block_hit_percent"
BOUND = {"color": "#000000", "linestyle": "--", "marker": "", "linewidth": 1.6}
NAMES = {"belady": "best possible (Belady)", "lru": "LRU", "adaptive": "adaptive"}
LOUD = {"lru": canvas.COLOURS[1], "adaptive": canvas.COLOURS[0]}  # the others thin
QUIET = tuple(c for c in canvas.COLOURS if c not in (*LOUD.values(), "#000000"))
DEEPEST = 12  # points behind the best fixed policy that are drawn
ORDER = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "k4v2", "k3v2", "int3", "int2")


class Picture(NamedTuple):
    """A figure still to be drawn: file name, title, what it shows, how to draw it."""

    stem: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def pictures(rows: list[dict]) -> list[Picture]:
    """The figures that these rows allow, the one that says most first; none for other runs."""
    found = _of_budgets(rows)
    if any(row["name"] == "regret_points" for row in rows):
        caption = (
            "Points of block hit rate between a policy and the best fixed policy at that capacity "
            "(0). The dotted line is the promise: never more than 2 points behind. What falls more "
            f"than {DEEPEST} points behind leaves the figure."
        )
        title = "The adaptive policy against the best fixed one"
        found.append(Picture("chooser", title, caption, lambda: chooser(rows)))
    if _by_capacity(rows):
        caption = (
            "Prefix-correct block hits over the capacity; the dashed line is the most that any "
            "policy could reach with the running request pinned."
        )
        title = "Hit rate over capacity"
        found.append(Picture("hit_rates", title, caption, lambda: over_capacity(rows)))
    if _several_sizes(rows):
        caption = (
            "Prefix-correct token hits of LRU over the capacity in tokens, for the trace's own "
            "blocks and for coarser ones; dashed, the policy with the most block hits."
        )
        title = "Hit rate over capacity, by block size"
        found.append(Picture("block_sizes", title, caption, lambda: over_tokens(rows)))
    return found


def _of_budgets(rows: list[dict]) -> list[Picture]:
    budgets = sorted({r["params"]["budget_gib"] for r in hits(rows) if "budget_gib" in r["params"]})
    if not budgets:
        return []
    middle = budgets[len(budgets) // 2]
    bars = (
        "Block hits at one budget of bytes: what each format makes of it under LRU and under the "
        "adaptive policy, and the most that any policy could (dashed)."
    )
    lines = "Block hits over the budget in bytes; colour is the format, solid LRU, dashed adaptive."
    title = f"A smaller format or a better policy? {middle:g} GiB"
    return [
        Picture("format_or_policy", title, bars, lambda: trade(rows, middle)),
        Picture("budgets", "Hits over the budget", lines, lambda: over_budget(rows)),
    ]


def hits(rows: list[dict], name: str = HIT) -> list[dict]:
    return [row for row in rows if row["name"] == name]


def _by_capacity(rows: list[dict], name: str = HIT) -> list[dict]:
    """Hit rates at capacities that were asked for as such."""
    return [
        row
        for row in hits(rows, name)
        if "capacity_blocks" in row["params"] and "budget_gib" not in row["params"]
    ]


def traces(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["params"]["trace"] for row in rows if "trace" in row["params"]))


def _panels(
    rows: list[dict], label: str = "block hits, % of accesses ↑"
) -> tuple[Figure, list[tuple[str, Axes]]]:
    named = traces(rows)
    made, panels = canvas.figure(len(named), width=8.8, height=3.9 * len(named), stacked=True)
    for name, axes in zip(named, panels):
        axes.set_title(name, loc="left")
        axes.set_ylabel(label)
    return made, list(zip(named, panels))


def _line(rows: list[dict], x: str) -> tuple[list[float], list[float]]:
    points = sorted((row["params"][x], row["value"]) for row in rows)
    return [p[0] for p in points], [p[1] for p in points]


def _log(axes: Axes, label: str, ticks: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45)


def _size(row: dict) -> int:
    return row["params"].get("trace_block_size", 0)


def _several_sizes(rows: list[dict]) -> bool:
    return len({(row["params"]["trace"], _size(row)) for row in _by_capacity(rows)}) > len(
        traces(_by_capacity(rows))
    )


def over_capacity(rows: list[dict]) -> Figure:
    """One panel per trace, one line per policy, in the trace's own blocks."""
    shown = _by_capacity(rows)
    made, panels = _panels(shown)
    for trace, axes in panels:
        mine = [row for row in shown if row["params"]["trace"] == trace]
        own = min(map(_size, mine))
        _policy_lines(axes, [row for row in mine if _size(row) == own])
        canvas.name_lines(axes)
    return made


@cache
def is_bound(policy: str) -> bool:
    """Whether rows of this name tell the most that any policy could hit; not, where nothing is
    known by it any more."""
    try:
        return getattr(table.find("policy", policy), "bounds", False)
    except BadInput:
        return False


def _look(policy: str, index: int) -> dict:
    """LRU and the adaptive policy in colour, the others told apart by marker and grey."""
    if is_bound(policy):
        return BOUND
    if policy in LOUD:
        return {
            "color": LOUD[policy],
            "linewidth": 2.6,
            "marker": "o",
            "markersize": 5,
            "zorder": 3,
        }
    marker = canvas.MARKERS[1 + index % (len(canvas.MARKERS) - 1)]
    return {
        "color": QUIET[index % len(QUIET)], "linewidth": 0.9, "marker": marker, "markersize": 4,
    }  # fmt: skip


def _policy_lines(axes: Axes, rows: list[dict]) -> None:
    policies = list(dict.fromkeys(row["variant"] for row in rows))
    for index, policy in enumerate(policies):
        x, y = _line([row for row in rows if row["variant"] == policy], "capacity_blocks")
        axes.plot(x, y, label=NAMES.get(policy, words(policy)), **_look(policy, index))
    axes.set_ylim(bottom=0)
    size = rows[0]["params"].get("trace_block_size", 0)
    few = (
        x if len(x) <= 10 else [v for v in (300, 1000, 3000, 10_000, 30_000, 100_000) if v <= x[-1]]
    )
    _log(axes, f"capacity, blocks of {size} tokens", few)


def over_tokens(rows: list[dict]) -> Figure:
    """LRU and the bound for each block size, token hits over the capacity in tokens."""
    shown = _by_capacity(rows, "token_hit_percent")
    made, panels = _panels(shown, "token hits, % of prompt tokens ↑")
    for trace, axes in panels:
        mine = [row for row in shown if row["params"]["trace"] == trace]
        for index, size in enumerate(sorted(set(map(_size, mine)))):
            own = dict.fromkeys(r["variant"] for r in mine if _size(r) == size)
            for policy in (name for name in own if name == "lru" or is_bound(name)):
                line = [r for r in mine if r["variant"] == policy and _size(r) == size]
                style = "--" if is_bound(policy) else "-"
                x, y = _line(line, "capacity_tokens")
                look = {"linestyle": style, "color": canvas.COLOURS[index]}
                label = f"{NAMES[policy]}, blocks of {size:,}"
                axes.plot([v / 1e6 for v in x], y, label=label, **look)
        axes.set_ylim(bottom=0)
        _log(axes, "capacity, million tokens", [0.2, 0.5, 1, 2, 5, 10, 20, 50])
        canvas.name_lines(axes)
    return made


def trade(rows: list[dict], budget: float) -> Figure:
    """Bars by format, LRU beside adaptive, and the bound as a line over both."""
    shown = [row for row in hits(rows) if row["params"].get("budget_gib") == budget]
    made, panels = _panels(shown)
    for trace, axes in panels:
        mine = [row for row in shown if row["params"]["trace"] == trace]
        value = {(r["params"]["format"], r["params"]["policy"]): r["value"] for r in mine}
        formats = [name for name in ORDER if any(f == name for f, _ in value)]
        policies = [p for p in dict.fromkeys(p for _, p in value) if not is_bound(p)]
        _bars(axes, value, formats, policies)
        blocks = {r["params"]["format"]: r["params"]["capacity_blocks"] for r in mine}
        axes.set_xticks(range(len(formats)), [f"{f}\n{blocks[f]:,} blocks" for f in formats])
        axes.grid(visible=False, axis="x")
    canvas.legend(made, panels[0][1], above=True)
    return made


def _bars(axes: Axes, value: dict, formats: list[str], policies: list[str]) -> None:
    width = 0.8 / len(policies)
    for index, policy in enumerate(policies):
        there = [at for at, format in enumerate(formats) if (format, policy) in value]
        x = [at + (index - (len(policies) - 1) / 2) * width for at in there]
        y = [value[formats[at], policy] for at in there]
        colour = LOUD.get(policy, canvas.COLOURS[2 + index])
        drawn = axes.bar(x, y, width, color=colour, label=NAMES.get(policy, words(policy)))
        axes.bar_label(drawn, fmt="%.1f", fontsize=9, padding=1)
    for (format, policy), height in value.items():
        if is_bound(policy):
            at = formats.index(format)
            label = NAMES.get(policy, words(policy)) if at == 0 else None
            axes.hlines(height, at - 0.42, at + 0.42, color="#000000", linestyle="--", label=label)


def over_budget(rows: list[dict]) -> Figure:
    shown = [row for row in hits(rows) if "budget_gib" in row["params"]]
    made, panels = _panels(shown)
    for trace, axes in panels:
        mine = [row for row in shown if row["params"]["trace"] == trace]
        formats = [name for name in ORDER if any(r["params"]["format"] == name for r in mine)]
        for index, format in enumerate(formats):
            for policy, style in (("lru", "-"), ("adaptive", "--")):
                line = [r for r in mine if r["params"]["format"] == format]
                x, y = _line([r for r in line if r["params"]["policy"] == policy], "budget_gib")
                look = {**canvas.look(index), "linestyle": style, "markersize": 4}
                if x:
                    axes.plot(x, y, label=f"{format} {NAMES.get(policy, words(policy))}", **look)
        axes.set_ylim(bottom=0)
        _log(axes, "budget, GiB", sorted({r["params"]["budget_gib"] for r in mine}))
        canvas.name_lines(axes)
    return made


def chooser(rows: list[dict]) -> Figure:
    """Each policy's distance from the best fixed one, over capacity."""
    judged = {row["variant"] for row in rows if row["name"] == "regret_points"}
    shown = [row for row in _by_capacity(rows) if not is_bound(row["variant"])]
    made, panels = _panels(shown, "points behind the best fixed policy")
    for trace, axes in panels:
        mine = [row for row in shown if row["params"]["trace"] == trace]
        best: dict[int, float] = {}
        for row in mine:
            if row["variant"] not in judged:
                at = row["params"]["capacity_blocks"]
                best[at] = max(best.get(at, 0.0), row["value"])
        for index, policy in enumerate(dict.fromkeys(row["variant"] for row in mine)):
            x, y = _line([row for row in mine if row["variant"] == policy], "capacity_blocks")
            below = [value - best[at] for at, value in zip(x, y)]
            axes.plot(x, below, label=NAMES.get(policy, words(policy)), **_look(policy, index))
        axes.axhline(-2, color=canvas.GREY, linestyle=":", label="_promise")
        ahead = max((y for line in axes.get_lines() for y in line.get_ydata()), default=0)
        axes.set_ylim(-DEEPEST, max(1, 1.1 * ahead))
        _log(axes, "capacity, blocks", sorted(best))
        canvas.name_lines(axes)
    return made
