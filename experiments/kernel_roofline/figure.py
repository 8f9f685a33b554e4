"""reports/kernel_roofline/figures/decode.svg from results.jsonl: time beside the bytes' limit; and
index.html from the README.md there.

    python experiments/kernel_roofline/figure.py reports/kernel_roofline
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvlab.report import write_page
from kvlab.report.canvas import COLOURS, GREY, figure, save, styled
from kvlab.track import read_rows

PLACES = {(1, 200_000): "batch 1, 200,000 tokens", (16, 32_768): "batch 16, 32,768 tokens each"}
PEERS = {"cudnn bf16": "cuDNN bf16", "flash bf16": "FlashAttention-2 bf16",
         "flashinfer bf16": "FlashInfer bf16", "flashinfer fp8": "FlashInfer fp8"}
OURS = ["bf16 block 64", "fp8 block 128", "int8 block 128", "k8v4 block 128", "int4 block 128",
        "k4v2 block 128", "int3 block 128", "int2 block 128"]


def value(rows: list[dict], variant: str, name: str, place: tuple[int, int]) -> float:
    return next(r["value"] for r in rows if r["variant"] == variant and r["name"] == name
                and (r["params"].get("batch"), r["params"].get("tokens")) == place)


def panel(axes, rows: list[dict], place: tuple[int, int], ceiling: float) -> None:
    """A bar each for the time, and a tick where a copy would have moved its bytes."""
    names = [*PEERS, *OURS]
    for y, name in enumerate(reversed(names)):
        us = value(rows, name, "decode_attention_us", place)
        limit = value(rows, name, "moved_bytes", place) / ceiling / 1e3
        axes.barh(y, us, color=GREY if name in PEERS else COLOURS[0])
        axes.plot([limit, limit], [y - 0.42, y + 0.42], color=COLOURS[1], linewidth=2)
        axes.annotate(f"{us:.0f}", (max(us, limit), y), xytext=(5, 0), va="center",
                      textcoords="offset points")
    labels = [PEERS.get(n, n.replace(" block ", ", block ")) for n in reversed(names)]
    axes.set_yticks(range(len(names)), labels)
    axes.set(title=PLACES[place], xlabel="µs of one layer ↓", ylim=(-0.6, None))
    axes.set_xlim(0, 1.2 * max(axes.get_xlim()[1], 1.0))  # room for the numbers at the ends
    axes.grid(visible=False, axis="y")


def main(folder: Path) -> None:
    rows, _ = read_rows(folder / "results.jsonl")
    ceiling = next(r["value"] for r in rows if r["name"] == "copy_gigabytes_per_second")
    (folder / "figures").mkdir(exist_ok=True)
    with styled():
        drawn, axes = figure(len(PLACES), width=11, height=4.6)
        for one, place in zip(axes, PLACES):
            panel(one, rows, place, ceiling)
        drawn.suptitle("Decode attention: grey others, blue kvlab; the mark is its bytes at the "
                       f"rate of a copy ({ceiling:,.0f} GB/s)", fontsize=10)
        save(drawn, folder / "figures" / "decode")
    page = folder / "README.md"  # written by hand
    if page.is_file():
        write_page(page.read_text(encoding="utf-8"), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
