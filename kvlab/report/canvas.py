"""How every figure looks: fonts, colours, scales. No pyplot, so no global state and no display."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, SymmetricalLogLocator

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#767676"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", ":", "-.")
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
    panels: int = 1, *, width: float = 8.0, height: float = 4.2
) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes side by side; sizes in inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def look(index: int) -> dict:
    """Colour, marker and line style of series `index`; the first 28 all differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


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
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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


def save(made: Figure, stem: Path) -> None:
    """STEM.svg and STEM.png, repeatable to the byte."""
    made.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    made.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
