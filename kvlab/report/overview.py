"""The six figures of the front page, one for each question, from committed results."""

from __future__ import annotations

from matplotlib.figure import Figure

from kvlab.report import canvas, real
from kvlab.report.book import Book, objects
from kvlab.report.names import words
from kvlab.report.sketch import RUNS, Line, Overview, across, picture, series, tick

EVICTING = {
    "sink window.recent=64 snapkv": "evict: SnapKV",
    "sink window.recent=64 attention_mass": "evict: attention mass",
    "sink window.middle=False": "window: newest tokens",
    "sink window.recent=64 fifo fitted": "window and fitted summary",
    "lru host quest": "retrieve: Quest, rest on the host",
    "fifo host": "exact, rest on the host",
}
FORMATS = "formats: fp8 to int2"
LOSS, RECALL = "kl_mean_nats", "needle_recall_percent"
POLICIES = {"lru": "LRU", "arc": "ARC", "mq": "MQ", "s3fifo": "S3-FIFO", "adaptive": "adaptive",
            "belady": "best possible (Belady)"}  # fmt: skip
ARMS = {"fp8_device": "exact, fp8, all on the device", "fp8_host": "exact, fp8, past on the host",
        "exact": "exact, fp8, past on the host", "window": "window of 8,192"}  # fmt: skip


def pictures(book: Book) -> list[Overview]:
    """Those whose reports are there; of eviction and windows on real models, and only where these
    were not measured on the stand-in."""
    made = (
        _formats(book), real.eviction(book) or _eviction(book),
        real.windows(book) or _windows(book), _hits(book), _speed(book), _memory(book),
    )
    return [one for one in made if one]


def _formats(book: Book) -> Overview | None:
    lines: Line = {}
    for run, name in RUNS.items():
        bits = {r["variant"]: r["value"] for r in book.find("real_formats", "bits_per_element",
                                                            run=run)}  # fmt: skip
        rows = [r for r in book.find("real_formats", LOSS, run=run) if "control" not in r["params"]]
        lines[name] = sorted(((bits[r["variant"]], r) for r in rows), key=lambda p: p[0])

    def draw() -> Figure:
        made, [axes] = canvas.figure(width=8.6, height=5.0)
        bits = {row["variant"]: x for points in lines.values() for x, row in points}
        rows = sorted(bits, key=bits.get, reverse=True)
        for index, (name, points) in enumerate(lines.items()):
            at = [(rows.index(row["variant"]) + 0.24 * index - 0.12, row) for _, row in points]
            across(axes, at, index, name)
        told = [f"{v.replace(' format.sinks=4', ' + 4 sinks')}: {bits[v]:.1f} bits" for v in rows]
        axes.set_yticks(range(len(rows)), told)
        axes.set(xscale="log", xlabel="KL mean, nats ↓")
        axes.invert_yaxis()
        canvas.plain(axes, "x")
        axes.legend(loc="upper right")
        return made

    caption = ("Loss of storage formats on two real models, six held-out books x 4,096 tokens; "
               "bars are 95 % intervals (real_formats, H200).")
    return picture("formats", "Formats: what fewer bits cost", caption, lines, draw)


def _eviction(book: Book) -> Overview | None:
    full = [r["value"] for r in book.find("axes_quality", "cache_logical_bytes", variant="full")]
    if not full:
        return None
    sizes = {r["variant"]: 100 * r["value"] / max(full)
             for r in book.find("axes_quality", "cache_logical_bytes")}  # fmt: skip
    lines: dict[str, Line] = {LOSS: {}, RECALL: {}}
    for name, found in lines.items():
        for row in book.find("axes_quality", name):
            method = _method(row["variant"])
            if method and "control" not in row["params"]:
                found.setdefault(method, []).append((sizes[row["variant"]], row))
        for points in found.values():
            points.sort(key=lambda p: p[0])

    def draw() -> Figure:
        made, panels = canvas.figure(2, width=8.8, height=7.4, stacked=True)
        order = [*EVICTING.values(), FORMATS]
        for axes, (name, found) in zip(panels, lines.items()):
            ends = [series(axes, found[m], order.index(m)) + (m, canvas.COLOURS[order.index(m)])
                    for m in order if m in found]  # fmt: skip
            axes.set_xscale("log")
            axes.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("bytes of blocks in use on the device, % of the full cache's")
            canvas.rescale(axes, "y", [r["value"] for ps in found.values() for _, r in ps
                                       if name == LOSS])  # fmt: skip
            canvas.name_ends(axes, ends)
        panels[0].set_ylabel("KL mean, nats ↓")
        panels[1].set_ylabel("facts recalled, % ↑")
        return made

    caption = ("Reference model, four held-out books x 16,384 tokens and 20 questions a point; "
               "bars are 95 % intervals (axes_quality, H200).")
    return picture("eviction", "Eviction and retrieval: what 2 to 20 times fewer bytes cost",
                    caption, lines, draw)  # fmt: skip


