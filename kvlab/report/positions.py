"""Loss by position in the text: where it arises. Four variants share axes, more get panels."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.report import canvas
from kvlab.report.names import words
from kvlab.report.source import Run

TOGETHER, COLUMNS, PANELS = 4, 3, 15  # lines of one pair of axes; panels of a line, in all
FLOOR = "noise floor"  # drawn grey in every panel
CAPTION = "Where in the text the loss arises, paired with the full cache; bands: 95 % intervals."


def position_figure(run: Run, *, several: bool) -> tuple[str, str, str, Callable[[], Figure]]:
    """(file name, title, caption, how to draw); `several`: other runs have such a figure, too."""
    stem = "per_position" + (f"-{canvas.file_name(run.name)}" if several else "")
    title = f"Loss by position{f', {run.label}' if several else ''}"
    shown = [str(v) for v in run.curves["variants"]]
    if len(shown) <= TOGETHER:
        return stem, title, CAPTION, lambda: _together(run.curves)
    kept = sorted((v for v in shown if v != FLOOR), key=lambda v: v.endswith("(control)"))[:PANELS]
    told = CAPTION + " Grey: the noise floor." * (FLOOR in shown)
    left = len(shown) - len(kept) - (FLOOR in shown)
    told += f" {left} more are in the file of curves." * bool(left)
    return stem, title, told, lambda: _apart(run.curves, kept)


def _together(curves: dict[str, np.ndarray]) -> Figure:
    made, (axes,) = canvas.figure(width=8.6)
    ends = []
    for index, variant in enumerate(map(str, curves["variants"])):
        end = _draw(axes, curves, variant, canvas.look(index) | {"markersize": 4})
        ends += [end] if end else []
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("loss minus full cache's, nats per token ↓")
    _rescale(axes, curves)
    canvas.thousands(axes, "x")
    canvas.name_ends(axes, ends)
    return made


def _apart(curves: dict[str, np.ndarray], kept: list[str]) -> Figure:
    lines = ceil(len(kept) / COLUMNS)
    made = Figure(figsize=(9.6, 0.6 + 1.9 * lines), layout="constrained")
    grid = made.subplots(lines, COLUMNS, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(kept) :]:
        axes.set_visible(False)
    for index, (axes, variant) in enumerate(zip(grid.flat, kept)):
        if FLOOR in curves["variants"]:
            _draw(axes, curves, FLOOR, {"color": canvas.GREY, "linewidth": 1})
        _draw(axes, curves, variant, {"color": canvas.COLOURS[0], "marker": "o", "markersize": 3})
        axes.set_title(canvas.folded(words(variant), 40), fontsize=8)
        if index == 0:
            _rescale(axes, curves)
        if index + COLUMNS >= len(kept):
            axes.tick_params(labelbottom=True)
            canvas.thousands(axes, "x")
    made.supxlabel("position in the document, tokens", fontsize=10)
    label = grid[0, 0].get_ylabel()  # what a symmetric scale says of itself
    grid[0, 0].set_ylabel("")
    made.supylabel(f"loss minus full cache's, nats per token ↓{label}", fontsize=10)
    return made


def _draw(axes: Axes, curves: dict[str, np.ndarray], variant: str, look: dict):
    """One line with its band; where its name belongs, None where it has no point."""
    index = [str(v) for v in curves["variants"]].index(variant)
    x, y = curves["position"], curves["nll_delta"][index]
    axes.axhline(0, color=canvas.GREY, linewidth=0.8)
    axes.plot(x, y, **look)
    band = {"color": look["color"], "alpha": 0.15, "lw": 0}
    axes.fill_between(x, curves["low"][index], curves["high"][index], **band)
    known = np.flatnonzero(np.isfinite(y))
    return (x[known[-1]], y[known[-1]], words(variant), look["color"]) if known.size else None


def _rescale(axes: Axes, curves: dict[str, np.ndarray]) -> None:
    largest = np.nanmax(np.abs(curves["nll_delta"]), axis=1)
    noise = curves["high"] - curves["low"]
    noise = float(np.median(noise[noise > 0])) / 2 if (noise > 0).any() else 0.0
    canvas.rescale(axes, "y", [*largest[largest > 0], 0.0], noise=noise)
