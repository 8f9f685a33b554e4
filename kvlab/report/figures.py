"""Which figures a set of entries deserves, and what is drawn in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kvlab.report import canvas, hit_rates, operate
from kvlab.report.budgets import budget_figures, of_one_budget
from kvlab.report.entries import BYTES, Entry, names
from kvlab.report.frontier import frontier_figures
from kvlab.report.heatmap import heatmaps
from kvlab.report.layers import layer_figures
from kvlab.report.marks import bars, bars_or_dots, is_number, rows, series
from kvlab.report.names import arrow, metric
from kvlab.report.positions import position_figure
from kvlab.report.source import Run
from kvlab.report.tables import described, scaling

QUALITY = ("perplexity_delta_percent", "kl_mean_nats")
MEMORY = ("cache_nominal_bytes", "cache_logical_bytes", BYTES, "cache_host_bytes")
PEAK = "peak_device_bytes"
SPEED = ("decode_tokens_per_second", "prefill_tokens_per_second")
FIRST = (  # of other measurements: what is asked about; tails and accounts of bytes come last
    *("needle_recall_percent", "task_score_percent", "ttft_ms", "decode_tokens_per_second"),
    *("prefill_tokens_per_second", "prefill_seconds", "token_hit_percent", PEAK),
    *("cache_allocated_bytes", "task_score_delta_points", "kl_decoded_mean_nats"),
)
LAST = ("kl_p99_nats", "kl_p999_nats", "kl_max_nats", "cache_nominal_bytes", "cache_logical_bytes",
        "cache_host_bytes", "cache_peak_bytes", "evictions", "resident_tokens_percent",
        "weights_bytes", "workspace_bytes", "activation_bytes", "standing_bytes",
        "accounted_bytes", "accounted_percent", "decode_bytes", "host_bytes_loaded",
        "bytes_loaded",
        "allocated_of_logical_percent")  # fmt: skip
# the same once more: shown only where what stands behind it was not measured as well
AGAIN = {"prefill_seconds": "prefill_tokens_per_second", "decode_ms": "decode_tokens_per_second",
         "decode_replay_ms": "decode_tokens_per_second", "ms_saved": "ttft_speedup",
         "cache_logical_bytes": "cache_allocated_bytes"}  # fmt: skip
# seen in the figures above
TOLD = ("perplexity", "perplexity_full", "bits_per_element", "effective_bits")
MOST = 24  # generic figures; a page with more is no page
FEW = 3  # different values: with fewer the table says it better
CROWD = 40  # bars, or lines; with more the tables have to do
PANELS = 4  # of one figure, where a second number was varied
NEAR = 1.05  # bytes that differ by less are the same


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
    there, axis = names(everything), _numeric_condition(everything)
    along = [axis, *_told_by(axis, everything)] if axis else []
    if len({_line_of(e, along) for e in everything}) == len(everything):
        axis, along = None, []  # a point each, as of two models at one length each, are no lines
    crowded = len({(e.run.name, *_line_of(e, along)) for e in everything}) > CROWD
    found = [Drawing(*picture) for picture in frontier_figures(everything)]
    found += [Drawing(*picture) for picture in budget_figures(everything)]
    varied = bool(found)  # their figures have the bytes: that of memory comes last
    if varied:  # of two models, one may have been measured at one budget only
        found += [d for es in of_one_budget(everything) for n in QUALITY[1:]
                  if (d := _generic(es, n, None, f"-{canvas.file_name(es[0].run.name)}"))]
    quality = [name for name in QUALITY if name in there]
    shows_quality = _bytes_differ(everything) and any(
        _both(entry, name) for entry in everything for name in quality)  # fmt: skip
    if shows_quality and not varied:  # else their figures show it, with fewer colours
        apart = [[e for e in everything if e.run is run] for run in runs]
        apart = [es for es in apart if sum(_both(e, n) for e in es for n in quality) > 2]
        for several in apart if len(apart) > 1 else [everything]:
            found.append(_quality(several, quality, len(apart) > 1))
    special = [*MEMORY, PEAK] if any(name in there for name in MEMORY) and not axis else []
    memory = [_memory(everything)] if special and not crowded else []
    if not varied:
        found, memory = found + memory, []
    found += [Drawing(*position_figure(run, several=len(runs) > 1))
              for run in runs if run.curves]  # fmt: skip
    maps = [Drawing(*picture) for picture in heatmaps(runs)]
    found += [*maps[:1], *(Drawing(*picture) for picture in layer_figures(runs))]
    speed = [name for name in SPEED if name in there and not _doubtful(name, everything)]
    if speed and not axis and not crowded:
        found.append(_speed(everything, speed))
        special += speed
    drawn = {*special, *(quality if shows_quality else [])}
    drawn |= set(TOLD) if drawn else set()
    drawn |= {name for name, other in AGAIN.items() if other in there}
    rest = [name for name in there if name not in drawn and not crowded]
    rest = sorted((n for n in rest if not _doubtful(n, everything)), key=_rank)
    generic = [d for name in rest if (d := _generic(everything, name, axis))][:MOST]
    return found + generic + memory + maps[1:]


def _line_of(entry: Entry, along: list[str]) -> tuple:
    """What entries have alike that are points of one line: all but what changes along it."""
    rest = sorted((key, str(value)) for key, value in entry.conditions.items() if key not in along)
    return entry.variant, *rest


def _rank(name: str) -> int:
    """The place of a measurement that has no figure of its own kind; equals stay as they are."""
    if name in FIRST:
        return FIRST.index(name)
    if name in LAST:
        return 100 + LAST.index(name)
    return 50 if "_minus_" in name else 60


def _doubtful(name: str, everything: list[Entry]) -> bool:
    """A speed that was measured beside other work, which nobody should compare."""
    speed = name in SPEED or metric(name).family == "Speed"
    return speed and any(e.run.loaded for e in everything if name in e.rows)


def _quality(everything: list[Entry], quality: list[str], apart: bool) -> Drawing:
    """apart: of several runs, each has a figure of its own."""
    def draw() -> Figure:
        made, panels = canvas.figure(len(quality), width=8.6, height=3.6 * len(quality),
                                     stacked=True)  # fmt: skip
        for axes, name in zip(panels, quality):
            points = [entry for entry in everything if _both(entry, name)]
            divisor, unit = scaling(metric(BYTES), [e.value(BYTES) for e in points])
            axes.set_xlabel(f"allocated cache, {unit}")
            series(axes, points, name, lambda e, d=divisor: e.value(BYTES) / d, everything)
        return made

    run = everything[0].run
    title = "Quality against bytes" + f", {run.name}" * apart
    caption = "Loss against the allocated bytes of the cache; bars are 95 % intervals."
    stem = "quality_vs_bytes" + f"-{canvas.file_name(run.name)}" * apart
    return Drawing(stem, title, f"{caption} Lower and further left is better.", draw)


def _memory(everything: list[Entry]) -> Drawing:
    shown = [e for e in everything if any(name in e.rows for name in MEMORY)]
    held = [name for name in MEMORY if len({e.value(name) for e in shown} - {0, None}) > 1]
    held = held or [name for name in MEMORY if any(e.value(name) for e in shown)]
    lines = rows(shown)[0]
    parts = [shown]
    if len(lines) < len(shown):  # of several runs, each has a panel
        names = dict.fromkeys(e.run.name for e in shown)
        parts = [[e for e in shown if e.run.name == name] for name in names]
    peaks = any(PEAK in e.rows for e in shown) and len(parts) == 1

    def draw() -> Figure:
        height = 1.4 + (0.16 * len(held) + 0.16) * len(lines)
        made, panels = canvas.figure(len(parts) + peaks, width=9, height=max(3.0, height))
        for axes, part in zip(panels, parts):
            bars(axes, part, held, "cache, {unit}", lines=lines if len(parts) > 1 else None)
            if len(parts) > 1:
                axes.set_title(part[0].run.label, loc="left")
            if axes is not panels[0]:
                axes.set_yticklabels([])
        canvas.legend(made, panels[0], above=True)
        if peaks:
            bars(panels[1], shown, [PEAK], "peak on device, {unit}", colour=canvas.GREY)
            panels[1].set_yticklabels([])
        return made

    says = {"cache_nominal_bytes": "nominal (what the format promises)",
            "cache_logical_bytes": "logical (for the tokens held)",
            BYTES: "allocated (what was taken from the device)",
            "cache_host_bytes": "in host memory"}  # fmt: skip
    caption = f"Bytes of the cache: {', '.join(says[name] for name in held)}"
    end = "; right, the peak of the whole process on the device." if peaks else "."
    return Drawing("memory", "Memory", caption + end, draw)


def _speed(everything: list[Entry], speed: list[str]) -> Drawing:
    shown = [e for e in everything if any(name in e.rows for name in speed)]

    def draw() -> Figure:
        height = max(2.6, 1.0 + 0.38 * len(rows(shown)[0]))
        made, panels = canvas.figure(len(speed), width=9, height=height)
        for index, (axes, name) in enumerate(zip(panels, speed)):
            heading = f"{metric(name).heading}, {{unit}}{arrow(metric(name).better)}"
            bars(axes, shown, [name], heading, colour=canvas.COLOURS[index])
            canvas.thousands(axes, "x")
            if index:
                axes.set_yticklabels([])
        return made

    return Drawing("speed", "Speed", "Tokens per second; longer is better.", draw)


def _generic(
    everything: list[Entry], name: str, axis: str | None, ending: str = ""
) -> Drawing | None:
    """Any measurement: lines over the numeric setting that was varied, else bars.

    ending: of the file's name, where the figure is of one run among several.
    """
    shown = [e for e in everything if name in e.rows and np.isfinite(e.value(name))]
    over = axis if axis and len({e.conditions.get(axis) for e in shown} - {None}) > 1 else None
    shown = [e for e in shown if not over or over in e.conditions]
    if len({e.value(name) for e in shown}) < (2 if over else FEW):
        return None

    def draw() -> Figure:
        if over:
            return _lines(shown, name, over, everything)
        lines = rows(shown)[0]
        made, (axes,) = canvas.figure(height=max(2.6, 1.2 + 0.34 * len(lines)))
        bars_or_dots(axes, shown, name)
        return made

    about = described(name, [e.rows[name] for e in shown])
    title = about.heading[:1].upper() + about.heading[1:]
    better = {"higher": "; higher is better", "lower": "; lower is better"}.get(about.better, "")
    some = any(None not in (e.rows[name]["low"], e.rows[name]["high"]) for e in shown)
    unit = {"bytes": "bytes", "B": "bytes"}.get(about.unit, about.unit)
    caption = (f"{title}{f', {unit}' if unit else ''}{f', over {_said(over)}' if over else ''}"
               f"{better}{'; bars are 95 % intervals' * some} ({name}).")  # fmt: skip
    title += f", {shown[0].run.label}" * bool(ending)
    return Drawing(canvas.file_name(name) + ending, title, caption, draw)


def _said(setting: str) -> str:
    return setting.replace("_", " ")


def _lines(shown: list[Entry], name: str, over: str, everything: list[Entry]) -> Figure:
    """Lines over one setting, with a panel for each value of a second number that was varied."""
    other, told = _numeric_condition(shown, but=over), _told_by(over, shown)
    values = sorted({e.conditions[other] for e in shown if other in e.conditions}) if other else []
    values = values if 1 < len(values) <= PANELS else [None]
    made, panels = canvas.figure(len(values), width=8.6, height=max(4.2, 3.8 * len(values)),
                                 stacked=True)  # fmt: skip
    for axes, value in zip(panels, values):
        part = [e for e in shown if value is None or e.conditions.get(other) == value]
        axes.set_xlabel(_said(over))
        if value is not None:
            axes.set_title(f"{_said(other)} {value:,g}", loc="left")
        apart = (over, *told) if value is None else (over, other, *told)
        series(axes, part, name, lambda e: e.conditions[over], everything, apart)
    return made


def _bytes_differ(everything: list[Entry]) -> bool:
    """Whether variants, controls left out, take other bytes than the full cache at all."""
    real = [e for e in everything if not e.control]
    sizes = [e.bytes_ratio for e in real if e.bytes_ratio] or [e.value(BYTES) or 0 for e in real]
    return bool(sizes) and max(sizes) > NEAR * min(sizes)


def _numeric_condition(everything: list[Entry], but: str | None = None) -> str | None:
    """The numeric setting with the most values, if one was varied at all; never `but`, nor what
    follows from it."""
    values: dict[str, set] = {}
    known = () if but is None else (but, *_told_by(but, everything))
    for entry in everything:
        for key, value in entry.conditions.items():
            if is_number(value) and key not in known:
                values.setdefault(key, set()).add(value)
    varied = {key: len(found) for key, found in values.items() if len(found) > 1}
    return max(varied, key=varied.get) if varied else None


def _told_by(over: str, everything: list[Entry]) -> list[str]:
    """Numbers that follow from `over`, as prompt tokens from the requests of a trace."""
    found: dict[str, dict] = {}
    for entry in everything:
        for key, value in entry.conditions.items():
            if is_number(value) and key != over and over in entry.conditions:
                found.setdefault(key, {}).setdefault(entry.conditions[over], set()).add(value)
    return [key for key, of in found.items()
            if all(len(values) == 1 for values in of.values())
            and len({value for values in of.values() for value in values}) > 1]  # fmt: skip


def _both(entry: Entry, name: str) -> bool:
    pair = (entry.value(BYTES), entry.value(name))
    return all(value is not None and np.isfinite(value) for value in pair)
