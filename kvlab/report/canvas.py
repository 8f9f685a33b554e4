"""How every figure looks: fonts, colours, scales. No pyplot, so no global state and no display."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    SymmetricalLogLocator,
)

# Okabe and Ito's colours, which colour-blind readers tell apart (their yellow is too pale on white)
# and those of Tol's muted scheme that are far from them. No figure gives one to two series.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#332288", "#882255", "#117733", "#999933", "#661100", "#6699CC", "#AA4499"),
)
GREY = "#767676"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", ":", "-.")
DEEP = 1e-3  # of the largest value: what is smaller is drawn there, see `floored`
FEW = 7  # places of points that get a tick each
WIDE = 30  # values that span more than this factor get a logarithmic axis
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # a variant's name may hold a dollar
    "svg.fonttype": "path",  # looks the same everywhere, with no font to fetch
    "svg.hashsalt": "kvlab",  # the same results give the same file
    "savefig.facecolor": "white",
}


@contextmanager
def styled():
    """Inside, figures are drawn in the style above; glyphs the font lacks are no reason to warn."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def figure(
    panels: int = 1, *, width: float = 8.0, height: float = 4.2, stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes side by side, or on top of each other; sizes in inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    lines, columns = (panels, 1) if stacked else (1, panels)
    return made, list(made.subplots(lines, columns, squeeze=False).flat)


def look(index: int) -> dict:
    """Colour, marker and line style of series `index`; the first 14 colours all differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def floored(values: Iterable[float]) -> list[float]:
    """Positive values that are nothing beside the largest (below a thousandth) lifted to that: one
    of 1e-9 nats among tenths would flatten all others of a logarithmic axis."""
    values = list(values)
    top = max((v for v in values if math.isfinite(v)), default=0.0)
    return [max(v, DEEP * top) if v > 0 else v for v in values]


def loss_places(values: Iterable[float]) -> list[float]:
    """Where losses are drawn: `floored` on a logarithmic axis. Beside zeros and gains the axis is
    linear around zero, which nothing flattens: there as they are."""
    values = list(values)
    return floored(values) if all(v > 0 for v in values) else values


def lifted(values: Iterable[float], drawn: Iterable[float]) -> list[bool]:
    """Of values and what `floored` made of them: which lie lower than they are drawn."""
    return [place > value for value, place in zip(values, drawn)]


def open_mark(axes: Axes, x: float, y: float, colour: str) -> None:
    """An open triangle that points down: the value lies below, and its name tells it."""
    axes.plot([x], [y], linestyle="none", marker="v", markersize=8, color=colour,
              markerfacecolor="white", zorder=4)  # fmt: skip


def rescale(axes: Axes, which: str, values: Iterable[float], *, noise: float = 0.0) -> None:
    """Make axis `which` ("x" or "y") logarithmic where `values` span more than 30 times.

    With zeros or negative values among them the axis is symmetric-logarithmic; it is linear around
    zero, at least as far as `noise` (half a typical interval) reaches.
    """
    sizes = [abs(v) for v in values if math.isfinite(v)]
    nonzero = [size for size in sizes if size > 0]
    if not nonzero or max(nonzero) <= WIDE * min(nonzero):
        return
    if all(v > 0 for v in values if math.isfinite(v)):
        _log(axes, which)
    else:
        linear = 10.0 ** math.floor(math.log10(max(min(nonzero), max(nonzero) / 1000, noise)))
        if linear * WIDE > max(nonzero):
            return  # nearly all of it would be the linear part
        _symlog(axes, which, linear)
    plain(axes, which)


def _plain(value: float, _place=None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def thousands(axes: Axes, which: str) -> None:
    """Few ticks with large numbers grouped, on a linear axis; a logarithmic one stays."""
    if getattr(axes, f"get_{which}scale")() == "linear":
        axis = getattr(axes, f"{which}axis")
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(_plain))


def few_ticks(axes: Axes, values: Iterable[float]) -> None:
    """Tick the horizontal axis where the points are, if these are few and far apart."""
    at = sorted(set(values))
    left, right = axes.get_xlim()
    log = axes.get_xscale() == "log" and left > 0
    width = math.log(right / left) if log else right - left
    gaps = [math.log(b / a) if log else b - a for a, b in zip(at, at[1:])]
    if len(at) <= FEW and width > 0 and min(gaps, default=0) > width / 12:
        axes.set_xticks(at, [_plain(value) for value in at])
        axes.set_xticks([], minor=True)


def plain(axes: Axes, which: str) -> None:
    """Ticks of a logarithmic axis as numbers: powers would need math, which names switch off.
    Within two decades there are some between the powers, else one number would stand alone."""
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    if getattr(axes, f"get_{which}scale")() == "log" and high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _log(axes: Axes, which: str) -> None:
    getattr(axes, f"set_{which}scale")("log", nonpositive="clip")


def _symlog(axes: Axes, which: str, linear: float) -> None:
    getattr(axes, f"set_{which}scale")("symlog", linthresh=linear)
    locator = SymmetricalLogLocator(base=10, linthresh=linear)
    getattr(axes, f"{which}axis").set_major_locator(locator)
    getattr(axes, f"set_{which}label")(
        f"{getattr(axes, f'get_{which}label')()}\n(linear within ±{linear:g}, else logarithmic)"
    )


def spread(places: list[float], gap: float) -> list[float]:
    """`places`, moved as little as it takes for any two to be `gap` apart; their order stays."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    stacks: list[list[float]] = []  # [middle, members]: those that touch are moved as one
    for i in order:
        stacks.append([places[i], 1])
        while len(stacks) > 1 and _touch(*stacks[-2:], gap):
            (a, n), (b, m) = stacks[-2:]
            stacks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    found = [middle + (k - (n - 1) / 2) * gap for middle, n in stacks for k in range(n)]
    moved = dict(zip(order, found))
    return [moved[i] for i in range(len(places))]


