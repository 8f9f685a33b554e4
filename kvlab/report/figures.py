"""Which figures a set of entries deserves, and what is drawn in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvlab.report import canvas
from kvlab.report.entries import BYTES, Entry, names
from kvlab.report.names import Metric, arrow, metric, number
from kvlab.report.source import Run
from kvlab.report.tables import described, labels, scaling

QUALITY = ("perplexity_delta_percent", "kl_mean_nats")
MEMORY = ("cache_nominal_bytes", "cache_logical_bytes", BYTES, "cache_host_bytes")
PEAK = "peak_device_bytes"
SPEED = ("decode_tokens_per_second", "prefill_tokens_per_second")
TOLD = ("perplexity", "perplexity_full", "bits_per_element")  # seen in the figures above
MOST = 24  # generic figures; a page with more is no page


class Drawing(NamedTuple):
    """A figure that is still to be drawn: file name, title, what it shows, how to draw it."""

    stem: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def drawings(everything: list[Entry], runs: list[Run]) -> list[Drawing]:
    """All figures that the measurements allow, the important ones first."""
    there = names(everything)
    found = []
    quality = [name for name in QUALITY if name in there]
    if quality and any(_both(entry, name) for entry in everything for name in quality):
        found.append(_quality(everything, quality))
    axis = _numeric_condition(everything)
    special = [*MEMORY, PEAK] if any(name in there for name in MEMORY) and not axis else []
    if special:
        found.append(_memory(everything))
    found += [_positions(run, several=len(runs) > 1) for run in runs if run.curves]
    speed = [name for name in SPEED if name in there]
    if speed and not axis:
        found.append(_speed(everything, speed))
        special += speed
    drawn = {*special, *(quality if found and found[0].stem == "quality_vs_bytes" else [])}
    drawn |= set(TOLD) if drawn else set()
    rest = [name for name in there if name not in drawn]
    return found + [d for name in rest if (d := _generic(everything, name, axis))][:MOST]


def _quality(everything: list[Entry], quality: list[str]) -> Drawing:
    def draw() -> Figure:
        made, panels = canvas.figure(len(quality), width=4.2 * len(quality) + 1.4)
        for axes, name in zip(panels, quality):
            points = [entry for entry in everything if _both(entry, name)]
            divisor, unit = scaling(metric(BYTES), [e.value(BYTES) for e in points])
            axes.set_xlabel(f"allocated cache, {unit}")
            _series(axes, points, name, lambda e, d=divisor: e.value(BYTES) / d)
        canvas.legend(made, panels[0])
        return made

    title = "Quality against bytes"
    caption = "Loss against the allocated bytes of the cache; bars are 95 % intervals."
    return Drawing("quality_vs_bytes", title, f"{caption} Lower and further left is better.", draw)


def _series(axes: Axes, points: list[Entry], name: str, x_of: Callable[[Entry], float]) -> None:
    """One series for each variant (and run), with intervals; joined where it has several points."""
    about = _label_axis(axes, "y", name, points)
    divisor, _ = scaling(about, [e.value(name) for e in points])
    series: dict[str, list[Entry]] = {}
    for entry in points:
        series.setdefault(_series_name(entry, points), []).append(entry)
    for index, (label, members) in enumerate(series.items()):
        members = sorted(members, key=x_of)
        y = np.array([e.value(name) for e in members]) / divisor
        look = canvas.look(index)
        look["linestyle"] = look["linestyle"] if len(members) > 1 else "none"
        ends = _error_bars([e.rows[name] for e in members], divisor)
        x = [x_of(e) for e in members]
        axes.errorbar(x, y, yerr=ends, label=label, capsize=3, markersize=7, **look)
    canvas.rescale(axes, "x", [x_of(e) for e in points])
    canvas.rescale(axes, "y", [e.value(name) / divisor for e in points])
    if "log" not in axes.get_xscale():
        axes.set_xlim(left=0)


def _series_name(entry: Entry, points: list[Entry]) -> str:
    """Variant, run where there are several, and settings that are words."""
    several = len({e.run.name for e in points}) > 1
    parts = [entry.run.label] * several
    parts += [f"{k}={v}" for k, v in entry.conditions.items() if not _is_number(v)]
    return f"{entry.variant} ({', '.join(parts)})" if parts else entry.variant


def _memory(everything: list[Entry]) -> Drawing:
    shown = [e for e in everything if any(name in e.rows for name in MEMORY)]
    held = [name for name in MEMORY if any(e.value(name) for e in shown)]
    peaks = any(PEAK in e.rows for e in shown)

    def draw() -> Figure:
        height = 1.2 + (0.2 * len(held) + 0.25) * len(shown)
        made, panels = canvas.figure(1 + peaks, width=9, height=max(3.0, height))
        _bars(panels[0], shown, held, "cache, {unit}")
        canvas.legend(made, panels[0])
        if peaks:
            _bars(panels[1], shown, [PEAK], "peak on device, {unit}", colour=canvas.GREY)
            panels[1].set_yticklabels([])
        return made

    caption = (
        "Bytes of the cache: nominal (what the format promises), logical (for the tokens held) and "
        "allocated (what was taken from the device)"
    )
    end = "; right, the peak of the whole process on the device." if peaks else "."
    return Drawing("memory", "Memory", caption + end, draw)


def _speed(everything: list[Entry], speed: list[str]) -> Drawing:
    shown = [e for e in everything if any(name in e.rows for name in speed)]

    def draw() -> Figure:
        height = max(2.6, 1.0 + 0.38 * len(shown))
        made, panels = canvas.figure(len(speed), width=9, height=height)
        for index, (axes, name) in enumerate(zip(panels, speed)):
            heading = f"{metric(name).heading}, {{unit}}{arrow(metric(name).better)}"
            _bars(axes, shown, [name], heading, colour=canvas.COLOURS[index])
            if index:
                axes.set_yticklabels([])
        return made

    return Drawing("speed", "Speed", "Tokens per second; longer is better.", draw)


def _bars(
    axes: Axes, shown: list[Entry], held: list[str], heading: str, *, colour: str | None = None
) -> None:
    """Horizontal bars, one group for each entry, one bar for each name, with their values."""
    values = [e.value(name) for e in shown for name in held if name in e.rows]
    divisor, unit = scaling(metric(held[0]), [v for v in values if np.isfinite(v)])
    texts = labels(shown)
    thick = 0.8 / len(held)
    for row, name in enumerate(held):
        at = [(i, e.rows[name]) for i, e in enumerate(shown) if name in e.rows]
        y = np.array([i for i, _ in at]) + (row - (len(held) - 1) / 2) * thick
        x = np.array([r["value"] for _, r in at]) / divisor
        ends = _error_bars([r for _, r in at], divisor)
        look = {"color": colour or canvas.COLOURS[row], "label": metric(name).heading}
        drawn = axes.barh(y, x, thick * 0.92, xerr=ends, capsize=2, ecolor="#333333", **look)
        axes.bar_label(drawn, [number(v) for v in x], padding=4, fontsize=8)
    axes.set_yticks(range(len(shown)), [_shorten(texts[id(e)]) for e in shown])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.18)
    axes.set_xlabel(heading.format(unit=unit))


def _positions(run: Run, *, several: bool) -> Drawing:
    """Per-position loss, from the arrays of a run."""

    def draw() -> Figure:
        curves = run.curves
        made, (axes,) = canvas.figure(width=8.6)
        axes.axhline(0, color=canvas.GREY, linewidth=1)
        for index, variant in enumerate(curves["variants"]):
            look = {**canvas.look(index), "markersize": 4}
            axes.plot(curves["position"], curves["nll_delta"][index], label=str(variant), **look)
            low, high = curves["low"][index], curves["high"][index]
            axes.fill_between(curves["position"], low, high, color=look["color"], alpha=0.15, lw=0)
        axes.set_xlabel("position in the document, tokens")
        axes.set_ylabel("loss minus full cache's, nats per token ↓")
        largest = np.nanmax(np.abs(curves["nll_delta"]), axis=1)
        canvas.rescale(axes, "y", [*largest[largest > 0], 0.0])
        canvas.legend(made, axes)
        return made

    stem = f"per_position-{_file_name(run.name)}" if several else "per_position"
    title = f"Loss by position{f', {run.label}' if several else ''}"
    caption = (
        "Where in the text the loss arises, paired with the full cache; bands: 95 % intervals."
    )
    return Drawing(stem, title, caption, draw)


def _generic(everything: list[Entry], name: str, axis: str | None) -> Drawing | None:
    """Any measurement: lines over the numeric setting that was varied, else bars."""
    shown = [e for e in everything if name in e.rows and np.isfinite(e.value(name))]
    over = axis if axis and len({e.conditions.get(axis) for e in shown} - {None}) > 1 else None
    shown = [e for e in shown if not over or over in e.conditions]
    if len(shown) < 2 or (not over and len({e.value(name) for e in shown}) == 1):
        return None  # one number, or the same one everywhere: the table says it better

    def draw() -> Figure:
        if over:
            made, (axes,) = canvas.figure(width=8.6)
            axes.set_xlabel(over.replace("_", " "))
            _series(axes, shown, name, lambda e: e.conditions[over])
            canvas.legend(made, axes)
        else:
            made, (axes,) = canvas.figure(height=max(2.6, 1.0 + 0.38 * len(shown)))
            _bars_or_dots(axes, shown, name)
        return made

    caption = f"{name}{f' over {over}' if over else ''}, with 95 % intervals where there are any."
    heading = described(name, [e.rows[name] for e in shown]).heading
    title = heading[:1].upper() + heading[1:]
    return Drawing(_file_name(name), title, caption, draw)


def _bars_or_dots(axes: Axes, shown: list[Entry], name: str) -> None:
    """Bars where their lengths can be compared; dots for values close together or far apart."""
    values = [e.value(name) for e in shown]
    if min(values) >= 0 and 2 * min(values) < max(values) <= canvas.WIDE * max(min(values), 1e-300):
        about = described(name, [e.rows[name] for e in shown])
        unit = ", {unit}" if about.unit else ""
        _bars(axes, shown, [name], f"{about.heading}{unit}{arrow(about.better)}")
        return
    about = _label_axis(axes, "x", name, shown)
    divisor, _ = scaling(about, values)
    x = np.array(values) / divisor
    ends = _error_bars([e.rows[name] for e in shown], divisor)
    axes.errorbar(x, range(len(shown)), xerr=ends, fmt="o", color=canvas.COLOURS[0], capsize=3)
    texts = labels(shown)
    axes.set_yticks(range(len(shown)), [_shorten(texts[id(e)]) for e in shown])
    axes.invert_yaxis()
    canvas.rescale(axes, "x", x)


def _label_axis(axes: Axes, which: str, name: str, shown: list[Entry]) -> Metric:
    about = described(name, [e.rows[name] for e in shown])
    _, unit = scaling(about, [e.value(name) for e in shown])
    text = f"{about.heading}{f', {unit}' if unit else ''}{arrow(about.better)}"
    getattr(axes, f"set_{which}label")(text)
    return about


def _numeric_condition(everything: list[Entry]) -> str | None:
    """The numeric setting with the most values, if one was varied at all."""
    values: dict[str, set] = {}
    for entry in everything:
        for key, value in entry.conditions.items():
            if _is_number(value):
                values.setdefault(key, set()).add(value)
    varied = {key: len(found) for key, found in values.items() if len(found) > 1}
    return max(varied, key=varied.get) if varied else None


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


def _both(entry: Entry, name: str) -> bool:
    pair = (entry.value(BYTES), entry.value(name))
    return all(value is not None and np.isfinite(value) for value in pair)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in text).strip("_") or "figure"


def _shorten(text: str, most: int = 34) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
