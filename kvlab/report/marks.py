"""What is drawn into one pair of axes: series of points, bars, dots, each with its intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from kvlab.report import canvas
from kvlab.report.entries import Entry
from kvlab.report.names import Metric, arrow, metric, number, words
from kvlab.report.source import Run
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
    found = [e.value(name) / divisor for e in points]
    loss = metric(name).family == "Quality"
    places = dict(zip(map(id, points), canvas.loss_places(found) if loss else found))
    lower = {id(e) for e, low in zip(points, canvas.lifted(found, places.values())) if low}
    ends = []
    for label, members in groups.items():
        members = sorted(members, key=x_of)
        look = canvas.look(order.index(label))
        look["linestyle"] = look["linestyle"] if len(members) > 1 else "none"
        x, y = [x_of(e) for e in members], [places[id(e)] for e in members]
        bars = _error_bars([e.rows[name] for e in members], divisor)
        axes.errorbar(x, y, yerr=bars, capsize=3, markersize=6, **look)
        for entry in members:
            if id(entry) in lower:
                canvas.open_mark(axes, x_of(entry), places[id(entry)], look["color"])
        told = f": {number(members[-1].value(name) / divisor)}" * (id(members[-1]) in lower)
        ends.append((x[-1], y[-1], label + told, look["color"]))
    canvas.rescale(axes, "x", [x_of(e) for e in points])
    spread = _noise([e.rows[name] for e in points]) / divisor
    canvas.rescale(axes, "y", list(places.values()), noise=spread)
    if "log" not in axes.get_xscale():
        axes.set_xlim(left=0)
    canvas.thousands(axes, "x")
    canvas.thousands(axes, "y")
    if over:
        canvas.few_ticks(axes, map(x_of, points))
    canvas.name_ends(axes, ends)


def _series_name(entry: Entry, points: list[Entry], over: tuple[str, ...]) -> str:
    """Variant in words, run where there are several, and settings: those that are words and, where
    the axis is one setting, the other numbers."""
    several = len({e.run.name for e in points}) > 1
    parts = [_whose(entry.run)] * several
    for key, value in entry.conditions.items():
        if key in over or (is_number(value) and not over):
            continue
        if len({repr(e.conditions.get(key)) for e in points if e.run is entry.run}) == 1:
            continue  # the run says it already
        parts.append(_setting(key, value))
    return ", ".join([words(entry.variant), *parts])


def _setting(key: str, value) -> str:
    """`64 requests`, `chunk 512`, `from the host`: a setting as a reader would say it."""
    said = key.replace("_", " ")
    if key == "tier":
        return f"from the {value}"
    if not is_number(value):
        return str(value)
    number = f"{value:,}"
    return f"{number} {said}" if said.endswith("s") else f"{said} {number}"


def _whose(run: Run) -> str:
    """The run in words, where a figure has several."""
    return run.label.replace("baseline=", "against ")


def bars_or_dots(axes: Axes, shown: list[Entry], name: str) -> None:
    """Bars where their lengths can be compared; dots for values close together or far apart. Of
    several runs, as of two models, one variant has one line, with a mark for each run."""
    values = [e.value(name) for e in shown]
    if min(values) >= 0 and 2 * min(values) < max(values) <= canvas.WIDE * max(min(values), 1e-300):
        about = described(name, [e.rows[name] for e in shown])
        unit = ", {unit}" if about.unit else ""
        bars(axes, shown, [name], f"{about.heading}{unit}{arrow(about.better)}")
        return
    _dots(axes, shown, name)


def _dots(axes: Axes, shown: list[Entry], name: str) -> None:
    about = _label_axis(axes, "x", name, shown)
    divisor, _ = scaling(about, [e.value(name) for e in shown])
    runs = list({id(e.run): e.run for e in shown}.values())
    lines, at = rows(shown)
    apart = 0.44 / len(runs) if len(lines) < len(shown) else 0.0
    for index, run in enumerate(runs if apart else runs[:1]):
        own = [e for e in shown if e.run is run or not apart]
        x = np.array([e.value(name) for e in own]) / divisor
        y = [at[id(e)] + (index - (len(runs) - 1) / 2) * apart for e in own]
        look = {"color": canvas.COLOURS[index], "fmt": canvas.MARKERS[index]}
        axes.errorbar(x, y, xerr=_error_bars([e.rows[name] for e in own], divisor), capsize=3,
                      label=_whose(run) if apart else None, **look)  # fmt: skip
    found = [e.value(name) / divisor for e in shown]
    canvas.thousands(axes, "x")
    canvas.rescale(axes, "x", found, noise=_noise([e.rows[name] for e in shown]) / divisor)
    _name_rows(axes, lines)
    if apart:
        canvas.legend(axes.figure, axes, above=True)


def bars(
    axes: Axes, shown: list[Entry], held: list[str], heading: str, *, colour: str | None = None,
    lines: list[str] | None = None,
) -> None:  # fmt: skip
    """Horizontal bars, one group for each entry, one bar for each name (or run, where a variant was
    measured in several), with their values. lines: those of a figure whose panels share them."""
    values = [e.value(name) for e in shown for name in held if _finite(e, name)]
    divisor, unit = scaling(described(held[0], [e.rows.get(held[0]) for e in shown]), values)
    own, at = rows(shown)
    if lines:
        at = {id(e): lines.index(own[at[id(e)]]) for e in shown}
    lines = lines or own
    runs = list({id(e.run): e.run for e in shown}.values())
    apart = len(own) < len(shown)
    series = [(name, run) for name in held for run in (runs if apart else [None])]
    thick = min(0.8 / len(series), 0.55)
    for row, (name, run) in enumerate(series):
        own = [e for e in shown if _finite(e, name) and run in (None, e.run)]
        own = [e for e in own if e.value(name) or name != "cache_host_bytes"]  # most have none
        y = np.array([at[id(e)] for e in own]) + (row - (len(series) - 1) / 2) * thick
        x = np.array([e.value(name) for e in own]) / divisor
        ends = _error_bars([e.rows[name] for e in own], divisor)
        told = [metric(name).heading] * (len(held) > 1) + ([_whose(run)] if run else [])
        look = {"color": colour or canvas.COLOURS[row],
                "label": ", ".join(told) or metric(name).heading}  # fmt: skip
        drawn = axes.barh(y, x, thick * 0.92, xerr=ends, capsize=2, ecolor="#333333", **look)
        axes.bar_label(drawn, [number(v) for v in x], padding=4, fontsize=8)
    _name_rows(axes, lines)
    axes.grid(False, axis="y")
    axes.margins(x=0.18)
    canvas.thousands(axes, "x")
    axes.set_xlabel(heading.format(unit=unit))
    if apart and len(held) == 1:
        canvas.legend(axes.figure, axes, above=True)


def _finite(entry: Entry, name: str) -> bool:
    return name in entry.rows and bool(np.isfinite(entry.value(name)))


def _name_rows(axes: Axes, lines: list[str]) -> None:
    """Lines down the vertical axis, in words. The first on top."""
    axes.set_yticks(range(len(lines)), [canvas.folded(text, 40) for text in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)


def rows(shown: list[Entry]) -> tuple[list[str], dict[int, int]]:
    """Names of lines, and id(entry) -> its line. Runs share the lines of variants that more than
    one of them has; else every entry has a line and the name of its run."""
    shared = row_names(shown, several=False)
    pairs = {(name, id(e.run)) for name, e in zip(shared, shown)}
    if len(pairs) == len(shown) and 2 * len(set(shared)) <= len(shown) + 1:
        lines = list(dict.fromkeys(shared))
        return lines, {id(e): lines.index(name) for name, e in zip(shared, shown)}
    return row_names(shown), {id(e): place for place, e in enumerate(shown)}


def row_names(shown: list[Entry], several: bool | None = None) -> list[str]:
    """What tells each entry from the others: variant in words, run, settings that differ.

    several: whether to name runs; by default where there are more than one."""
    runs = {e.run.name for e in shown}
    several = len(runs) > 1 if several is None else several
    keys = dict.fromkeys(k for e in shown for k in e.conditions if k != "control")  # named already
    keys = [k for k in keys if any(_varies(k, [e for e in shown if e.run.name == r]) for r in runs)]
    found = []
    for e in shown:
        parts = [_whose(e.run)] * several
        parts += [_setting(k, e.conditions[k]) for k in keys if k in e.conditions]
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
