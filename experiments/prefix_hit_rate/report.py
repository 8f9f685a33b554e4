"""Publish a run of prefix_hit_rate, parity or load as a study: figures, short tables, results.

    python experiments/prefix_hit_rate/report.py RUN... reports/NAME --text README
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.ticker import FuncFormatter, NullFormatter

from kvlab.report import canvas, study, write_page, write_results
from kvlab.report.names import words
from kvlab.report.source import Run, load
from kvlab.report.subject import subject

Rows = list[dict]
TOLD = {"ttft_p50_ms": "median", "ttft_p99_ms": "99th percentile", "block_hit_percent": "hits",
        "thrash_percent": "thrash", "preemptions": "preempted", "refused_requests": "refused"}


def publish(runs: list[Run], out: Path, text: str, again: bool) -> None:
    """again: the runs were read from `out`, whose results stay as they are."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    parts = []
    rows = [{**row, "run": run.name} for run in runs for row in run.rows if row["count"] != 0]
    with canvas.styled():
        for stem, title, draw in figures(rows):
            canvas.save(draw(rows), out / "figures" / stem)
            parts.append(f"## {title}\n\n![{title}](figures/{stem}.svg)")
    parts += [*tables(rows), *map(provenance, runs)]
    if not again:
        write_results(runs, out)
    write_page(study(text, parts, subject(runs)), out)


def provenance(run: Run) -> str:
    env = run.environment
    if not env.get("command"):  # a report's rows keep no more than this
        return f"Run `{run.name}`, commit `{run.commit}`, {run.device}; rows in `results.jsonl`."
    host = env.get("host", {})
    return (f"Run `{env.get('command', run.name)}`, commit `{run.commit}`, {env.get('date')}, "
            f"{host.get('cpu', run.device)} with {host.get('cores')} cores. All rows are in "
            "`results.jsonl`.")  # fmt: skip


def figures(rows: Rows) -> Iterator[tuple[str, str, Callable]]:
    """(file name, title, how to draw it) of each figure that these rows allow."""
    if any(_tells(rows, t) for t in distinct(of(rows, "budget_mib"), "trace")):
        yield "hit_rates", "Hits over the budget, live (lines) and simulated (rings)", hit_rates
    if len(named(rows, "predicted_ttft_ms")) > 2:  # fewer points are no figure
        yield "ttft", "Time to the first token: predicted from simulated hits, and measured", ttft
    if of(rows, "requests_per_second"):
        yield "load", "Rising load", rising


def of(rows: Rows, setting: str) -> Rows:
    return [row for row in rows if setting in row["params"]]


def named(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row["name"] == name]


def distinct(rows: Rows, setting: str) -> list:
    return list(dict.fromkeys(row["params"][setting] for row in rows))


def hit_rates(rows: Rows):
    traces = [t for t in distinct(of(rows, "budget_mib"), "trace") if _tells(rows, t)]
    made, panels = canvas.figure(len(traces), width=8.8, height=3.6 * len(traces), stacked=True)
    variants = list(dict.fromkeys(row["variant"] for row in of(rows, "budget_mib")))
    for trace, axes in zip(traces, panels):
        for index, variant in enumerate(variants):
            look = canvas.look(index)
            line = points(rows, trace, variant, "block_hit_percent")
            axes.plot(*line, label=words(variant), **look)
            rings = points(rows, trace, variant, "simulated_block_hit_percent")
            axes.plot(*rings, linestyle="", marker="o", markersize=11, fillstyle="none",
                      color=look["color"], label="_simulated")  # fmt: skip
        axes.set_title(trace, loc="left")
        axes.set_xlabel("budget of sealed blocks, MiB")
        axes.set_ylabel("block hits, % of accesses ↑")
        canvas.name_lines(axes)
    return made


def _tells(rows: Rows, trace: str) -> bool:
    """Whether hits differ at all; where they do not, the table says it."""
    mine = named(of(rows, "budget_mib"), "block_hit_percent")
    return len({r["value"] for r in mine if r["params"]["trace"] == trace}) > 1


def points(rows: Rows, trace: str, variant: str, name: str) -> tuple[list, list]:
    mine = [r for r in named(rows, name)
            if r["variant"] == variant and r["params"]["trace"] == trace]  # fmt: skip
    pairs = sorted((r["params"]["budget_mib"], r["value"]) for r in mine)
    return [p[0] for p in pairs], [p[1] for p in pairs]


