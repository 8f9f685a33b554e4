"""The fewest bits an element at a bounded loss, for formats alone and for everything measured.

    python experiments/pareto/smallest.py RUN [RUN ...] [--loss 2]

RUN: run folders or reports (`reports/formats`, a search). A bit is counted for each element of
each token *seen*: bytes of the blocks in use, scales included, over tokens seen; so eviction counts
as fewer bits. A composition passes where its perplexity change does not exceed the loss, and passes
for sure where the upper end of the 95 % interval does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from kvlab.report.entries import Entry, entries
from kvlab.report.source import load

BITS, LOSS, BYTES = "bits_per_element", "perplexity_delta_percent", "cache_logical_bytes"
LOSSY = ("policy", "window", "summary", "retrieval", "cache.budget_percent")


def bits_seen(entry: Entry) -> float | None:
    """Bits for each element of each token seen, from blocks in use."""
    needed = (BITS, BYTES, "cache_allocated_bytes", "resident_tokens_percent")
    if any(entry.value(name) is None for name in needed):
        return None
    held = entry.value(BITS) * entry.value(BYTES) / entry.value("cache_allocated_bytes")
    return held * entry.value("resident_tokens_percent") / 100


def format_alone(entry: Entry) -> bool:
    """Whether nothing but the format saves bytes."""
    params = next(iter(entry.rows.values()))["params"]
    return not any(key.startswith(LOSSY) for key in params)


def smallest(found: Iterable[Entry], loss: float, sure: bool) -> Entry | None:
    """The entry of fewest bits whose loss (`sure`: its interval's end) stays within `loss` %."""
    end = "high" if sure else "value"
    passed = [
        e for e in found
        if LOSS in e.rows and bits_seen(e) and e.rows[LOSS][end] is not None
        and e.rows[LOSS][end] <= loss
    ]
    return min(passed, key=bits_seen, default=None)


def line(title: str, entry: Entry | None) -> str:
    if entry is None:
        return f"| {title} | none | | | |"
    row = entry.rows[LOSS]
    interval = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return f"| {title} | {entry.variant} | {bits_seen(entry):.2f} | {interval} | {entry.run.name} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--loss", type=float, default=2.0, help="percent of perplexity")
    told = parser.parse_args()
    found = [e for e in entries(load(told.runs)) if not e.is_baseline and not e.control]
    alone = [e for e in found if format_alone(e)]
    print(f"At most {told.loss:g} % loss of perplexity, {len(found)} compositions measured.\n")
    print("| | smallest | bits per element seen | perplexity change, % | run |")
    print("|---|---|---:|---:|---|")
    for title, group in (("formats alone", alone), ("whole space", found)):
        print(line(title, smallest(group, told.loss, sure=False)))
        print(line(f"{title}, interval included", smallest(group, told.loss, sure=True)))


if __name__ == "__main__":
    main()
