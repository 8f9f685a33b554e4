"""Entries -> tables of plain text cells, which page and console write in their own ways."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvlab.report.entries import BYTES, IN_USE, Entry, names
from kvlab.report.names import FAMILIES, KNOWN, Metric, arrow, byte_unit, interval, metric, number

LOSSES = ("perplexity_delta_percent", "needle_recall_percent", "task_score_percent",
          "task_score_delta_points")  # fmt: skip
# what was lost, then what it bought
SUMMARY = (*LOSSES, BYTES, "kl_mean_nats", "top1_agreement_percent")
FILLERS = (
    *("decode_tokens_per_second", "prefill_tokens_per_second"),
    *("ttft_ms", "token_hit_percent", "block_hit_percent", "peak_device_bytes"),
)
ACROSS = 5  # measurements side by side: with intervals more than that fit on no screen


@dataclass
class Table:
    """A heading line and text cells; `numeric` says which columns are aligned to the right."""

    title: str
    headings: list[str] = field(default_factory=list)
    numeric: list[bool] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)

    def column(self, heading: str, cells: list[str], numeric: bool = True) -> None:
        """Append a column; one with nothing in it is left out."""
        if not any(cells):
            return
        self.headings.append(heading)
        self.numeric.append(numeric)
        self.cells = [[*row, cell] for row, cell in zip(self.cells or [[]] * len(cells), cells)]


def summary(
    everything: list[Entry], *, most: int = 6, short: bool = False, title: str = "Summary"
) -> Table:
    """What decides: loss, bytes, agreement, then others, up to `most` measurements.

    `short` leaves intervals to the loss alone, where there is a loss. A variant that failed is
    listed with what it has.
    """
    there = names(everything)
    wanted = dict.fromkeys([*_own(everything), *SUMMARY, *FILLERS, *there])
    chosen = [name for name in wanted if name in there][: max(most, 1)]
    if BYTES in chosen and IN_USE in there and any(entry.hidden for entry in everything):
        after = chosen.index(BYTES) + 1
        chosen = list(dict.fromkeys([*chosen[:after], IN_USE, *chosen[after:]]))[: max(most, 1)]
    kept = [e for e in everything if e.failure or any(name in e.rows for name in chosen)]
    table = _start(title, kept)
    table.column("status", [entry.status for entry in kept], numeric=False)
    for name in chosen:
        bare = short and "perplexity_delta_percent" in chosen and not name.startswith("perplex")
        _measured(table, name, kept, bare=bare)
    table.column("notes", [", ".join(entry.notes) for entry in kept], numeric=False)
    return table


def _own(everything: list[Entry]) -> list[str]:
    """What a task of the user's own measured, where nothing is known to say what was lost."""
    there = names(everything)
    if any(name in LOSSES for name in there):
        return []
    intervals = {name for entry in everything for name, row in entry.rows.items()
                 if row.get("low") is not None}  # fmt: skip
    return [name for name in there if name not in KNOWN and name in intervals]


def failures(everything: list[Entry]) -> list[Table]:
    """Which variants raised, and what; no table where none did."""
    kept = [entry for entry in everything if entry.failure]
    table = _start("Failed", kept)
    table.column("reason", [entry.reason for entry in kept], numeric=False)
    return [table] if kept else []


def families(everything: list[Entry]) -> list[Table]:
    """Every measurement: tables of a family each, of `ACROSS` measurements at most."""
    tables = []
    for family in FAMILIES:
        chosen = [n for n in names(everything) if metric(n).family == family]
        for first in range(0, len(chosen), ACROSS):
            part = chosen[first : first + ACROSS]
            kept = [entry for entry in everything if any(name in entry.rows for name in part)]
            table = _start(f"{family}, continued" if first else family, kept)
            for name in part:
                _measured(table, name, kept)
            tables.append(table)
    return tables


def labels(everything: list[Entry]) -> dict[int, str]:
    """id(entry) -> what tells it from the others: variant, run (of several), settings."""
    several = len({entry.run.name for entry in everything}) > 1
    found = {}
    for entry in everything:
        parts = [entry.run.label] * several
        parts += [f"{key}={value}" for key, value in entry.conditions.items()]
        found[id(entry)] = f"{entry.variant} ({', '.join(parts)})" if parts else entry.variant
    return found


def _start(title: str, kept: list[Entry]) -> Table:
    table = Table(title)
    table.column("variant", [entry.variant for entry in kept], numeric=False)
    if len({entry.run.name for entry in kept}) > 1:
        table.column("run", [entry.run.label for entry in kept], numeric=False)
    for key in dict.fromkeys(key for entry in kept for key in entry.conditions):
        cells = ["" if key not in e.conditions else _setting(e.conditions[key]) for e in kept]
        table.column(key.replace("_", " "), cells, numeric=False)
    return table


def _measured(table: Table, name: str, kept: list[Entry], *, bare: bool = False) -> None:
    rows = [entry.rows.get(name) for entry in kept]
    about = described(name, rows)
    scale, unit = scaling(about, [row["value"] for row in rows if row])
    heading = f"{about.heading}{f', {unit}' if unit else ''}{arrow(about.better)}"
    ends = [(None, None) if bare or not r else (r["low"], r["high"]) for r in rows]
    cells = [interval(r["value"], *e, scale) if r else "" for r, e in zip(rows, ends)]
    if name == BYTES:
        ratios = [entry.bytes_ratio for entry in kept]
        cells = [f"{c} ({r:.2f}×)" if r is not None else c for c, r in zip(cells, ratios)]
    table.column(heading, cells)


def described(name: str, rows: list[dict | None]) -> Metric:
    """The metric of a name, an unknown one told by the first of its rows."""
    first = next((row for row in rows if row), {})
    return metric(name, first.get("unit") or "", first.get("better"))


def scaling(about: Metric, values: list[float]) -> tuple[float, str]:
    """Divisor and unit of one column or axis."""
    return byte_unit(max(values, default=0)) if about.unit == "bytes" else (1.0, about.unit)


def _setting(value) -> str:
    plain_number = isinstance(value, float) or (isinstance(value, int) and abs(value) >= 10_000)
    return number(value) if plain_number and not isinstance(value, bool) else str(value)
