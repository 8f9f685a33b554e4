"""Write a report: everything is read and checked before the first file is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvlab.core import BadInput
from kvlab.report import canvas, operate
from kvlab.report.entries import Entry, entries
from kvlab.report.figures import drawings
from kvlab.report.frontier import frontier_table, shortlist
from kvlab.report.html import html_page
from kvlab.report.page import LONG, Page, heading, markdown_page
from kvlab.report.scores import score_tables
from kvlab.report.source import Run, curve_file, load
from kvlab.report.subject import subject, titled
from kvlab.report.tables import Table, failures, families, summary
from kvlab.report.verdict import verdict, without_verdict
from kvlab.track import encode, plain

FIGURES = 6  # of a page


def write_report(
    run_dirs: str | Path | list[str | Path], out_dir: str | Path, *, title: str = "",
    text: str = "", figures: int | None = FIGURES,
) -> Path:  # fmt: skip
    """Make a report of runs and return the path of its README.md.

    run_dirs: run folders, sweep folders, or folders with a results.jsonl (another report).
    title: of the page; "" takes the heading of `text` and says what was measured.
    text: Markdown of the author (question, method, `**Verdict.**`). figures: at most so many, those
    that say most first; None for all that the measurements allow.

    Writes README.md, index.html (self-contained), figures/*.svg and *.png, and what the report can
    be rebuilt from: results.jsonl, environments.json and the curves. Raises BadInput for results
    that are missing, empty or broken, and for a folder that cannot be written.
    """
    runs = load([run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs))
    out = Path(out_dir)
    page = _page(runs, title, text.strip(), figures)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        _draw(page, out)
        write_results(runs, out)
        return write_page(markdown_page(page), out)
    except OSError as error:
        raise BadInput("out", out, f"cannot be written ({error.strerror})") from None


def write_page(markdown: str, out: Path) -> Path:
    """README.md with that text, and index.html, the same in one file; the path of the first."""
    readme = out / "README.md"
    readme.write_text(markdown, encoding="utf-8")
    (out / "index.html").write_text(html_page(markdown, out), encoding="utf-8")
    return readme


def _page(runs: list[Run], title: str, text: str, most: int | None) -> Page:
    rows = [row for run in runs for row in run.rows]
    everything = entries(runs)
    tables, appendix = _tables(rows, everything)
    found = drawings(everything, runs)
    kept = found if most is None else found[:most]
    said = " ".join(operate.advice(rows)) or verdict(everything, rows, text)
    asked, rest = heading(text)
    about = subject(runs)
    if not title:
        title, about = titled(asked or _title(runs), about), ""
    elif asked:
        rest = f"# {asked}\n\n{rest}"
    return Page(title, without_verdict(rest), runs, tables, kept, about, said, appendix,
                len(found) - len(kept))  # fmt: skip


def _tables(rows: list[dict], everything: list[Entry]) -> tuple[list[Table], list[Table]]:
    """Those that decide, and the long ones."""
    if operate.is_operators(rows):
        return [*operate.tables(rows), *failures(everything)], []
    first = [*frontier_table(everything), *_summaries(everything), *failures(everything),
             *score_tables(everything)]  # fmt: skip
    short = [table for table in first if len(table.cells) <= LONG]
    long = [table for table in first if len(table.cells) > LONG]
    return short, [*long, *families(everything)]


def _summaries(everything: list[Entry]) -> list[Table]:
    """All that was measured, and of a long list what no other beats in front of it."""
    whole = summary(everything)
    if len(whole.cells) <= LONG:
        return [whole]
    kept = shortlist(everything)[:LONG]
    whole.title = "All that was measured"
    told = f"Summary: {len(kept)} of {len(everything)} that no other beats in bytes and loss"
    return [summary(kept, title=told), whole] if kept else [whole]


def _title(runs: list[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _draw(page: Page, out: Path) -> None:
    """All figures; those of an earlier report here that are drawn no longer go away."""
    folder, before = out / "figures", out / "README.md"
    earlier = before.read_text(encoding="utf-8") if before.is_file() else ""
    for stem in re.findall(r"\(figures/([\w-]+)\.svg\)", earlier):
        for suffix in (".svg", ".png"):
            (folder / f"{stem}{suffix}").unlink(missing_ok=True)
    draw_all(page.figures, folder)


def draw_all(figures: Iterable, folder: Path) -> None:
    """Each figure (`stem`, `draw`) as STEM.svg and STEM.png."""
    with canvas.styled():
        for drawing in figures:
            canvas.save(drawing.draw(), folder / drawing.stem)


def write_results(runs: list[Run], out: Path) -> None:
    """results.jsonl, environments.json and curves: measurement lines that say themselves where they
    come from, and what else a rebuild needs."""
    lines, origins = [], {}
    for run in runs:
        commit = str(run.environment.get("commit") or "unknown")
        commit += "-dirty" if run.environment.get("dirty") else ""
        origin = {"run": run.name, "commit": commit, "device": run.device}
        lines += [encode({**row, "params": {**row["params"], **origin}}) for row in run.rows]
        origins[run.name] = {**run.environment, "label": run.label, "weights": run.weights}
        origins[run.name] |= {"data": run.data} if run.data else {}
        if run.curves:
            np.savez_compressed(out / curve_file(run.name), **run.curves)
    (out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    told = json.dumps(plain(origins), indent=1, ensure_ascii=False)
    (out / "environments.json").write_text(told + "\n", encoding="utf-8")
