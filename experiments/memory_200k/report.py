"""Publish results of memory_200k or ultra_long: a table, the memory account, memory over length.

    python experiments/memory_200k/report.py results.jsonl reports/memory_200k --text README.md
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from kvlab.report import canvas
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
Arms = dict[tuple[str, int], dict[str, float]]


def collect(rows: list[dict]) -> Arms:
    """(arm, tokens) -> measurement -> value, the last line of each."""
    arms: Arms = {}
    for row in rows:
        arms.setdefault((row["variant"], row["params"]["tokens"]), {})[row["name"]] = row["value"]
    return arms


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
    made, [axes] = canvas.figure(height=0.6 + 0.42 * len(arms))
    labels = [f"{name}, {tokens // 1000}k" for name, tokens in arms]
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


def over_length(arms: Arms):
    """Peak bytes and prefill seconds against tokens, one line for each arm."""
    made, [memory, time] = canvas.figure(2, width=9.5, height=3.8)
    for index, name in enumerate(dict.fromkeys(name for name, _ in arms)):
        points = sorted((n, v) for (arm, n), v in arms.items() if arm == name)
        for axes, key, unit in ((memory, "peak_device_bytes", 1e9), (time, "prefill_seconds", 1)):
            found = [(n / 1000, v[key] / unit) for n, v in points if key in v]
            axes.plot(*zip(*found) if found else ([], []), label=name, **canvas.look(index))
    memory.set(xlabel="thousand tokens", ylabel="peak on the device, GB", ylim=(0, 4.2))
    memory.axhline(4.0, color=canvas.GREY, linestyle="--")
    time.set(xlabel="thousand tokens", ylabel="prefill, s")
    canvas.rescale(time, "x", [n / 1000 for _, n in arms])
    canvas.rescale(time, "y", [v.get("prefill_seconds", 1.0) for v in arms.values()])
    canvas.legend(made, memory)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="Markdown that goes above the tables")
    args = parser.parse_args()
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    arms = collect(read_rows(args.results)[0])
    parts = [args.text.read_text().strip()] if args.text else []
    pictures = {"account": ("The account beside the measured peak", account)}
    if len({tokens for _, tokens in arms}) > 1:
        pictures["length"] = ("Memory and time over the length", over_length)
    parts += ["## All arms", table(arms)]
    with canvas.styled():
        for stem, (title, draw) in pictures.items():
            canvas.save(draw(arms), args.out / "figures" / stem)
            parts.append(f"## {title}\n\n![{title}](figures/{stem}.svg)")
    (args.out / "README.md").write_text("\n\n".join(parts) + "\n")
    if args.results.resolve() != (args.out / "results.jsonl").resolve():
        shutil.copy(args.results, args.out / "results.jsonl")


if __name__ == "__main__":
    main()
