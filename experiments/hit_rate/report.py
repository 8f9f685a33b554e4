"""Publish a run of hit_rate, hit_curve or adaptive as a study: figures, short tables, results.

    python experiments/hit_rate/report.py RUN reports/NAME --text experiments/NAME/README.md

Beside the standard report (`RUN/report`, one line for each measurement) this one has a table for
each trace with capacities side by side. `--text` goes above it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvlab.report import canvas, study, write_page, write_results
from kvlab.report.hit_rates import hits, pictures, traces
from kvlab.report.source import Run, load
from kvlab.report.subject import subject


def publish(run: Run, out: Path, text: str, again: bool) -> None:
    """again: the run was read from `out`, whose results stay as they are."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    shown = pictures(run.rows)
    with canvas.styled():
        for picture in shown:
            canvas.save(picture.draw(), out / "figures" / picture.stem)
    if not again:
        write_results([run], out)
    parts = [*map(illustration, shown), *tables(run.rows), provenance(run)]
    write_page(study(text, parts, subject([run])), out)


def provenance(run: Run) -> str:
    env = run.environment
    if not env.get("command"):  # a report's rows keep no more than this
        return f"Run `{run.name}`, commit `{run.commit}`, {run.device}; rows in `results.jsonl`."
    machine = env.get("host", {})
    return (
        f"Run `{env.get('command', run.name)}`, commit `{run.commit}`, {env.get('date')}, "
        f"{machine.get('cpu', run.device)} with {machine.get('cores')} cores, "
        f"Python {env.get('python')}. All rows are in `results.jsonl`."
    )


def illustration(picture) -> str:
    file = f"figures/{picture.stem}"
    return f"## {picture.title}\n\n![{picture.title}]({file}.svg)\n\n{picture.caption}"


def tables(rows: list[dict]) -> list[str]:
    found = []
    for trace in traces(rows):
        mine = [r for r in hits(rows) if r["params"].get("trace") == trace]
        by_budget = [r for r in mine if "budget_gib" in r["params"]]
        for size in sorted({r["params"]["trace_block_size"] for r in mine}):
            same = [r for r in mine if r["params"]["trace_block_size"] == size]
            same = [r for r in same if r not in by_budget]
            title = f"{trace}, blocks of {size} tokens"
            found.append(pivot(f"{title}: block hits, %, by capacity", same, "capacity_blocks"))
        found.append(pivot(f"{trace}: block hits, %, by GiB", by_budget, "budget_gib"))
    for name, heading in (
        ("regret_points", "points behind the best fixed policy"),
        ("gain_over_lru_points", "points ahead of LRU"),
    ):
        judged = [r for r in rows if r["name"] == name]
        for row in judged:
            row["variant"] = row["params"]["trace"]
        found.append(pivot(f"adaptive: {heading}, by capacity", judged, "capacity_blocks"))
    return [table for table in found if table]


def pivot(title: str, rows: list[dict], over: str) -> str:
    """A Markdown table: variants down, values of one setting across."""
    if not rows:
        return ""
    across = sorted({r["params"][over] for r in rows})
    lines = [f"### {title}", "", "| | " + " | ".join(f"{v:,g}" for v in across) + " |"]
    lines.append("|---|" + "---:|" * len(across))
    for variant in dict.fromkeys(r["variant"] for r in rows):
        value = {r["params"][over]: r["value"] for r in rows if r["variant"] == variant}
        cells = [f"{value[v]:.2f}" if v in value else "" for v in across]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    [run] = load([options.run])
    again = options.run.resolve() == options.out.resolve()
    publish(run, options.out, options.text.read_text(), again)


if __name__ == "__main__":
    main()
