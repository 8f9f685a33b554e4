"""What is drawn into one pair of axes: series of points, bars, dots, each with its intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from kvlab.report import canvas
from kvlab.report.entries import Entry
from kvlab.report.names import Metric, arrow, metric, number, words
from kvlab.report.tables import described, scaling


def series(
    axes: Axes,
    points: list[Entry],
    name: str,
    x_of: Callable[[Entry], float],
    everything: list[Entry],
    over: tuple[str, ...] = (),
) -> None:
    """One series for each variant (and run, and setting), with intervals and its name at its end;
    joined where it has several points.

    everything: all entries of the figure; a variant looks the same in each of its panels.
    over: the setting that lies along the axis, and those that panels tell apart; other numbers make
    series of their own.
    """
    about = _label_axis(axes, "y", name, points)
    divisor, _ = scaling(about, [e.value(name) for e in points])
    groups: dict[str, list[Entry]] = {}
    for entry in points:
        groups.setdefault(_series_name(entry, everything, over), []).append(entry)
    order = list(dict.fromkeys(_series_name(entry, everything, over) for entry in everything))
    lifted = dict(zip(map(id, points), canvas.floored(e.value(name) / divisor for e in points)))
    ends = []
    for label, members in groups.items():
        members = sorted(members, key=x_of)
        look = canvas.look(order.index(label))
        look["linestyle"] = look["linestyle"] if len(members) > 1 else "none"
        x, y = [x_of(e) for e in members], [lifted[id(e)] for e in members]
        bars = _error_bars([e.rows[name] for e in members], divisor)
        axes.errorbar(x, y, yerr=bars, capsize=3, markersize=6, **look)
        ends.append((x[-1], y[-1], label, look["color"]))
    canvas.rescale(axes, "x", [x_of(e) for e in points])
    spread = _noise([e.rows[name] for e in points]) / divisor
    canvas.rescale(axes, "y", list(lifted.values()), noise=spread)
    if "log" not in axes.get_xscale():
        axes.set_xlim(left=0)
    canvas.thousands(axes, "x")
    canvas.thousands(axes, "y")
    canvas.name_ends(axes, ends)


def _series_name(entry: Entry, points: list[Entry], over: tuple[str, ...]) -> str:
    """Variant in words, run where there are several, and settings: those that are words and, where
    the axis is one setting, the other numbers."""
    several = len({e.run.name for e in points}) > 1
    parts = [entry.run.label] * several
    for key, value in entry.conditions.items():
        if key in over or (is_number(value) and not over):
            continue
        if len({repr(e.conditions.get(key)) for e in points if e.run is entry.run}) == 1:
            continue  # the run says it already
        parts.append(f"{key.replace('_', ' ')} {value}" if is_number(value) else str(value))
    return ", ".join([words(entry.variant), *parts])


def bars_or_dots(axes: Axes, shown: list[Entry], name: str) -> None:
    """Bars where their lengths can be compared; dots for values close together or far apart."""
    values = [e.value(name) for e in shown]
    if min(values) >= 0 and 2 * min(values) < max(values) <= canvas.WIDE * max(min(values), 1e-300):
        about = described(name, [e.rows[name] for e in shown])
        unit = ", {unit}" if about.unit else ""
        bars(axes, shown, [name], f"{about.heading}{unit}{arrow(about.better)}")
        return
    _dots(axes, shown, name)


def _dots(axes: Axes, shown: list[Entry], name: str) -> None:
    rows = [entry.rows[name] for entry in shown]
    about = _label_axis(axes, "x", name, shown)
    divisor, _ = scaling(about, [row["value"] for row in rows])
    x = np.array([row["value"] for row in rows]) / divisor
    ends = _error_bars(rows, divisor)
    axes.errorbar(x, range(len(shown)), xerr=ends, fmt="o", color=canvas.COLOURS[0], capsize=3)
    canvas.thousands(axes, "x")
    canvas.rescale(axes, "x", x, noise=_noise(rows) / divisor)
    _name_rows(axes, shown)


def bars(
    axes: Axes, shown: list[Entry], held: list[str], heading: str, *, colour: str | None = None
) -> None:
    """Horizontal bars, one group for each entry, one bar for each name, with their values."""
    values = [e.value(name) for e in shown for name in held if _finite(e, name)]
    divisor, unit = scaling(described(held[0], [e.rows.get(held[0]) for e in shown]), values)
    thick = min(0.8 / len(held), 0.55)
    for row, name in enumerate(held):
        at = [(i, e.rows[name]) for i, e in enumerate(shown) if _finite(e, name)]
        y = np.array([i for i, _ in at]) + (row - (len(held) - 1) / 2) * thick
        x = np.array([r["value"] for _, r in at]) / divisor
        ends = _error_bars([r for _, r in at], divisor)
        look = {"color": colour or canvas.COLOURS[row], "label": metric(name).heading}
        drawn = axes.barh(y, x, thick * 0.92, xerr=ends, capsize=2, ecolor="#333333", **look)
        axes.bar_label(drawn, [number(v) for v in x], padding=4, fontsize=8)
    _name_rows(axes, shown)
    axes.grid(False, axis="y")
    axes.margins(x=0.18)
    canvas.thousands(axes, "x")
    axes.set_xlabel(heading.format(unit=unit))


def _finite(entry: Entry, name: str) -> bool:
    return name in entry.rows and bool(np.isfinite(entry.value(name)))


def _name_rows(axes: Axes, shown: list[Entry]) -> None:
    """Entries down the vertical axis, in words. The first on top."""
    axes.set_yticks(range(len(shown)), [canvas.folded(text, 34) for text in row_names(shown)])
    axes.set_ylim(len(shown) - 0.4, -0.6)


def row_names(shown: list[Entry]) -> list[str]:
    """What tells each entry from the others: variant in words, run, settings that differ."""
    several = len({e.run.name for e in shown}) > 1
    keys = dict.fromkeys(k for e in shown for k in e.conditions if k != "control")  # named already
    runs = {e.run.name for e in shown}
    keys = [k for k in keys if any(_varies(k, [e for e in shown if e.run.name == r]) for r in runs)]
    found = []
    for e in shown:
        parts = [e.run.label] * several
        parts += [f"{k.replace('_', ' ')} {e.conditions[k]}" for k in keys if k in e.conditions]
        found.append(", ".join([words(e.variant), *parts]))
    return found


def _varies(key: str, found: list[Entry]) -> bool:
    return len({repr(e.conditions.get(key)) for e in found}) > 1


def _label_axis(axes: Axes, which: str, name: str, shown: list[Entry]) -> Metric:
    about = described(name, [e.rows[name] for e in shown])
    _, unit = scaling(about, [e.value(name) for e in shown])
    text = f"{about.heading}{f', {unit}' if unit else ''}{arrow(about.better)}"
    getattr(axes, f"set_{which}label")(text)
    return about


def _error_bars(rows: list[dict], divisor: float) -> np.ndarray | None:
    """Distances to low and high, [2, rows]; zero where a row has no interval."""
    if all(row["low"] is None or row["high"] is None for row in rows):
        return None
    ends = [
        [max(r["value"] - r["low"], 0), max(r["high"] - r["value"], 0)]
        if r["low"] is not None and r["high"] is not None
        else [0, 0]
        for r in rows
    ]
    return np.nan_to_num(np.array(ends).T / divisor, nan=0, posinf=0, neginf=0)


def _noise(rows: list[dict]) -> float:
    """Half the width of the median interval; 0 where there are none."""
    ends = [r["high"] - r["low"] for r in rows if None not in (r["low"], r["high"])]
    ends = [width for width in ends if np.isfinite(width) and width > 0]
    return float(np.median(ends)) / 2 if ends else 0.0


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
