"""Recall by depth and length: one panel for each variant, the full cache first."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.report import canvas
from kvlab.report.entries import CELLS
from kvlab.report.names import words
from kvlab.report.source import Run

PANELS, COLUMNS, MOST = 12, 4, 48  # panels of one figure, of one line of it, in all
Cells = dict[tuple[float, float], tuple[float, int]]  # (length, depth) -> recall in %, questions


def heatmaps(runs: list[Run]) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    """(file name, title, caption, how to draw) of each figure that the cells deserve."""
    found = []
    for run in runs:
        panels = list(cells(run).items())
        ordered = sorted(panels, key=lambda panel: not panel[1][0])[:MOST]
        shown = [(name, grid) for name, (_, grid) in ordered]
        for first in range(0, len(shown), PANELS):
            stem = "recall_heatmap" + (f"-{len(found) + 1}" if found else "")
            part = shown[first : first + PANELS]
            found.append((stem, _title(run, runs), _caption(part), _drawer(part)))
    return found


def cells(run: Run) -> dict[str, tuple[bool, Cells]]:
    """Variant -> (whether it is the full cache, its cells), in the order of measuring."""
    found: dict[str, tuple[bool, Cells]] = {}
    for row in run.rows:
        params = row["params"]
        if row["name"] in CELLS and {"tokens", "depth_percent"} <= params.keys():
            _, grid = found.setdefault(row["variant"], (bool(params.get("baseline")), {}))
            grid[params["tokens"], params["depth_percent"]] = (row["value"], row["count"] or 0)
    return found


def _title(run: Run, runs: list[Run]) -> str:
    return "Recall by depth and length" + (f", {run.label}" if len(runs) > 1 else "")


def _caption(part: list[tuple[str, Cells]]) -> str:
    counts = [count for _, grid in part for _, count in grid.values()]
    low, high = min(counts), max(counts)
    told = f"{low}" if low == high else f"{low} to {high}"
    if _one_length(part):
        tokens = next(length for _, grid in part for length, _ in grid)
        return (f"Exact match in percent at {tokens:,g} tokens, by depth of the fact (0 is the "
                f"beginning of the document), with Wilson's 95 % intervals of {told} questions.")
    return (
        "Exact match in percent: context length across, depth of the fact down (0 is the beginning "
        f"of the document). Each cell rests on {told} questions."
    )


def _drawer(part: list[tuple[str, Cells]]) -> Callable[[], Figure]:
    def draw() -> Figure:
        if _one_length(part):
            return _draw_bars(part)
        lines, columns = ceil(len(part) / COLUMNS), min(COLUMNS, len(part))
        made = Figure(figsize=(1.2 + 2.6 * columns, 0.6 + 2.5 * lines), layout="constrained")
        grid = made.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(part) :]:
            axes.set_visible(False)
        for index, (axes, (name, cells)) in enumerate(zip(grid.flat, part)):
            image = _panel(axes, name, cells)
            if index % columns == 0:
                axes.set_ylabel("depth, %")
            if index + columns >= len(part):
                axes.set_xlabel("context, tokens")
        made.colorbar(image, ax=grid, label="recall, % ↑", shrink=0.8)
        return made

    return draw


def _one_length(part: list[tuple[str, Cells]]) -> bool:
    return len({length for _, grid in part for length, _ in grid}) == 1


def _draw_bars(part: list[tuple[str, Cells]]) -> Figure:
    """Recall by depth where there is one length: a heatmap would be a column of boxes."""
    lines, columns = ceil(len(part) / COLUMNS), min(COLUMNS, len(part))
    made = Figure(figsize=(1.2 + 2.6 * columns, 0.6 + 2.5 * lines), layout="constrained")
    grid = made.subplots(lines, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(part) :]:
        axes.set_visible(False)
    for index, (axes, (name, cells)) in enumerate(zip(grid.flat, part)):
        depths, found = zip(*sorted((depth, cell) for (_, depth), cell in cells.items()))
        value = np.array([v for v, _ in found])
        ends = np.array([_wilson(v, n) for v, n in found]).T
        spans = [np.maximum(value - ends[0], 0), np.maximum(ends[1] - value, 0)]
        axes.barh(range(len(depths)), value, 0.6, xerr=spans, capsize=2,
                  color=canvas.COLOURS[0], ecolor="#333333")  # fmt: skip
        axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        axes.set_ylim(len(depths) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(False, axis="y")
        axes.set_title(canvas.folded(words(name), 32), fontsize=9)
        if index % columns == 0:
            axes.set_ylabel("depth, %")
        if index + columns >= len(part):
            axes.set_xlabel("recall, % ↑")
    return made


def _wilson(percent: float, count: int) -> tuple[float, float]:
    """95 % interval of a share in percent; the share itself where nothing was counted."""
    if not count:
        return percent, percent
    share, z2 = percent / 100, 1.96**2 / count
    middle, half = share + z2 / 2, (z2 * (share * (1 - share) + z2 / 4)) ** 0.5
    return 100 * (middle - half) / (1 + z2), 100 * (middle + half) / (1 + z2)


def _panel(axes: Axes, name: str, cells: Cells):
    lengths, depths = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), (value, _) in cells.items():
        values[depths.index(depth), lengths.index(length)] = value
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value < 60 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), [_tokens(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    axes.set_title(canvas.folded(words(name), 32), fontsize=9)
    axes.grid(False)
    return image


def _tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 and count % 1024 == 0 else f"{count:g}"
