"""Publish a run of prefix_hit_rate, parity or load as a study: figures, short tables, results.

    python experiments/prefix_hit_rate/report.py RUN... reports/NAME --text README
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.ticker import FuncFormatter, NullFormatter

from kvlab.report import canvas
from kvlab.report.source import Run, load

Rows = list[dict]


def publish(runs: list[Run], out: Path, text: str) -> None:
    (out / "figures").mkdir(parents=True, exist_ok=True)
    parts, lines = [text.strip(), *map(provenance, runs)], []
    rows = [{**row, "run": run.name} for run in runs for row in run.rows if row["count"] != 0]
    with canvas.styled():
        for stem, title, draw in figures(rows):
            canvas.save(draw(rows), out / "figures" / stem)
            parts.append(f"## {title}\n\n![{title}](figures/{stem}.svg)")
    parts += tables(rows)
    for run in runs:
        origin = {"run": run.name, "commit": run.commit, "device": run.device}
        lines += [json.dumps({**row, "params": {**row["params"], **origin}}) for row in run.rows]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n")
    (out / "README.md").write_text("\n\n".join(parts) + "\n")


def provenance(run: Run) -> str:
    env = run.environment
    host = env.get("host", {})
    return (f"Run `{env.get('command', run.name)}`, commit `{run.commit}`, {env.get('date')}, "
            f"{host.get('cpu', run.device)} with {host.get('cores')} cores. All rows are in "
            "`results.jsonl`.")  # fmt: skip


def figures(rows: Rows) -> Iterator[tuple[str, str, Callable]]:
    """(file name, title, how to draw it) of each figure that these rows allow."""
    if of(rows, "budget_mib"):
        yield "hit_rates", "Hits over the budget, live (lines) and simulated (rings)", hit_rates
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
    traces = distinct(of(rows, "budget_mib"), "trace")
    made, panels = canvas.figure(len(traces), width=5.4 * len(traces) + 0.8)
    variants = list(dict.fromkeys(row["variant"] for row in of(rows, "budget_mib")))
    for trace, axes in zip(traces, panels):
        for index, variant in enumerate(variants):
            look = canvas.look(index)
            line = points(rows, trace, variant, "block_hit_percent")
            axes.plot(*line, label=variant, **look)
            rings = points(rows, trace, variant, "simulated_block_hit_percent")
            axes.plot(*rings, linestyle="", marker="o", markersize=11, fillstyle="none",
                      color=look["color"])  # fmt: skip
        axes.set_title(trace, loc="left")
        axes.set_xlabel("budget of sealed blocks, MiB")
    panels[0].set_ylabel("block hits, % of accesses ↑")
    panels[-1].legend(fontsize=8)
    return made


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
    made, panels = canvas.figure(len(shown), width=12.5, height=4.6)
    models = distinct(of(rows, "requests_per_second"), "model")
    for names, axes in zip(shown, panels):
        for index, (model, name) in enumerate((m, n) for m in models for n in names):
            pairs = sorted((r["params"]["requests_per_second"], r["value"])
                           for r in named(rows, name) if r["params"]["model"] == model)  # fmt: skip
            axes.plot(*zip(*pairs), label=f"{name}, {model}", **canvas.look(index))
        axes.set_xscale("log")
        axes.set_xlabel("requests a second")
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panels[0].set_yscale("log")
    for axis in (panels[0].yaxis, *(axes.xaxis for axes in panels)):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
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
    publish(load(options.runs), options.out, options.text.read_text())


if __name__ == "__main__":
    main()
