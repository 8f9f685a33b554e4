"""The decision table of `reports/README.md`, made by what answers `python -m kvlab advise`.

    python experiments/advice/page.py --out reports/README.md

No model is loaded and nothing is measured here: bytes are formulas over the shapes of two models,
losses are rows of `kvlab/assets/advice/losses.jsonl`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvlab.advice import GOALS, Ask, Choice, advised, choices, losses, shown
from kvlab.model import Outline, outline
from kvlab.model.load import RandomModel

CONTEXT, MEMORIES = 131072, (8, 16, 24, 80)
MODELS = {
    "Qwen3-0.6B": RandomModel(),
    "Qwen3-8B": RandomModel(hidden_size=4096, layers=36, query_heads=32, kv_heads=8, head_dim=128,
                            mlp_size=12288, tied_embeddings=False),
}  # fmt: skip
REPORTS = {
    "exact": ("memory_200k", "ultra_long"),
    "facts": ("formats", "retrieval_quality"),
    "chat": ("prefix_hit_rate", "load"),
    "stream": ("endless", "window_quality"),
}
HEAD = ("goal", "memory", "flags", "cache at the end", "needed in all",
        "perplexity, %", "KL, nats", "forgets", "reports")  # fmt: skip


def page() -> str:
    """Markdown, whole."""
    parts = [_opening(), *(_section(name, model) for name, model in MODELS.items()), _notes()]
    return "\n\n".join(parts) + "\n"


def _opening() -> str:
    worst = max((row for row in losses() if row.options == ("format=int8",)),
                key=lambda row: row.perplexity.high)  # fmt: skip
    small = max((row for row in losses() if row.options == ("format=int4",)),
                key=lambda row: row.perplexity.high)  # fmt: skip
    return (
        "# Which cache for which goal\n\n"
        f"On the two models measured, 8 bits (`format=int8`) change perplexity by at most "
        f"{worst.perplexity.high:.2f} % at the upper end of the interval, and 4 bits "
        f"(`format=int4`) by {small.perplexity.high:.2f} %. Where even these do not fit, blocks go "
        "to host memory and nothing is forgotten; a window forgets, and what that costs on a real "
        f"model is not in the table. One request of {CONTEXT:,} tokens; for your own model, "
        "memory and length:\n\n"
        f"    python -m kvlab advise model=... device.memory_gb=16 context={CONTEXT}")


def _section(name: str, model: RandomModel) -> str:
    made = outline(model.config())
    rows = [_row(goal, memory, choice) for goal in GOALS for memory in MEMORIES
            for choice in _chosen(goal, memory, made)]  # fmt: skip
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    told = f"## The shapes of {name}: weights {made.parameters * 2 / 1e9:.3g} GB in 16 bits\n\n"
    return told + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _chosen(goal: str, memory: float, model: Outline) -> list[Choice | None]:
    """With and without host memory; None where nothing fits."""
    found = advised(choices(Ask(memory, CONTEXT, goal=goal), model))
    return shown(found, Ask(memory, CONTEXT)) or [None]


def _row(goal: str, memory: float, choice: Choice | None) -> list[str]:
    reports = ", ".join(f"[{name}]({name}/README.md)" for name in REPORTS[goal])
    if choice is None:
        return [goal, f"{memory} GB", "nothing fits", "", "", "", "", "", reports]
    host = f" and {choice.end.host / 1e9:.3g} GB of host memory" if choice.end.host else ""
    return [
        goal, f"{memory} GB", f"`{' '.join(choice.options)}`",
        f"{choice.end.device / 1e9:.3g} GB{host}", f"{choice.needed / 1e9:.3g} GB",
        *_lost(choice), choice.forgets, reports,
    ]  # fmt: skip


def _lost(choice: Choice) -> tuple[str, str]:
    """Perplexity and KL on the model that loses more by KL."""
    if not choice.known:
        return "not measured", "not measured"
    rows = [row for row in choice.losses if row.kl]
    if not rows:
        return "the baseline", "the baseline"
    worst = max(rows, key=lambda row: row.kl.value)
    return worst.perplexity.told("+.2f"), worst.kl.told(".2g")


def _notes() -> str:
    sources = []
    for name in dict.fromkeys(row.model for row in losses()):
        row = next(row for row in losses() if row.model == name)
        sources.append(f"- {name}: {row.setting}; {row.device}, commit {row.commit}.")
    return "\n".join([
        "## What stands behind it", "",
        "Perplexity and KL are changes against the full cache with 95 % intervals, of the format "
        "alone and on the model that loses more by KL; every number is a row of "
        "`kvlab/assets/advice/losses.jsonl`, measured on models that are smaller than these:", "",
        *sources, "",
        "Bytes are those of the pool's planes and slabs, and equal those of these runs to the "
        "byte. `needed in all` adds weights in 16 bits, the workspace, a chunk of prefill, and an "
        "eighth that stays free. A GB is 10^9 bytes. Formats whose interval reaches 5 % are not in "
        "the table. The machine had other work, so there is no speed here: see "
        "[decode_speed](decode_speed/README.md) and [prefill_speed](prefill_speed/README.md).", "",
        "    python experiments/advice/page.py --out reports/README.md",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
