"""The results of axes_quality in one short table: a line for each axis at each factor.

    python experiments/axes_quality/table.py RUN

RUN: a run folder or `reports/axes_quality`. Bytes are those of blocks in use at the end, entries
and scales included, digests not. *beats* and *loses to* name the controls that lie outside the
paired 95 % interval, in KL and in recall.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvlab.report.entries import Entry, entries
from kvlab.report.names import CONTROLS
from kvlab.report.source import load

HEAD = ("| variant | bytes | perplexity, % | KL, nats | KL, decoded tokens | recall, points | "
        "beats | loses to |")  # fmt: skip


def interval(entry: Entry, name: str, form: str) -> str:
    row = entry.rows.get(name)
    if row is None or row["low"] is None:
        return "" if row is None else form.format(row["value"])
    return "{} [{}, {}]".format(*(form.format(row[key]) for key in ("value", "low", "high")))


def against(entry: Entry, better: bool) -> str:
    """Controls that the entry beats (or loses to) for sure, by what was compared."""
    found = []
    for name, sign, label in (("kl_minus_{}_nats", -1, "KL"),
                              ("needle_recall_minus_{}_points", 1, "recall")):  # fmt: skip
        rows = {c: entry.rows.get(name.format(c)) for c in CONTROLS}
        ends = {c: [sign * r["low"], sign * r["high"]] for c, r in rows.items()
                if r is not None and r["low"] is not None}  # fmt: skip
        sure = [c for c, e in ends.items() if (min(e) > 0 if better else max(e) < 0)]
        found += [f"{label}: {', '.join(sure)}"] if sure else []
    return "; ".join(found)


def line(entry: Entry) -> str:
    full = entry.baseline.value("cache_logical_bytes") if entry.baseline else None
    share = entry.value("cache_logical_bytes") / full if full else float("nan")
    cells = [
        " ".join(word for word in entry.variant.split() if not word.startswith("retrieval.")),
        f"1/{1 / share:.1f}",
        interval(entry, "perplexity_delta_percent", "{:.2f}"),
        interval(entry, "kl_mean_nats", "{:.4f}"),
        interval(entry, "kl_decoded_mean_nats", "{:.4f}"),
        interval(entry, "needle_recall_delta_points", "{:.0f}"),
        against(entry, True), against(entry, False),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main():
    found = [e for e in entries(load([Path(arg) for arg in sys.argv[1:]])) if not e.control]
    print(HEAD + "\n|" + "---|" * HEAD.count("|", 1))
    for entry in found:
        if not entry.is_baseline and entry.value("cache_logical_bytes"):
            print(line(entry))


if __name__ == "__main__":
    main()
