"""Publish results of memory_200k or ultra_long: a table, the memory account, memory over length.

    python experiments/memory_200k/report.py RUN reports/memory_200k --text README.md
        [--arms NAME,...] [--device RUN]

RUN: a run folder or a report's folder. --arms: what RUN's variants are called, in their order.
--device: the run of the same prefill with everything on the device, arm `fp8_device`, whose time
and last logits those of RUN's variants are compared with.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from kvlab.report import canvas, study, write_page, write_results
from kvlab.report.source import Run, load
from kvlab.report.subject import subject
from kvlab.track.rows import read_rows

LINES = {"weights_bytes": "weights", "standing_bytes": "ids and libraries",
         "cache_peak_bytes": "cache", "workspace_bytes": "workspace and staging",
         "activation_bytes": "activations"}  # fmt: skip
COLUMNS = {  # measurement -> heading, divisor, format
    "prefill_seconds": ("prefill, s", 1, "{:.2f}"),
    "prefill_ratio_to_device": ("x all on the device", 1, "{:.3f}"),
    "decode_tokens_per_second": ("decode, tokens/s", 1, "{:.1f}"),
    "peak_device_bytes": ("peak, GB", 1e9, "{:.3f}"),
    "peak_reserved_bytes": ("reserved, GB", 1e9, "{:.3f}"),
    "accounted_percent": ("accounted, %", 1, "{:.1f}"),
    "cache_host_bytes": ("host, GB", 1e9, "{:.2f}"),
    "resident_tokens_percent": ("resident tokens, %", 1, "{:.1f}"),
    "host_reserve_seconds": ("pinning, s", 1, "{:.1f}"),
    "kl_to_device_nats": ("KL to the device's, nats", 1, "{:.1e}"),
}
SAID = {  # arms in words
    "fp8_device": "exact: fp8, all on the device", "fp8_host": "exact: fp8, past on the host",
    "retrieval": "Quest over the host", "window": "window", "exact": "exact: fp8, past on the host",
    "int4_mass": "int4, attention mass, 10 %", "int2_mass": "int2, attention mass, 62 %",
}  # fmt: skip
Arms = dict[tuple[str, int], dict[str, float]]
Curves = dict[str, list[dict]]


def collect(rows: list[dict]) -> Arms:
    """(arm, tokens) -> measurement -> value, the last line of each."""
    arms: Arms = {}
    for row in rows:
        arms.setdefault((row["variant"], row["params"]["tokens"]), {})[row["name"]] = row["value"]
    return arms


def agreement(run: Path, other: Path) -> Arms:
    """(variant, tokens) -> how far a variant of `run` is from the one of `other`: time, logits."""
    arms, [(twin, its)] = collect(read_rows(run / "measurements.jsonl")[0]), list(
        collect(read_rows(other / "measurements.jsonl")[0]).items())[-1:]
    found: Arms = {}
    for (name, tokens), values in arms.items():
        if tokens == twin[1]:
            a, b = (np.load(folder / "logits" / f"{slug(n)}-{tokens}.npy").astype(np.float64)
                    for folder, n in ((run, name), (other, twin[0])))  # fmt: skip
            p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
            found[name, tokens] = {
                "prefill_ratio_to_device": values["prefill_seconds"] / its["prefill_seconds"],
                "largest_logit_difference": float(np.abs(a - b).max()),
                "kl_to_device_nats": float((np.exp(q) * (q - p)).sum()),
            }
    return found


def slug(name: str) -> str:
    """As `kvlab.eval.prefill_speed` names files of logits."""
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in name)


def table(arms: Arms) -> str:
    shown = {n: c for n, c in COLUMNS.items() if any(n in values for values in arms.values())}
    lines = ["| arm | tokens | " + " | ".join(c[0] for c in shown.values()) + " |",
             "|---|---:|" + "---:|" * len(shown)]  # fmt: skip
    for (name, tokens), values in arms.items():
        cells = [form.format(values[n] / unit) if n in values else ""
                 for n, (_, unit, form) in shown.items()]  # fmt: skip
        lines.append(f"| {name} | {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def account(arms: Arms):
    """Stacked lines of the account, the measured peak as a mark, the cap as a rule."""
    made, [axes] = canvas.figure(width=9.6, height=max(2.6, 0.6 + 0.42 * len(arms)))
    one = len({tokens for _, tokens in arms}) == 1
    labels = [SAID.get(name, name) + f", {tokens // 1000:,}k tokens" * (not one)
              for name, tokens in arms]  # fmt: skip
    left = [0.0] * len(arms)
    for index, (key, label) in enumerate(LINES.items()):
        sizes = [values.get(key, 0) / 1e9 for values in arms.values()]
        axes.barh(labels, sizes, left=left, label=label, color=canvas.look(index)["color"])
        left = [a + b for a, b in zip(left, sizes)]
    peaks = [values.get("peak_device_bytes", float("nan")) / 1e9 for values in arms.values()]
    axes.plot(peaks, labels, linestyle="", marker="|", markersize=18, color="black",
              label="measured peak")  # fmt: skip
    axes.axvline(4.0, color=canvas.GREY, linestyle="--", label="cap")
    axes.invert_yaxis()
    axes.set_xlabel("GB on the device")
    canvas.legend(made, axes)
    return made


def curve(folder: Path) -> list[dict]:
    """What was held after each chunk, of a run's folder or a report's; [] where none was kept."""
    for name in ("measurements.curve.jsonl", "results.curve.jsonl"):
        if (folder / name).is_file():
            return [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return []


def longest(lines: list[dict]) -> Curves:
    """Arm -> the lines of its longest prompt."""
    most: dict[str, int] = {}
    for line in lines:
        most[line["variant"]] = max(line["tokens"], most.get(line["variant"], 0))
    return {arm: [x for x in lines if (x["variant"], x["tokens"]) == (arm, tokens)]
            for arm, tokens in most.items()}  # fmt: skip


def named(lines: list[dict], names: dict[str, str]) -> list[dict]:
    return [line | {"variant": names.get(line["variant"], line["variant"])} for line in lines]


def gathered(options: argparse.Namespace) -> tuple[list[Run], list[dict]]:
    """Runs and curves with the names of arms, and rows of how far each is from the device's run."""
    [run], lines = load([options.run]), curve(options.run)
    found = dict.fromkeys(row["variant"] for row in run.rows)
    names = dict(zip(found, options.arms.split(","), strict=True)) if options.arms else {}
    if not options.device:
        run.rows = named(run.rows, names)
        return [run], named(lines, names)
    for place, values in agreement(options.run, options.device).items():
        own = next(r for r in run.rows if (r["variant"], r["params"]["tokens"]) == place)
        run.rows += [own | {"name": name, "value": value, "unit": "", "better": "lower"}
                     for name, value in values.items()]  # fmt: skip
    [device] = load([options.device])
    twin = {row["variant"]: "fp8_device" for row in device.rows}
    run.rows, device.rows = named(run.rows, names), named(device.rows, twin)
    return [device, run], named(curve(options.device), twin) + named(lines, names)


