"""The table at the end of a run."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from kvlab.report.entries import BYTES, entries
from kvlab.report.source import Run
from kvlab.report.tables import summary


def console_table(rows: list[dict], *, most: int = 5) -> Table:
    """Rows of measurements.jsonl as a rich table for 80 columns.

    Columns: variant, the settings that vary, then up to `most` measurements, those that decide
    first: allocated bytes with the ratio to the baseline, perplexity change with its interval, KL,
    top-1 agreement. A variant that saves no bytes is marked.
    """
    plain = summary(entries([Run("run", rows)]), most=most, short=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    notes = plain.headings.index("notes") if "notes" in plain.headings else None
    for heading, numeric in zip(plain.headings, plain.numeric):
        if heading != "notes":
            table.add_column(Text(heading), justify="right" if numeric else "left")
    for cells in plain.cells:
        note = cells.pop(notes) if notes is not None else ""
        style = "yellow" if "no bytes saved" in note else None
        if style:
            cells[0] += " (no bytes saved)"
        table.add_row(*(Text(cell) for cell in cells), style=style)
    table.caption_justify = "left"
    if BYTES in {row["name"] for row in rows}:
        table.caption = "(×) of the baseline's bytes; [ ] 95 % interval"
    return table
