"""The table at the end of a run."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvlab.report import tables
from kvlab.report.entries import BYTES, NO_BYTES, NO_SLAB, entries
from kvlab.report.source import Run

MARKS = (NO_BYTES, NO_SLAB)


def console_table(rows: list[dict], *, width: int = 80) -> Group:
    """Rows of measurements.jsonl as a rich table for a terminal of `width` columns, and lines below
    it.

    Columns: variant, the settings that vary, then as many measurements as fit, those that decide
    first: what was lost with its interval (perplexity, recall, the score of a task), allocated
    bytes with the ratio to the baseline, and those in use where slabs hide what was saved, KL,
    top-1 agreement, then speed and others. A variant that saves no bytes is marked with `*`; one
    that raised has the status `failed`, its reason stands below, as does what all rows share.
    """
    everything = entries([Run("run", rows)])
    candidates = (tables.summary(everything, most=most, short=True) for most in range(8, 0, -1))
    plain = next((t for t in map(_marked, candidates) if _width(t) <= width), None)
    least = 2 + any(entry.hidden for entry in everything)  # what is lost, and bytes
    plain = plain or _marked(tables.summary(everything, most=least, short=True))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    fits = _width(plain) <= width
    for heading, numeric, need in zip(plain.headings, plain.numeric, _roomy(plain, width)):
        side = "right" if numeric else "left"
        table.add_column(Text(heading), justify=side, vertical="bottom", width=need * fits or None)
    for cells in plain.cells:
        style = "yellow" if cells[0].endswith("*") else None
        table.add_row(*(Text(cell) for cell in cells), style=style)
    failed = [f"failed: {e.variant}: {e.reason}" for e in everything if e.failure]
    doubted = dict.fromkeys(f"caution: {e.variant}: {e.caution}" for e in everything if e.caution)
    told = filter(None, [_shared(rows), _caption(plain, rows)])
    return Group(table, *(Text(line, style="dim") for line in told), *map(Text, failed),
                 *map(Text, doubted))  # fmt: skip


def _shared(rows: list[dict]) -> str:
    """`trace conversation`: what the numbers are of, where it is one for all of them."""
    said = []
    for key in ("trace", "task"):
        values = {str(row["params"][key]) for row in rows if key in row["params"]}
        said += [f"{key} {value}" for value in values if len(values) == 1]
    return ", ".join(said)


def _marked(plain: tables.Table) -> tables.Table:
    """Without the column of notes; its one warning becomes a star at the variant."""
    if "notes" not in plain.headings:
        return plain
    at = plain.headings.index("notes")
    starred = [[row[0] + " *" * any(mark in row[at] for mark in MARKS), *row[1:at]]
               for row in plain.cells]  # fmt: skip
    return tables.Table(plain.title, plain.headings[:at], plain.numeric[:at], starred)


def _width(plain: tables.Table) -> int:
    widths = _widths(plain)
    return sum(widths) + 2 * len(widths) - 2


def _widths(plain: tables.Table) -> list[int]:
    """What each column needs when headings wrap between words and cells do not wrap."""
    words = [max(map(len, heading.split())) for heading in plain.headings]
    cells = [max(map(len, column)) for column in zip(*plain.cells)]
    return list(map(max, words, cells))


def _roomy(plain: tables.Table, width: int) -> list[int]:
    """The widths needed; what is left of `width` goes to headings that would wrap."""
    spare, given = width - _width(plain), []
    for need, heading in zip(_widths(plain), plain.headings):
        more = min(max(spare, 0), max(len(heading) - need, 0))
        more = more if need + more == len(heading) else 0
        spare -= more
        given.append(need + more)
    return given


def _caption(plain: tables.Table, rows: list[dict]) -> str:
    said = []
    if BYTES in {row["name"] for row in rows}:
        said.append("(×) of the baseline's bytes")
    if any(cell.endswith("]") for row in plain.cells for cell in row):
        said.append("[ ] 95 % interval")
    if any(row[0].endswith("*") for row in plain.cells):
        said.append(f"* {NO_BYTES}, or {NO_SLAB}")
    return "; ".join(said)