def ttft(rows: Rows):
    made, [axes] = canvas.figure(width=5.6, height=5.0)
    ends = []
    for index, format in enumerate(distinct(of(rows, "format"), "format")):
        measured, predicted = (
            [r["value"] for r in named(rows, name) if r["params"]["format"] == format]
            for name in ("ttft_ms", "predicted_ttft_ms")
        )
        look = canvas.look(index) | {"linestyle": ""}
        axes.plot(measured, predicted, label=format, **look)
        ends += measured + predicted
    axes.axline((0, 0), slope=1, color=canvas.GREY, linewidth=1)
    axes.set(xlim=(0, 1.1 * max(ends)), ylim=(0, 1.1 * max(ends)))
    axes.set_xlabel("measured, mean ms")
    axes.set_ylabel("predicted, mean ms")
    axes.legend()
    return made


def rising(rows: Rows):
    shown = (("ttft_p50_ms", "ttft_p99_ms"), ("block_hit_percent", "thrash_percent"),
             ("preemptions", "refused_requests"))  # fmt: skip
    made, panels = canvas.figure(len(shown), width=8.8, height=3.4 * len(shown), stacked=True)
    models = distinct(of(rows, "requests_per_second"), "model")
    for names, axes in zip(shown, panels):
        for index, (model, name) in enumerate((m, n) for m in models for n in names):
            pairs = sorted((r["params"]["requests_per_second"], r["value"])
                           for r in named(rows, name) if r["params"]["model"] == model)  # fmt: skip
            told = f"{TOLD[name]}, {model} model"
            axes.plot(*zip(*pairs), label=told, **canvas.look(index))
        axes.set_xscale("log")
        axes.set_xlabel("requests a second")
    panels[0].set_yscale("log")
    for axes, label in zip(panels, ("time to first token, ms ↓", "% of blocks", "requests")):
        axes.set_ylabel(label)
    for axis in (panels[0].yaxis, *(axes.xaxis for axes in panels)):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    for axes in panels:
        canvas.name_lines(axes)
    return made


COLUMNS = {
    "budget_mib": ("capacity_blocks", ("block_hit_percent", "simulated_block_hit_percent",
                   "simulated_differing_decisions", "evictions", "ttft_ms", "predicted_ttft_ms",
                   "predicted_ttft_error_percent")),
    "scene": ("run", ("evictions", "replay_differing_decisions", "simulated_differing_decisions",
              "block_hit_percent", "simulated_block_hit_percent", "policies_that_differ",
              "last_to_differ")),
    "requests_per_second": ("run", (
        "done_requests", "cancelled_requests", "refused_requests", "preemptions",
        "injected_failures", "evictions", "block_hit_percent", "thrash_percent", "ttft_p50_ms",
        "ttft_p99_ms", "output_tokens_per_second", "wrong_tokens", "leaked_blocks",
        "leaked_bytes", "replay_differs")),
}  # fmt: skip


def tables(rows: Rows) -> Iterator[str]:
    """A Markdown table for each kind of point; one line a point."""
    for setting, (second, names) in COLUMNS.items():
        for group in groups(of(rows, setting)):
            title = group[0]["params"].get("trace") or group[0]["params"].get("scene", "")
            lines = [f"### {title}", "", f"| | {setting} | {second} | " + " | ".join(names) + " |",
                     "|---|" + "---:|" * (len(names) + 2)]  # fmt: skip
            by_point: dict[tuple, dict] = {}
            for row in group:
                facts = row["params"] | {"run": row["run"]}
                key = (row["variant"], facts[setting], facts[second])
                by_point.setdefault(key, {})[row["name"]] = row["value"]
            for key, values in by_point.items():
                cells = [number(values[n]) if n in values else "" for n in names]
                lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
            yield "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def groups(rows: Rows) -> list[Rows]:
    """Rows of one trace, or of one scene, together."""
    found: dict[object, Rows] = {}
    for row in rows:
        found.setdefault(row["params"].get("trace", row["params"].get("scene")), []).append(row)
    return list(found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    again = options.out.resolve() in [run.resolve() for run in options.runs]
    publish(load(options.runs), options.out, options.text.read_text(), again)


if __name__ == "__main__":
    main()
