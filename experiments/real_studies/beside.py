"""What the stand-in says beside real models: a block for each of its studies.

    python experiments/real_studies/beside.py [reports]

Reads committed reports and writes, between two marks, a sentence and a table of the compositions
that both studied into the author's text (experiments/NAME/README.md) and the page of the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from studies import ROOT

from kvlab.report import Book
from kvlab.report.names import interval

MARKS = ("<!-- beside real models: python experiments/real_studies/beside.py -->",
         "<!-- end of what real models say -->")  # fmt: skip
PAIRS = {  # study of the stand-in -> of real models, runs by model
    "quickstart": "real_formats_long", "formats": "real_formats_long",
    "axes_quality": "real_axes", "eviction_quality": "real_eviction",
    "window_quality": "real_windows", "summary_quality": "real_summaries",
    "retrieval_quality": "real_retrieval", "outliers": "real_outliers", "pareto": "real_pareto",
}
RUNS = {"smollm2-135m": "SmolLM2-135M", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}
KEYS = ("format", "policy", "summary", "retrieval", "offload", "window.sinks", "window.rerotate",
        "retrieval.budget_tokens", "format.key.axis", "format.value.axis", "format.sinks")


def composition(params: dict) -> tuple | None:
    """What makes two rows the same cache but for blocks, chunks and text; None for a control."""
    if "control" in params or params.get("baseline") or params.get("cache.evict") == "block":
        return None
    budget = params.get("cache.budget_percent", params.get("budget_percent"))
    recent = None if params.get("policy") else params.get("window.recent")
    own = {key: params.get(key) for key in KEYS}
    own["window.sinks"] = own["window.sinks"] if own["window.sinks"] != 4 else None
    return (*own.values(), budget and float(budget), recent)


def losses(book: Book, report: str, **wanted) -> dict[tuple, dict]:
    found = {}
    for row in book.find(report, "kl_mean_nats", **wanted):
        key = composition(row["params"])
        if key is not None:
            found.setdefault(key, row)
    return found


def block(book: Book, stand_in: str, real: str) -> str:
    """Markdown; "" where no real model was measured."""
    theirs = {name: losses(book, real, run=run) for run, name in RUNS.items()}
    theirs = {name: rows for name, rows in theirs.items() if rows}
    own = losses(book, stand_in)
    if not theirs:
        return ""
    both = [key for key in own if any(key in rows for rows in theirs.values())]
    link = f"[{real}](../../reports/{real}/README.md)"
    told = (f"**The stand-in and real models.** These numbers are of the bundled model of 13.8 "
            f"million parameters; they rank methods and do not say what one costs. {link} has the "
            f"same question on {' and '.join(theirs)}.")  # fmt: skip
    if not both:
        return told
    heads = ("KL mean, nats; texts, chunks and blocks differ", "stand-in", *theirs)
    lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for key in both:
        cells = [_told(rows.get(key)) for rows in (own, *theirs.values())]
        lines.append((own[key]["variant"], *cells))
    return f"{told}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(row: dict | None) -> str:
    if row is None:
        return ""
    return interval(row["value"], row["low"], row["high"]) if row["low"] is not None else (
        f"{row['value']:.2g}")


def place(page: Path, made: str) -> None:
    """Between the marks, or at the end of a page that has none yet."""
    text = page.read_text(encoding="utf-8").rstrip()
    made = f"{MARKS[0]}\n\n{made}\n\n{MARKS[1]}"
    begin, end = (text.find(mark) for mark in MARKS)
    if begin >= 0:
        text = text[:begin] + made + text[end + len(MARKS[1]) :]
    else:
        text = f"{text}\n\n{made}"
    page.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "reports"
    book = Book(folder)
    for stand_in, real in PAIRS.items():
        made = block(book, stand_in, real)
        pages = (ROOT / "experiments" / stand_in / "README.md", folder / stand_in / "README.md")
        for page in pages if made else ():
            if page.is_file():
                place(page, made)
                print(page, flush=True)


if __name__ == "__main__":
    main()
