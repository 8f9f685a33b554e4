"""Publish results of endless: a table and a figure over the tokens decoded.

    python experiments/endless/report.py RUN reports/endless --text README.md
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from kvlab.report import canvas, study, write_page
from kvlab.track import read_rows

SHOWN = {  # measurement -> axis, divisor
    "cache_allocated_bytes": ("cache, MiB", 2**20),
    "process_peak_bytes": ("process, MiB", 2**20),
    "decode_tokens_per_second": ("decode, tokens/s", 1),
    "nll_mean": ("loss, nats", 1),
}
SAID = {"kept": "positions kept", "moved": "positions moved up"}
Arms = dict[str, list[dict]]


def collect(path: Path) -> Arms:
    """Arm -> what was held after so many tokens, in order."""
    arms: dict[str, dict[int, dict]] = {}
    text = path.read_text(encoding="utf-8")
    if '"arm"' in text.partition("\n")[0]:
        return earlier(text)
    for row in read_rows(path)[0]:
        done = row["params"].get("done")
        if done:
            line = arms.setdefault(row["variant"], {}).setdefault(done, {"done": done})
            line[row["name"]] = row["value"]
    return {arm: list(lines.values()) for arm, lines in arms.items()}


def earlier(text: str) -> Arms:
    """Results as they were before this was a job: a line for each point of an arm."""
    arms: Arms = {}
    for row in map(json.loads, text.splitlines()):
        told = {"process_peak_bytes": row["resident_mib"] * 2**20,
                "decode_tokens_per_second": row["tokens_per_second"]}  # fmt: skip
        arms.setdefault(row["arm"], []).append(row | told)
    return arms


def draw(arms: Arms):
    made, panels = canvas.figure(len(SHOWN), width=8.8, height=2.6 * len(SHOWN), stacked=True)
    for axes, (key, (label, unit)) in zip(panels, SHOWN.items()):
        for index, (arm, lines) in enumerate(arms.items()):
            look = canvas.look(index) | {"marker": ""}
            axes.plot([x["done"] / 1000 for x in lines], [x[key] / unit for x in lines],
                      label=SAID.get(arm, arm), **look)  # fmt: skip
        axes.set(xlabel="thousand tokens", ylabel=label)
        if unit > 1:
            axes.set_ylim(bottom=0)
        canvas.name_lines(axes)
    return made


def table(arms: Arms) -> str:
    """Tenths of the way: bytes at the end of each, speed and loss as means over it."""
    rows = ["| arm | tokens | cache, bytes | process, MiB | decode, tokens/s | loss, nats |",
            "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for arm, lines in arms.items():
        size = max(1, len(lines) // 10)
        for start in range(0, len(lines), size):
            part = lines[start : start + size]
            seconds = sum(1 / x["decode_tokens_per_second"] for x in part) / len(part)
            loss = sum(x["nll_mean"] for x in part) / len(part)
            last, process = part[-1], part[-1]["process_peak_bytes"] / 2**20
            rows.append(f"| {arm} | {last['done']:,} | {last['cache_allocated_bytes']:,.0f} | "
                        f"{process:.1f} | {1 / seconds:.1f} | {loss:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="its folder, or a results.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="Markdown that goes above the table")
    args = parser.parse_args()
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    rows = args.run / "measurements.jsonl" if args.run.is_dir() else args.run
    arms = collect(rows)
    with canvas.styled():
        canvas.save(draw(arms), args.out / "figures" / "endless")
    parts = ["## Over the tokens decoded", "![over the tokens](figures/endless.svg)", table(arms)]
    done = max(line["done"] for lines in arms.values() for line in lines)
    text = args.text.read_text() if args.text else f"# {args.out.name}"
    write_page(study(text, parts, f"the reference model, {done:,} tokens decoded"), args.out)
    if rows.resolve() != (args.out / "results.jsonl").resolve():
        shutil.copy(rows, args.out / "results.jsonl")


if __name__ == "__main__":
    main()
