"""What the figures of the front page share: series of rows with their intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.report import canvas

Line = dict[str, list[tuple[float, dict]]]  # name -> (x, row), by x
RUNS = {"smollm2-135m": "SmolLM2-135M", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}


class Overview(NamedTuple):
    """A figure still to be drawn; `digest` changes with the data that it shows."""

    stem: str
    title: str
    caption: str
    draw: Callable[[], Figure]
    digest: str


def picture(
    stem: str, title: str, caption: str, lines: dict, draw: Callable[[], Figure]
) -> Overview | None:
    """None where the reports hold nothing of it."""
    if not any(lines.values()):
        return None
    digest = sha256(json.dumps(lines, sort_keys=True, default=repr).encode()).hexdigest()[:16]
    return Overview(stem, title, caption, draw, digest)


def tick(axes: Axes, at: list[float]) -> None:
    """Tick a logarithmic axis in full numbers and nowhere else."""
    axes.set_xticks(at, [f"{x:,}" for x in at])
    axes.set_xticks([], minor=True)


def series(
    axes: Axes, points: Iterable[tuple[float, dict]], index: int
) -> tuple[float, float]:
    """One series with its intervals; its last point."""
    x, rows = zip(*points)
    y = [row["value"] for row in rows]
    axes.errorbar(x, y, yerr=bars(rows), capsize=2, markersize=5, **canvas.look(index))
    return x[-1], y[-1]


def across(
    axes: Axes, points: Iterable[tuple[float, dict]], index: int, name: str | None = None
) -> None:
    """Values along the horizontal axis, with their intervals, at the heights given."""
    y, rows = zip(*points)
    style = canvas.look(index) | {"linestyle": "none", "label": name}
    axes.errorbar([r["value"] for r in rows], y, xerr=bars(rows), capsize=2, markersize=5, **style)


def bars(rows: Iterable[dict]) -> list[list[float]] | None:
    """Distances to low and high, [2, rows]; None where no row has an interval."""
    if all(row["low"] is None for row in rows):
        return None
    ends = [(r["value"], r["value"]) if r["low"] is None else (r["low"], r["high"]) for r in rows]
    return [[max(0, r["value"] - low) for r, (low, _) in zip(rows, ends)],
            [max(0, high - r["value"]) for r, (_, high) in zip(rows, ends)]]  # fmt: skip
