"""Figures of the front page that real models are behind: eviction and windows, one panel each."""

from __future__ import annotations

from matplotlib.figure import Figure

from kvlab.report import canvas
from kvlab.report.book import Book
from kvlab.report.sketch import RUNS, Line, Overview, picture, series, tick

LOSS, DECODED = "kl_mean_nats", "kl_decoded_mean_nats"
FORMATS, QUEST = "formats: int8 to int2g", "Quest, rest on the host (decoded tokens)"
METHODS = (
    FORMATS, "int8 to int2g, and expected attention", "evict: expected attention",
    "evict: SnapKV", "evict: by chance", "window: newest tokens", "window and fitted summary",
    QUEST,
)  # fmt: skip
EVICTING = {"expected_attention": METHODS[2], "snapkv": METHODS[3], "random": METHODS[4],
            "fifo": METHODS[5]}  # fmt: skip


def method(params: dict) -> str | None:
    """What a composition of real_axes is shown as; None for what loses nothing."""
    policy, format = params.get("policy"), params.get("format")
    if "control" in params or params.get("baseline"):
        return None
    if policy is None:
        return FORMATS
    if params.get("offload") == "host":
        return QUEST if "retrieval" in params else None
    if format not in (None, "bf16"):
        return METHODS[1] if policy == "expected_attention" else None
    return METHODS[6] if "summary" in params else EVICTING.get(policy)


def eviction(book: Book) -> Overview | None:
    """KL over allocated bytes, a panel for each model; None where no real model was measured."""
    panels = {name: _axes_of(book, run) for run, name in RUNS.items()}
    panels = {name: lines for name, lines in panels.items() if lines}

    def draw() -> Figure:
        made, axes = canvas.figure(len(panels), width=8.8, height=4.2 * len(panels), stacked=True)
        for place, (name, lines) in zip(axes, panels.items()):
            order = [m for m in METHODS if m in lines]
            ends = [series(place, lines[m], METHODS.index(m)) + (
                m, canvas.COLOURS[METHODS.index(m) % len(canvas.COLOURS)]) for m in order]
            place.set(xscale="log", yscale="log", ylabel="KL mean, nats ↓",
                      xlabel="allocated bytes, % of the full cache's")  # fmt: skip
            tick(place, [5, 10, 20, 50])
            canvas.plain(place, "y")
            place.set_title(name, loc="left")
            canvas.name_ends(place, ends)
        return made

    caption = (f"{_told(book, 'real_axes')}. What lies whole in host memory loses nothing; Quest "
               "reads 1,024 tokens.")
    return picture("eviction", "Eviction and retrieval: what 2 to 20 times fewer bytes cost",
                   caption, panels, draw)  # fmt: skip


def _axes_of(book: Book, run: str) -> Line:
    size = "cache_allocated_bytes"
    held = {r["variant"]: r for r in book.find("real_axes", size, run=run)}
    full = [r["value"] for r in held.values() if r["params"].get("baseline")]
    lines: Line = {}
    for row in book.find("real_axes", LOSS, run=run) + book.find("real_axes", DECODED, run=run):
        shown = method(row["params"])
        if full and shown and row["value"] > 0 and row["variant"] in held and (shown == QUEST) == (
                row["name"] == DECODED):  # fmt: skip
            share = 100 * held[row["variant"]]["value"] / full[0]
            lines.setdefault(shown, []).append((share, row))
    return {name: sorted(found, key=lambda p: p[0]) for name, found in lines.items()}


def windows(book: Book) -> Overview | None:
    """KL over recent tokens, a panel for each model; None where no real model was measured."""
    panels: dict[str, Line] = {}
    for run, name in RUNS.items():
        for row in book.find("real_windows", LOSS, run=run):
            p = row["params"]
            shown = _window(p)
            if shown and "window.recent" in p and row["value"] > 0:  # the axis is logarithmic
                line = panels.setdefault(name, {}).setdefault(shown, [])
                if p["window.recent"] not in (x for x, _ in line):  # other blocks come later
                    line.append((p["window.recent"], row))

    def draw() -> Figure:
        made, axes = canvas.figure(len(panels), width=8.8, height=3.6 * len(panels), stacked=True)
        for place, (name, lines) in zip(axes, panels.items()):
            ends = [series(place, sorted(ps, key=lambda p: p[0]), i) + (told, canvas.COLOURS[i])
                    for i, (told, ps) in enumerate(sorted(lines.items()))]  # fmt: skip
            place.set(xscale="log", yscale="log", xlabel="recent tokens kept",
                      ylabel="KL mean, nats ↓")  # fmt: skip
            canvas.plain(place, "y")
            tick(place, sorted({x for ps in lines.values() for x, _ in ps}))
            place.set_title(name, loc="left")
            canvas.name_ends(place, ends)
        return made

    caption = f"{_told(book, 'real_windows')}."
    return picture("windows", "Windows: how much of the past has to stay", caption, panels, draw)


def _window(params: dict) -> str | None:
    """What a row of real_windows is shown as; None of what is in the table only, as sinks told
    apart in blocks of one token and random eviction that is no window's control."""
    sinks, moved = params.get("window.sinks", 4), params.get("window.rerotate")
    if "control" in params:
        plain = str(params["control"]).startswith("random") and sinks == 4 and not moved
        return "random eviction, a chunk sees as many" if plain else None
    if "policy" in params or params.get("block_size") == 1:
        return None
    if moved:
        return "4 sinks, positions moved up" if sinks == 4 else None
    return "no sinks" if sinks == 0 else f"{sinks} sink{'s' * (sinks > 1)}"


def _told(book: Book, report: str) -> str:
    """`SmolLM2-135M on 8 held-out books x 8,192 tokens, Qwen2.5-Coder-0.5B on 4 x 32,768; bars are
    95 % intervals (real_axes, H200)`."""
    found = []
    for run, name in RUNS.items():
        rows = book.find(report, "perplexity_delta_percent", run=run)
        if rows:
            tokens = rows[0]["params"]["tokens"]
            count = rows[0]["count"] // (tokens - 1)
            found.append(f"{name} on {count} {'held-out books ' * (not found)}x {tokens:,}"
                         f"{' tokens' * (not found)}")
    from_ = ", ".join(filter(None, (report, book.devices(report))))
    return f"{', '.join(found)}; bars are 95 % intervals ({from_})"
