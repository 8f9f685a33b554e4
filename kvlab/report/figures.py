"""Which figures a set of entries deserves, and what is drawn in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kvlab.report import canvas, hit_rates, operate
from kvlab.report.budgets import budget_figures
from kvlab.report.entries import BYTES, Entry, names
from kvlab.report.frontier import frontier_figures
from kvlab.report.heatmap import heatmaps
from kvlab.report.layers import layer_figures
from kvlab.report.marks import bars, bars_or_dots, is_number, series
from kvlab.report.names import arrow, metric, words
from kvlab.report.source import Run
from kvlab.report.tables import described, scaling

QUALITY = ("perplexity_delta_percent", "kl_mean_nats")
MEMORY = ("cache_nominal_bytes", "cache_logical_bytes", BYTES, "cache_host_bytes")
PEAK = "peak_device_bytes"
SPEED = ("decode_tokens_per_second", "prefill_tokens_per_second")
TOLD = ("perplexity", "perplexity_full", "bits_per_element")  # seen in the figures above
MOST = 24  # generic figures; a page with more is no page
CROWD = 40  # entries; with more the tables have to do
LINES = len(canvas.COLOURS)  # of one figure: no colour twice


class Drawing(NamedTuple):
    """A figure that is still to be drawn: file name, title, what it shows, how to draw it."""

    stem: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def drawings(everything: list[Entry], runs: list[Run]) -> list[Drawing]:
    """All figures that the measurements allow, the important ones first."""
    rows = [row for run in runs for row in run.rows]
    replayed = operate.pictures(rows) or hit_rates.pictures(rows)
    if replayed:  # a trace was replayed: nothing else was measured
        return [Drawing(*picture) for picture in replayed]
    there, crowded = names(everything), len(everything) > CROWD
    found = [Drawing(*picture) for picture in frontier_figures(everything)]
    found += [Drawing(*picture) for picture in budget_figures(everything)]
    quality = [name for name in QUALITY if name in there]
    shows_quality = any(_both(entry, name) for entry in everything for name in quality)
    if shows_quality and not found:  # else their figures show it, with fewer colours
        apart = [[e for e in everything if e.run is run] for run in runs]
        apart = [es for es in apart if sum(_both(e, n) for e in es for n in quality) > 2]
        for several in apart if len(apart) > 1 else [everything]:
            found.append(_quality(several, quality, len(apart) > 1))
    axis = _numeric_condition(everything)
    special = [*MEMORY, PEAK] if any(name in there for name in MEMORY) and not axis else []
    if special and not crowded:
        found.append(_memory(everything))
    found += [_positions(run, several=len(runs) > 1) for run in runs if run.curves]
    found += [Drawing(*picture) for picture in (*heatmaps(runs), *layer_figures(runs))]
    speed = [name for name in SPEED if name in there]
    if speed and not axis and not crowded:
        found.append(_speed(everything, speed))
        special += speed
    drawn = {*special, *(quality if shows_quality else [])}
    drawn |= set(TOLD) if drawn else set()
    rest = [name for name in there if name not in drawn and not crowded]
    return found + [d for name in rest if (d := _generic(everything, name, axis))][:MOST]


def _quality(everything: list[Entry], quality: list[str], apart: bool) -> Drawing:
    """apart: of several runs, each has a figure of its own."""
    def draw() -> Figure:
        made, panels = canvas.figure(len(quality), width=5.6 * len(quality))
        for axes, name in zip(panels, quality):
            points = [entry for entry in everything if _both(entry, name)]
            divisor, unit = scaling(metric(BYTES), [e.value(BYTES) for e in points])
            axes.set_xlabel(f"allocated cache, {unit}")
            series(axes, points, name, lambda e, d=divisor: e.value(BYTES) / d, everything)
        return made

    run = everything[0].run
    title = "Quality against bytes" + f", {run.name}" * apart
    caption = "Loss against the allocated bytes of the cache; bars are 95 % intervals."
    stem = "quality_vs_bytes" + f"-{_file_name(run.name)}" * apart
    return Drawing(stem, title, f"{caption} Lower and further left is better.", draw)


def _memory(everything: list[Entry]) -> Drawing:
    shown = [e for e in everything if any(name in e.rows for name in MEMORY)]
    held = [name for name in MEMORY if any(e.value(name) for e in shown)]
    peaks = any(PEAK in e.rows for e in shown)

    def draw() -> Figure:
        height = 1.4 + (0.16 * len(held) + 0.16) * len(shown)
        made, panels = canvas.figure(1 + peaks, width=9, height=max(3.0, height))
        bars(panels[0], shown, held, "cache, {unit}")
        canvas.legend(made, panels[0], above=True)
        if peaks:
            bars(panels[1], shown, [PEAK], "peak on device, {unit}", colour=canvas.GREY)
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
            bars(axes, shown, [name], heading, colour=canvas.COLOURS[index])
            if index:
                axes.set_yticklabels([])
        return made

    return Drawing("speed", "Speed", "Tokens per second; longer is better.", draw)


def _positions(run: Run, *, several: bool) -> Drawing:
    """Per-position loss, from the arrays of a run."""

    def draw() -> Figure:
        curves = run.curves
        made, (axes,) = canvas.figure(width=8.6)
        axes.axhline(0, color=canvas.GREY, linewidth=1)
        ends = []
        for index, variant in list(enumerate(curves["variants"]))[:LINES]:
            look = {**canvas.look(index), "markersize": 4}
            y = curves["nll_delta"][index]
            axes.plot(curves["position"], y, **look)
            known = np.flatnonzero(np.isfinite(y))
            if known.size:
                last = known[-1]
                ends.append((curves["position"][last], y[last], words(str(variant)), look["color"]))
            low, high = curves["low"][index], curves["high"][index]
            axes.fill_between(curves["position"], low, high, color=look["color"], alpha=0.15, lw=0)
        axes.set_xlabel("position in the document, tokens")
        axes.set_ylabel("loss minus full cache's, nats per token ↓")
        largest = np.nanmax(np.abs(curves["nll_delta"]), axis=1)
        noise = curves["high"] - curves["low"]
        noise = float(np.median(noise[noise > 0])) / 2 if (noise > 0).any() else 0.0
        canvas.rescale(axes, "y", [*largest[largest > 0], 0.0], noise=noise)
        canvas.name_ends(axes, ends)
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
            series(axes, shown, name, lambda e: e.conditions[over], everything, over)
        else:
            made, (axes,) = canvas.figure(height=max(2.6, 1.0 + 0.38 * len(shown)))
            bars_or_dots(axes, shown, name)
        return made

    caption = f"{name}{f' over {over}' if over else ''}, with 95 % intervals where there are any."
    heading = described(name, [e.rows[name] for e in shown]).heading
    title = heading[:1].upper() + heading[1:]
    return Drawing(_file_name(name), title, caption, draw)


def _numeric_condition(everything: list[Entry]) -> str | None:
    """The numeric setting with the most values, if one was varied at all."""
    values: dict[str, set] = {}
    for entry in everything:
        for key, value in entry.conditions.items():
            if is_number(value):
                values.setdefault(key, set()).add(value)
    varied = {key: len(found) for key, found in values.items() if len(found) > 1}
    return max(varied, key=varied.get) if varied else None


def _both(entry: Entry, name: str) -> bool:
    pair = (entry.value(BYTES), entry.value(name))
    return all(value is not None and np.isfinite(value) for value in pair)


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in text).strip("_") or "figure"
