"""The front page of a folder of reports: `python -m kvlab pages reports`.

Writes FOLDER/README.md, FOLDER/index.html (one file, figures inside), FOLDER/figures, and the
block between two marks in the README.md beside FOLDER, where it has them. Nothing is measured and
no model is loaded: shapes are those of two configurations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from kvlab.advice.decision import (
    CONTEXT,
    HEADS,
    SHORT,
    Line,
    decisions,
    figure,
    part_rows,
)
from kvlab.advice.table import losses, measured
from kvlab.advice.transfer import elsewhere
from kvlab.core import BadInput
from kvlab.model import outline
from kvlab.report import Book, draw_all, markdown_table, pictures, write_page

COMMAND = "python -m kvlab pages reports"
AGAIN = "python experiments/front_page/rebuild.py"
MARKS = (f"<!-- decision table: {COMMAND} -->", "<!-- end of the decision table -->")
DIGESTS = "drawn.json"  # what each figure was drawn from: bytes of a figure vary by version


def write_front(words: Sequence[str], configs: dict) -> Path:
    """The page of the folder of reports that `words` name (one word; default `reports`); the path
    of its README.md. Raises BadInput for a folder without reports.

    configs: name -> configuration of a model of transformers, for whose shapes the tables are; the
    first one's table goes into the README.md beside the folder.
    """
    if len(words) > 1:
        raise BadInput("pages", " ".join(words), "name one folder of reports")
    folder = Path(words[0] if words else "reports")
    book = Book(folder)
    made = {name: outline(config) for name, config in configs.items()}
    tables = {name: decisions(name, model, book) for name, model in made.items()}
    heads = {name: f"## The shapes of {name}: weights {model.parameters * 2 / 1e9:.3g} GB in 16 "
                   "bits" for name, model in made.items()}  # fmt: skip
    shown = pictures(book)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    draw_all(shown, figures)
    digests = json.dumps({p.stem: p.digest for p in shown}, indent=1)
    (figures / DIGESTS).write_text(digests + "\n", encoding="utf-8")
    parts = [_opening(book)]
    for name, lines in tables.items():
        parts += [heads[name], _table(lines, HEADS)]
    for p in shown:
        parts += [f"## {p.title}", f"![{p.title}](figures/{p.stem}.svg)",
                  f"{p.caption} Measured again: `{AGAIN} {p.stem}`."]  # fmt: skip
    parts += [_method(), _reports(book), f"## {book.table().title}", _rows(),
              markdown_table(book.table())]  # fmt: skip
    page = write_page("\n\n".join(parts) + "\n", folder)
    _fill(folder.resolve().parent / "README.md", decisions_of_readme(made, book, folder.name))
    return page


def decisions_of_readme(made: dict, book: Book, folder: str) -> str:
    """The table of the first model, short, with links from one folder above; numbers go without
    their rows there."""
    name = next(iter(made))
    lines = decisions(name, made[name], book, f"{folder}/")
    plain = [Line(x.goal, x.memories, [_uncited(cell) for cell in x.cells]) for x in lines]
    told = (f"One request of {CONTEXT:,} tokens on {name}'s shapes; each number has its row, run, "
            f"commit and interval in [{folder}]({folder}/README.md):")  # fmt: skip
    return f"{told}\n\n{_table(plain, SHORT)}"


def _uncited(cell: str) -> str:
    return re.sub(r" \[\\\[\d+\\\]\]\(#[^)]*\)", "", cell)


def _fill(readme: Path, block: str) -> None:
    """What lies between the marks of a README; one without marks stays as it is."""
    if not readme.is_file():
        return
    text = readme.read_text(encoding="utf-8")
    begin, end = (text.find(mark) for mark in MARKS)
    if begin >= 0 and end > begin:
        text = f"{text[: begin + len(MARKS[0])]}\n\n{block}\n\n{text[end:]}"
        readme.write_text(text, encoding="utf-8")


def _table(lines: list[Line], heads: tuple[str, ...]) -> str:
    """Cells are Markdown already: flags in code, links."""
    rows = [heads, ["---"] * len(heads), *(line.told(heads) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _opening(book: Book) -> str:
    bounds = {bits: max(row.perplexity.high for row in losses() if row.options == (bits,))
              for bits in ("format=int8", "format=int4")}  # fmt: skip
    return (
        "# Which cache for which goal\n\n"
        f"**Verdict.** On the two real models measured, 8 bits (`format=int8`) change perplexity "
        f"by at most {bounds['format=int8']:.2f} % at the upper end of the interval, and 4 bits "
        f"(`format=int4`) by {bounds['format=int4']:.2f} %. Where even these do not fit, blocks "
        "go to host memory: nothing is forgotten, and decoding slows to a few tokens a second; a "
        f"window is fast and forgets, and {_window(book)}.\n\n"
        f"One request of {CONTEXT:,} tokens. For your own model, memory and length:\n\n"
        f"    python -m kvlab advise model=... device.memory_gb=16 context={CONTEXT}")


def _window(book: Book) -> str:
    rows = part_rows(book, "window")
    if rows is None:
        return "what that costs on a real model was not measured"
    tokens = rows[0]["params"]["tokens"]
    return (f"with the newest 4,092 of {tokens:,} tokens the model that loses more changes by "
            f"{figure(rows[0]).told('+.2f')} % of perplexity")


def _rows() -> str:
    return ("What the numbers in square brackets stand for. `[low, high]` is the 95 % interval; a "
            "value without one is a count of bytes or one measured time.")  # fmt: skip


def _method() -> str:
    sources = []
    for name in dict.fromkeys(row.model for row in losses()):
        row = next(row for row in losses() if row.model == name)
        sources.append(f"- {name}: {row.setting}; {row.device}, commit {row.commit}.")
    return "\n".join([
        "## The method", "",
        "Every variant reads the same tokens in lockstep with the full cache, so losses are paired "
        "differences: perplexity and KL of the next token against the full cache's, 95 % intervals "
        "over documents. The table tells those of the format alone, on the model that loses more "
        "by KL, measured on models that are smaller than these:", "",
        *sources, "",
        _other_models(), "",
        "Bytes are those of the pool's planes and slabs: the same account gives the allocated "
        "bytes of the rows cited to the byte. `in all` adds weights in 16 bits, the workspace, a "
        "chunk of prefill, and an eighth that stays free. A GB is 10^9 bytes. Formats whose "
        "interval reaches 5 % are not in the table. Speeds are of one request with random weights "
        "of Qwen3-0.6B's shapes, at the first measured length that is no shorter; those of other "
        "shapes, and of formats without a row, were not measured.", "",
        "Made by this command from the results in this folder, and tested to be current:", "",
        f"    {COMMAND}",
    ])  # fmt: skip


def _other_models() -> str:
    """How far these losses carry."""
    told = [f"{bits} {there.told()}" for bits in ("int8", "int4") if (
        there := elsewhere(measured((f"format={bits}",))))]  # fmt: skip
    return ("Intervals over documents say nothing of other models. By how much these models differ "
            f"over all formats, a model that was not measured loses (95 %): {'; '.join(told)}. "
            "`advise` tells it of each format.")  # fmt: skip


def _reports(book: Book) -> str:
    """Every report with the first line of its page."""
    lines = []
    for name in book.reports:
        page = book.folder / name / "README.md"
        if page.is_file():
            first = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()
            lines.append(f"- [{name}]({name}/README.md): {first}")
    return "\n".join(["## All reports", "", *lines])
