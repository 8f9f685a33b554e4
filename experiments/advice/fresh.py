"""What the advice tells of a model that it was not made on, beside a run of one.

    python experiments/advice/fresh.py RUN

RUN: a folder of `experiment=real_formats` on another model. Also each of the advice's models told
from the others alone.
"""

from __future__ import annotations

import sys

from kvlab.advice.table import Figure, Loss, formats, measured
from kvlab.advice.transfer import Elsewhere, elsewhere
from kvlab.report.source import Run, load

NAMES = {"perplexity": "perplexity_delta_percent", "kl": "kl_mean_nats"}


def line(format: str, there: Elsewhere, perplexity: Figure, kl: Figure) -> str:
    inside = [there.perplexity.low <= perplexity.value <= there.perplexity.high,
              kl.value <= there.kl.high]  # fmt: skip
    return (f"| `{format}` | {there.perplexity.low:+.1f} to {there.perplexity.high:+.1f} | "
            f"{perplexity.told('+.2f')} | {there.kl.low:.2g} to {there.kl.high:.2g} | "
            f"{kl.told('.2g')} | {'yes' if all(inside) else 'no'} |")  # fmt: skip


def fresh(run: Run) -> list[str]:
    """A line for each format that both have."""
    found: dict[str, dict[str, Figure]] = {}
    for row in run.rows:
        if row["name"] in NAMES.values() and row.get("step") is None:
            found.setdefault(row["variant"], {})[row["name"]] = Figure(
                row["value"], row["low"], row["high"])  # fmt: skip
    lines = []
    for options in formats():
        own = found.get(name(options), {})
        if (there := elsewhere(measured(options))) and len(own) == len(NAMES):
            lines.append(line(name(options), there, *(own[n] for n in NAMES.values())))
    return lines


def left_out(rows: list[Loss]) -> list[bool]:
    """Of each model's row whether what the others tell holds it."""
    held = []
    for row in rows:
        there = elsewhere([other for other in rows if other is not row])
        held.append(there.kl.low <= row.kl.value <= there.kl.high
                    and there.perplexity.low <= row.perplexity.value <= there.perplexity.high)
    return held


def name(options: tuple[str, ...]) -> str:
    return " ".join(word.removeprefix("format=") for word in options)


def main() -> None:
    [run] = load(sys.argv[1:])
    print("| format | perplexity told, % | measured | KL told, nats | measured | held |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    print("\n".join(fresh(run)))
    lossy = [measured(options) for options in formats() if all(r.kl for r in measured(options))]
    held = [one for rows in lossy for one in left_out(rows)]
    print(f"\nEach model told from the others: {sum(held)} of {len(held)} held.")


if __name__ == "__main__":
    main()
