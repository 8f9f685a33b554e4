"""Write a report: everything is read and checked before the first file is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from kvlab.core import BadInput
from kvlab.report import canvas, operate
from kvlab.report.entries import Entry, entries
from kvlab.report.figures import drawings
from kvlab.report.frontier import frontier_table
from kvlab.report.page import Page, html_page, markdown_page
from kvlab.report.scores import score_tables
from kvlab.report.source import Run, curve_file, load
from kvlab.report.tables import Table, failures, families, summary
from kvlab.track import encode, plain


def write_report(
    run_dirs: str | Path | list[str | Path], out_dir: str | Path, *, title: str = "", text: str = ""
) -> Path:
    """Make a report of runs and return the path of its README.md.

    run_dirs: run folders, sweep folders, or folders with a results.jsonl (another report).
    text: Markdown paragraphs (question, method, verdict) that go above the tables.

    Writes README.md, index.html (self-contained), figures/*.svg and *.png, and what the report can
    be rebuilt from: results.jsonl, environments.json and the curves. Raises BadInput for results
    that are missing, empty or broken, and for a folder that cannot be written.
    """
    runs = load([run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs))
    out = Path(out_dir)
    rows = [row for run in runs for row in run.rows]
    everything = entries(runs)
    page = Page(
        title=title or _title(runs),
        text="\n\n".join([*operate.advice(rows), *([text] if text else [])]),
        runs=runs,
        tables=_tables(rows, everything),
        figures=drawings(everything, runs),
    )
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        _draw(page, out / "figures")
        _results(runs, out)
        readme = out / "README.md"
        readme.write_text(markdown_page(page), encoding="utf-8")
        (out / "index.html").write_text(html_page(page, out / "figures"), encoding="utf-8")
    except OSError as error:
        raise BadInput("out", out, f"cannot be written ({error.strerror})") from None
    return readme


def _tables(rows: list[dict], everything: list[Entry]) -> list[Table]:
    if operate.is_operators(rows):
        return [*operate.tables(rows), *failures(everything)]
    return [*frontier_table(everything), summary(everything), *failures(everything),
            *score_tables(everything), *families(everything)]  # fmt: skip


def _title(runs: list[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _draw(page: Page, folder: Path) -> None:
    """All figures; those of an earlier report here that are drawn no longer go away."""
    before = folder.parent / "README.md"
    earlier = before.read_text(encoding="utf-8") if before.is_file() else ""
    for stem in re.findall(r"\(figures/([\w-]+)\.svg\)", earlier):
        for suffix in (".svg", ".png"):
            (folder / f"{stem}{suffix}").unlink(missing_ok=True)
    with canvas.styled():
        for drawing in page.figures:
            canvas.save(drawing.draw(), folder / drawing.stem)


def _results(runs: list[Run], out: Path) -> None:
    """Measurement lines that say themselves where they come from, and what else a rebuild needs."""
    lines, origins = [], {}
    for run in runs:
        commit = str(run.environment.get("commit") or "unknown")
        commit += "-dirty" if run.environment.get("dirty") else ""
        origin = {"run": run.name, "commit": commit, "device": run.device}
        lines += [encode({**row, "params": {**row["params"], **origin}}) for row in run.rows]
        origins[run.name] = {**run.environment, "label": run.label, "weights": run.weights}
        if run.curves:
            np.savez_compressed(out / curve_file(run.name), **run.curves)
    (out / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    told = json.dumps(plain(origins), indent=1, ensure_ascii=False)
    (out / "environments.json").write_text(told + "\n", encoding="utf-8")