def _method(variant: str) -> str | None:
    """What stays of a variant without its budget, in words; None of what is not shown."""
    if variant in ("fp8", "int8", "int4", "k4v2", "int2"):
        return FORMATS
    words = [w for w in variant.split() if not w.endswith("%") and not w.startswith(
        ("retrieval.", "summary.ratio=")) and (w == "window.recent=64" or not w.startswith(
            "window.recent="))]  # fmt: skip
    return EVICTING.get(" ".join(words))


def _windows(book: Book) -> Overview | None:
    named = {(4, False): "4 sinks", (0, False): "no sinks", (64, False): "64 sinks",
             (4, True): "4 sinks, positions moved up"}  # fmt: skip
    lines: Line = {}
    for row in book.find("window_quality", LOSS):
        p = row["params"]
        if "window.recent" not in p:
            continue
        key = (p.get("window.sinks"), bool(p.get("window.rerotate")))
        control = str(p.get("control", "")).startswith("random")
        if control and key != (4, False):
            continue
        name = "random eviction of equal bytes" if control else named.get(key)
        if name:
            lines.setdefault(name, []).append((p["window.recent"], row))

    def draw() -> Figure:
        made, [axes] = canvas.figure(width=8.8, height=4.4)
        ends = [series(axes, sorted(ps, key=lambda p: p[0]), i) + (name, canvas.COLOURS[i])
                for i, (name, ps) in enumerate(lines.items())]  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="recent tokens kept, of 4,096",
                 ylabel="KL mean, nats ↓")  # fmt: skip
        canvas.plain(axes, "y")
        tick(axes, sorted({x for ps in lines.values() for x, _ in ps}))
        canvas.name_ends(axes, ends)
        return made

    caption = ("Reference model, two held-out books x 4,096 tokens; bars are 95 % intervals of two "
               "books, too few to be sure of (window_quality, CPU).")
    return picture("windows", "Windows: how much of the past has to stay", caption, lines, draw)


