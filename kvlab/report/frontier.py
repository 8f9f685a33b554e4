"""The non-dominated variants of a search: no other is better in one respect and worse in none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvlab.report import canvas
from kvlab.report.entries import Entry
from kvlab.report.names import metric, words
from kvlab.report.tables import Table

# What a search weighs: measurement -> whether less of it is better.
BYTES = "cache_logical_bytes"  # allocated ones come in slabs, too coarse for short texts
OBJECTIVES = {"kl_mean_nats": True, BYTES: True, "decode_tokens_per_second": False}
SHOWN = (BYTES, "kl_mean_nats", "decode_tokens_per_second")  # across, up, colour
LOSSES = ("kl_mean_nats", "perplexity_delta_percent", "needle_recall_percent",
          "task_score_percent")  # fmt: skip
LABELS = 14  # points that are named


def searched(everything: list[Entry]) -> list[Entry]:
    """Entries of a search that were measured in every objective."""
    return [
        e
        for e in everything
        if any("search" in r["params"] for r in e.rows.values())
        and all(name in e.rows and np.isfinite(e.value(name)) for name in OBJECTIVES)
    ]


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of `points` [N, M], less is better in every column, no other one dominates: bool [N].

    Equal points do not dominate each other.
    """
    no_worse = (points[:, None] <= points[None]).all(-1)
    better = (points[:, None] < points[None]).any(-1)
    return ~(no_worse & better).any(0)


def costs(found: list[Entry]) -> np.ndarray:
    """[N, M] of all objectives, turned so that less is better; speed is none of them where any of
    it was measured beside other work."""
    speedless = any(e.run.loaded for e in found)
    weighed = {n: less for n, less in OBJECTIVES.items() if less or not speedless}
    rows = [[e.value(n) * (1 if less else -1) for n, less in weighed.items()] for e in found]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(weighed))


def best(everything: list[Entry]) -> list[Entry]:
    """The non-dominated entries, fewest bytes first."""
    found = searched(everything)
    kept = [e for e, keep in zip(found, non_dominated(costs(found))) if keep] if found else []
    return sorted(kept, key=lambda e: e.value(BYTES))


def shortlist(everything: list[Entry]) -> list[Entry]:
    """Of each run and setting the full cache and what no other beats in bytes and loss together,
    fewest bytes last; none where a loss or bytes were not measured. Controls are left out."""
    loss = next((n for n in LOSSES if any(n in e.rows for e in everything)), None)
    groups: dict[str, list[Entry]] = {}
    for e in everything:
        known = loss in e.rows and np.isfinite(e.value(loss))
        if BYTES in e.rows and not e.control and (known or e.is_baseline):
            groups.setdefault(repr((e.run.name, e.conditions)), []).append(e)
    kept = []
    for found in groups.values():
        sign = -1 if metric(loss).better == "higher" else 1
        full, rest = ([e for e in found if e.is_baseline is own] for own in (True, False))
        points = np.array([[sign * e.value(loss), e.value(BYTES)] for e in rest]).reshape(-1, 2)
        good = [e for e, keep in zip(rest, non_dominated(points)) if keep]
        kept += full * bool(good) + sorted(good, key=lambda e: -e.value(BYTES))
    return kept


def frontier_table(everything: list[Entry]) -> list[Table]:
    """The non-dominated set with its objectives, numbered as in the figure."""
    kept = best(everything)
    if not kept:
        return []
    table = Table(f"Non-dominated set: {len(kept)} of {len(searched(everything))} measured")
    table.column("no.", [str(i) for i in range(1, len(kept) + 1)])
    table.column("variant", [e.variant for e in kept], numeric=False)
    table.column("bytes in use, % of full", [_share(e) for e in kept])
    for name in ("kl_mean_nats", "perplexity_delta_percent", "decode_tokens_per_second"):
        about = metric(name)
        cells = [f"{e.value(name):.4g}" if name in e.rows else "" for e in kept]
        table.column(f"{about.heading}, {about.unit}", cells)
    return [table]


def _share(entry: Entry) -> str:
    full = entry.baseline.value(BYTES) if entry.baseline else None
    return f"{100 * entry.value(BYTES) / full:.1f}" if full else ""


def frontier_figures(everything: list[Entry]) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    found, kept = searched(everything), best(everything)
    if len(found) < 2:
        return []

    def draw() -> Figure:
        made, (axes,) = canvas.figure(width=9.6, height=6.2)
        x, y, speed = (np.array([e.value(n) for e in found]) for n in SHOWN)
        full = next((e.baseline.value(BYTES) for e in found if e.baseline), None)
        unit = full / 100 if full else 2**20
        inside = {id(e) for e in kept}
        y = np.array(canvas.floored(y))  # a loss of nothing must not flatten the others: caption
        drawn = axes.scatter(x / unit, y, c=speed, cmap="viridis", s=26, zorder=3)
        edge = [i for i, e in enumerate(found) if id(e) in inside]
        ring = {"s": 90, "facecolors": "none", "edgecolors": canvas.COLOURS[1], "zorder": 4}
        axes.scatter(x[edge] / unit, y[edge], **ring)
        axes.set_xlabel(f"bytes of blocks in use, {'% of the full cache' if full else 'MiB'}")
        axes.set_ylabel("KL mean, nats ↓")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        canvas.rescale(axes, "y", y)
        made.colorbar(drawn, ax=axes, label="decode, tokens/s ↑", location="bottom", shrink=0.6)
        heights = {id(e): height for e, height in zip(found, y)}
        canvas.name_ends(axes, [
            (e.value(BYTES) / unit, heights[id(e)], f"{number}  {words(e.variant)}", "#333333")
            for number, e in list(enumerate(kept, 1))[:LABELS]
        ])
        return made

    caption = (
        f"{len(found)} compositions; circles: the {len(kept)} that no other beats in loss, bytes "
        "and decode speed together, numbered as in the table."
    )
    losses = [e.value(SHOWN[1]) for e in found]
    if any(canvas.lifted(losses, canvas.floored(losses))):
        caption += " What loses less than a thousandth of the largest loss lies at the bottom."
    if any(e.run.loaded for e in found):
        caption = caption.replace("loss, bytes and decode speed", "loss and bytes")
        caption += " Speed was measured beside other work and counts for nothing."
    return [("frontier", "Loss, bytes and speed", caption, draw)]