def over_length(found: Curves):
    """Bytes and seconds against the tokens done, a line for each arm.

    A prompt's first n tokens cost what a prompt of n tokens costs, so one run shows all lengths.
    """
    made, [memory, time] = canvas.figure(2, width=8.8, height=7.4, stacked=True)
    for index, (name, rows) in enumerate(found.items()):
        done = [row["done"] / 1000 for row in rows]
        look, told = canvas.look(index) | {"marker": ""}, SAID.get(name, name)
        memory.plot(done, [r["peak_device_bytes"] / 1e9 for r in rows], label=told, **look)
        memory.plot(done, [r["cache_allocated_bytes"] / 1e9 for r in rows], alpha=0.5,
                    label="_cache", **look)  # fmt: skip
        time.plot(done, [r["seconds"] for r in rows], label=told, **look)
    memory.set(xlabel="thousand tokens", ylabel="on the device, GB: peak; pale: cache")
    memory.axhline(4.0, color=canvas.GREY, linestyle="--", label="_cap")
    memory.set_ylim(bottom=0)
    time.set(xlabel="thousand tokens", ylabel="prefill, s")
    canvas.rescale(time, "y", [r["seconds"] for rows in found.values() for r in rows])
    canvas.name_lines(memory)
    canvas.name_lines(time)
    return made


def milestones(found: Curves) -> str:
    """What was held, and how long it had taken, at round numbers of tokens."""
    lines = ["| arm | tokens | prefill, s | peak, GB | cache, GB | host, GB |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, rows in found.items():
        for wanted in (50_000, 100_000, 200_000, 500_000, 1_000_000):
            row = next((r for r in rows if r["done"] >= wanted), None)
            if row:
                sizes = (row[key] / 1e9 for key in ("peak_device_bytes", "cache_allocated_bytes",
                                                    "cache_host_bytes"))  # fmt: skip
                cells = [f"{row['done']:,}", f"{row['seconds']:.2f}", *map("{:.3f}".format, sizes)]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="Markdown that goes above the tables")
    parser.add_argument("--arms", default="", help="names of the variants, in their order")
    parser.add_argument("--device", type=Path, help="run with everything on the device")
    args = parser.parse_args()
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    runs, lines = gathered(args)
    arms = collect([row for run in runs for row in run.rows])
    parts, found = ["## All arms", table(arms)], longest(lines)
    pictures = {"account": ("The account beside the measured peak", partial(account, arms))}
    if found:
        parts += ["## Over the length", milestones(found)]
        pictures["length"] = ("Memory and time over the length", partial(over_length, found))
    with canvas.styled():
        for stem, (title, draw) in pictures.items():
            canvas.save(draw(), args.out / "figures" / stem)
            parts.append(f"## {title}\n\n![{title}](figures/{stem}.svg)")
    text = args.text.read_text() if args.text else f"# {args.out.name}"
    write_page(study(text, parts, subject(runs)), args.out)
    if args.run.resolve() != args.out.resolve():
        write_results(runs, args.out)
        told = "".join(json.dumps(line) + "\n" for line in lines)
        (args.out / "results.curve.jsonl").write_text(told)


if __name__ == "__main__":
    main()
