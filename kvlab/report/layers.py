"""What storing each layer's keys and values in few bits costs: layers down, codecs across."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvlab.report import canvas
from kvlab.report.entries import LAYER_LOSS
from kvlab.report.source import Run

DEEP = 1e-4  # of the largest loss: what is below has the lightest colour
Losses = dict[tuple[int, str], float]  # (layer, "keys int4g") -> nats


def layer_figures(runs: list[Run]) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    """(file name, title, caption, how to draw) of each run that measured its layers."""
    found = []
    for run in runs:
        losses = layer_losses(run)
        if losses:
            stem = "layer_losses" + (f"-{len(found) + 1}" if found else "")
            title = "Loss by layer" + (f", {run.label}" if len(runs) > 1 else "")
            caption = ("KL to the full cache in nats, where one layer's keys or values alone are "
                       "stored by a codec.")
            found.append((stem, title, caption, _drawer(losses)))
    return found


def layer_losses(run: Run) -> Losses:
    found: Losses = {}
    for row in run.rows:
        params = row["params"]
        if row["name"] == LAYER_LOSS and "layer" in params:
            found[params["layer"], f"{params['side']} {params['codec']}"] = row["value"]
    return found


def _drawer(losses: Losses) -> Callable[[], Figure]:
    layers = sorted({layer for layer, _ in losses})
    columns = list(dict.fromkeys(column for _, column in losses))

    def draw() -> Figure:
        grid = np.array([[losses.get((layer, c), np.nan) for c in columns] for layer in layers])
        top = np.nanmax(grid) if np.nanmax(grid) > 0 else 1.0
        size = {"width": 1.8 + 0.75 * len(columns), "height": 1.6 + 0.24 * len(layers)}
        made, [axes] = canvas.figure(**size)
        image = axes.imshow(np.maximum(grid, DEEP * top), aspect="auto", cmap="viridis_r",
                            norm=LogNorm(DEEP * top, top))  # fmt: skip
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        made.colorbar(image, ax=axes, label="KL, nats ↓", format=plain)
        return made

    return draw