def _touch(below: list[float], above: list[float], gap: float) -> bool:
    return above[0] - below[0] < gap * (below[1] + above[1]) / 2 - 1e-12


def name_ends(axes: Axes, ends: list[tuple[float, float, str, str]], size: float = 8) -> None:
    """Each series' name, in its colour, to the right of the axes, level with its last point.

    ends: (x, y, name, colour), in data coordinates; call it when the scales are final.
    """
    if not ends:
        return
    inverse = axes.transAxes.inverted()
    points = [inverse.transform(axes.transData.transform(end[:2])) for end in ends]
    room = axes.get_position().height * axes.figure.get_size_inches()[1] * 72  # points, about
    heights = spread([min(max(y, 0.0), 1.0) for _, y in points], 1.25 * size / room)
    low, high = min(heights), max(heights)
    shift = max(0.0, -low) - max(0.0, high - 1.0)
    for (x, y, name, colour), height in zip(ends, heights):
        axes.annotate(
            shorten(name, 64), (x, y), xytext=(1.03, height + shift), textcoords="axes fraction",
            fontsize=size, color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5,
                        "relpos": (0, 0.5), "shrinkA": 1},
        )


def name_lines(axes: Axes) -> None:
    """The label of each line at its end, instead of a legend; call it when the scales are final."""
    ends = []
    for line in axes.get_lines():
        known = [(x, y) for x, y in zip(*line.get_data()) if math.isfinite(y)]
        if known and not str(line.get_label()).startswith("_"):
            ends.append((*known[-1], str(line.get_label()), line.get_color()))
    name_ends(axes, ends)


def legend(made: Figure, axes: Axes, *, above: bool = False) -> None:
    """Outside, where it covers no data: to the right, or below where its texts are long."""
    handles, texts = axes.get_legend_handles_labels()
    if len(texts) < 2:
        return
    texts = [shorten(text, 44) for text in texts]
    longest = max(map(len, texts))
    width, height = made.get_size_inches()
    if above:
        made.legend(handles, texts, loc="outside upper left", ncols=len(texts))
    elif longest <= 24 and 0.24 * len(texts) < height:
        made.legend(handles, texts, loc="outside right upper")
    else:  # below, and the figure grows by as much: the data keep their room
        columns = max(1, int(width / (0.7 + 0.085 * longest)))
        made.set_figheight(height + 0.22 * math.ceil(len(texts) / columns))
        made.legend(handles, texts, loc="outside lower left", ncols=columns)


def shorten(text: str, most: int) -> str:
    """At most so many characters; what is left out lies in the middle, names differ at the ends."""
    keep = (most - 1) // 2
    return text if len(text) <= most else f"{text[:keep]}…{text[-keep:]}"


def folded(text: str, width: int, lines: int = 2) -> str:
    """At most so many lines of about `width` letters, broken between words."""
    parts = wrap(text, width, break_long_words=False)
    if len(parts) <= lines:
        return "\n".join(parts)
    return "\n".join([*parts[: lines - 1], shorten(" ".join(parts[lines - 1 :]), width)])


def file_name(text: str) -> str:
    """Letters and digits of a name, for files."""
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in text).strip("_") or "figure"


def save(made: Figure, stem: Path) -> None:
    """STEM.svg and STEM.png, repeatable to the byte."""
    made.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    made.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