def _hits(book: Book) -> Overview | None:
    lines: Line = {}
    for row in book.find("hit_rate", "block_hit_percent", trace="conversation"):
        p = row["params"]
        if row["variant"] in POLICIES and "budget_gib" not in p and p.get("prefix", True):
            lines.setdefault(row["variant"], []).append((p["capacity_blocks"], row))
    waits = {f"{row['variant']}, {told}": [(0.0, row)]
             for name, told in (("ttft_cold_ms", "computed"), ("ttft_ms", "known"))
             for row in book.find("prefix_ttft", name)}  # fmt: skip
    for row in book.find("prefix_ttft", "ttft_ms"):
        waits.pop(f"{row['variant']}, known", None)
        waits[f"{row['variant']}, from the {row['params']['tier']}"] = [(0.0, row)]

    def draw() -> Figure:
        made, [axes, times] = canvas.figure(2, width=8.8, height=7.0, stacked=True)
        order = [p for p in POLICIES if p in lines]
        ends = [series(axes, sorted(lines[p], key=lambda q: q[0]), i) + (
            POLICIES[p], canvas.COLOURS[i]) for i, p in enumerate(order)]  # fmt: skip
        axes.set(xscale="log", xlabel="capacity, blocks of 512 tokens",
                 ylabel="block hits, % of accesses ↑")  # fmt: skip
        axes.set_title("Mooncake's conversation trace, by policy", loc="left")
        ticks = [500, 1000, 2000, 5000, 10_000, 20_000, 50_000]
        tick(axes, ticks)
        canvas.name_ends(axes, ends)
        names = list(waits)
        across(times, [(i, waits[n][0][1]) for i, n in enumerate(names)], 0)
        for i, n in enumerate(names):
            times.annotate(f"{waits[n][0][1]['value']:,.0f} ms", (waits[n][0][1]["value"], i),
                           xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        times.set_yticks(range(len(names)), names)
        times.set(xscale="log", xlim=(20, 60_000), xlabel="time to the first token, ms ↓")
        canvas.plain(times, "x")
        times.set_title("200,000 tokens known, 512 new: H200", loc="left")
        times.set_ylim(len(names) - 0.5, -0.8)
        return made

    caption = ("Prefix-correct block hits over capacity, and what a hit is worth: medians of eight "
               "requests with 95 % intervals; computing in fp8 includes compilation (hit_rate, "
               "prefix_ttft).")
    told = {"hits": lines, "waits": waits} if lines and waits else {}
    return picture("prefixes", "Prefixes and hit rates", caption, told, draw)


def _speed(book: Book) -> Overview | None:
    lines: Line = {}
    for row in book.find("decode_speed", "decode_tokens_per_second", batch=1):
        lines.setdefault(row["variant"], []).append((row["params"]["tokens"], row))
    lines = {n: sorted(ps, key=lambda p: p[0]) for n, ps in lines.items() if len(ps) > 1}

    def draw() -> Figure:
        made, [axes] = canvas.figure(width=8.8, height=4.8)
        ends = [series(axes, ps, i) + (words(name), canvas.COLOURS[i])
                for i, (name, ps) in enumerate(lines.items())]  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="context, tokens",
                 ylabel="decode, tokens/s ↑")  # fmt: skip
        tick(axes, sorted({x for ps in lines.values() for x, _ in ps}))
        axes.set_yticks([20, 50, 100, 200, 500, 1000], ["20", "50", "100", "200", "500", "1,000"])
        axes.set_yticks([], minor=True)
        canvas.name_ends(axes, ends)
        return made

    caption = ("One request, Qwen3-0.6B's shapes with random weights, captured decode "
               "(decode_speed, H200).")
    return picture("speed", "Speed: decode by format and context", caption, lines, draw)


def _memory(book: Book) -> Overview | None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for report in ("memory_200k", "ultra_long"):
        file = book.folder / report / "results.curve.jsonl"
        told = objects(file, "variant", "done", "peak_device_bytes") if file.is_file() else []
        for _, row in told:
            if row["variant"] in ARMS and (report, row["variant"]) != ("memory_200k", "window"):
                arm = f"{ARMS[row['variant']]}, {'1M' if report == 'ultra_long' else '200k'} run"
                lines.setdefault(arm, []).append((row["done"], row["peak_device_bytes"] / 1e9))
    lines = {arm: sorted(set(points)) for arm, points in lines.items()}

    def draw() -> Figure:
        made, [axes] = canvas.figure(width=8.8, height=4.4)
        ends = []
        for index, (arm, points) in enumerate(lines.items()):
            colour = canvas.COLOURS[index]
            axes.plot(*zip(*points), color=colour, linewidth=1.8)
            ends.append((*points[-1], arm, colour))
        axes.axhline(4.0, color=canvas.GREY, linestyle="--", linewidth=1)
        axes.annotate("cap of 4 GB", (8192, 4.1), fontsize=8, color=canvas.GREY)
        axes.set(xscale="log", xlabel="tokens done", ylabel="peak on the device, GB ↓")
        axes.set_ylim(bottom=0)
        ticks = [8192, 32_768, 131_072, 500_000, 1_000_000]
        tick(axes, ticks)
        canvas.name_ends(axes, ends)
        return made

    caption = ("Weights, cache, workspace and activations together; Qwen3-0.6B's shapes, random "
               "weights (memory_200k, ultra_long, H200).")
    return picture("memory", "Memory at length", caption, lines, draw)
