"""The page of a report as Markdown: what to take away first, then what it rests on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kvlab.report.figures import Drawing
from kvlab.report.source import Run
from kvlab.report.subject import titled
from kvlab.report.tables import Table
from kvlab.report.verdict import authors, without_verdict

METHOD = (
    "↑ higher is better, ↓ lower is better. [low, high] is a 95 % interval; a loss without one "
    "rests on too few texts to have one, or has no noise."
)
RATIO = (
    " (×) is the ratio to the baseline's allocated bytes; a variant that does not get below 1 "
    "carries the note “no bytes saved”."
)
LONG = 24  # lines: a longer table goes to the appendix
ALL = "python -m kvlab.report FOLDER --figures all"


@dataclass
class Page:
    """What a report says, before it is written down. `verdict` and `text` are Markdown.

    tables: those that decide, short. appendix: the long ones. left: figures that were not drawn.
    about: model, data, documents and tokens in words.
    """

    title: str
    text: str
    runs: list[Run]
    tables: list[Table]
    figures: list[Drawing]
    about: str = ""
    verdict: str = ""
    appendix: list[Table] = field(default_factory=list)
    left: int = 0

    @property
    def banners(self) -> list[str]:
        said = {
            "random": "random weights: memory and speed only",
            "reference": "reference model (small, bundled with kvlab)",
        }
        found = []
        for kind, sentence in said.items():
            runs = [run.label for run in self.runs if run.weights == kind]
            which = "" if len(runs) == len(self.runs) else f" ({', '.join(runs)})"
            found += [f"{sentence}{which}"] if runs else []
        loaded = [run.label for run in self.runs if run.loaded]
        which = "" if len(loaded) == len(self.runs) else f" ({', '.join(loaded)})"
        said = f"speeds{which} were measured beside other work: not to be compared"
        return found + [said] * bool(loaded)

    @property
    def origins(self) -> Table:
        """Where each run comes from."""
        table = Table("Runs")
        for heading, told in (
            ("run", lambda run: run.name),
            ("settings", lambda run: run.label if run.label != run.name else ""),
            ("commit", lambda run: run.commit),
            ("date", lambda run: str(run.environment.get("date", ""))),
            ("device", lambda run: run.device),
            ("command", lambda run: str(run.environment.get("command", ""))),
            ("software", _software),
            ("resumed from", _earlier),
        ):
            table.column(heading, [told(run) for run in self.runs], numeric=False)
        return table


def _software(run: Run) -> str:
    known = run.environment.get("versions") or {}
    shown = [
        f"{name} {known[name]}" for name in ("kvlab", "torch", "transformers") if name in known
    ]
    return ", ".join(shown)


def _earlier(run: Run) -> str:
    """Starts whose rows a resumed run kept."""
    starts = run.environment.get("earlier") or []
    return "; ".join(f"{s.get('date')} at {str(s.get('commit'))[:12]}" for s in starts)


def _method(tables: list[Table]) -> str:
    """How to read the tables."""
    return METHOD + RATIO * any("×)" in cell for t in tables for row in t.cells for cell in row)


def markdown_page(page: Page) -> str:
    """Title, verdict and short tables; figures; the author's text; long tables and origins."""
    about = f"Measured: {md(page.about)}." if page.about else ""
    parts = [f"# {md(page.title)}", about] + [f"> **{md(banner)}**" for banner in page.banners]
    parts += [f"**Verdict.** {page.verdict}"] if page.verdict else []
    for table in page.tables:
        parts += [f"## {md(table.title)}", markdown_table(table)]
        parts += [_method([table])] if table is page.tables[0] else []
    for figure in page.figures:
        parts += illustration(figure.stem, figure.title, figure.caption)
    if page.left:
        some = "One more figure is" if page.left == 1 else f"{page.left} more figures are"
        parts.append(f"{some} drawn by `{ALL}`.")
    text, long = without_long_tables(_lower(page.text))
    parts += ["## Question, method and findings", text] if text else []
    parts += ["## Appendix", *long]
    for table in [*page.appendix, page.origins]:
        parts += [f"### {md(table.title)}", markdown_table(table)]
    if page.appendix and not page.tables:
        parts.append(_method(page.appendix))
    return "\n\n".join(filter(None, parts)) + "\n"


def study(text: str, parts: list[str], about: str = "") -> str:
    """A page of Markdown around an author's text: its heading and verdict, then `parts` (figures,
    tables), then the rest of the text. about: what was measured, for the heading."""
    title, rest = heading(text.strip())
    own = authors(rest)
    first = [f"# {titled(title, md(about))}", *([f"**Verdict.** {own}"] if own else [])]
    left = _lower(without_verdict(rest))
    last = ["## Question, method and findings", left] if left else []
    return "\n\n".join(filter(None, [*first, *parts, *last])) + "\n"


def heading(text: str) -> tuple[str, str]:
    """The first line of an author's text where that is a heading, and what follows."""
    found = re.match(r"#\s+(.+)(?:\n+|\Z)", text)
    return (found[1].strip(), text[found.end() :].strip()) if found else ("", text)


def _lower(text: str) -> str:
    """Headings of an author's text become those of a section; comments of code blocks stay."""
    lines, inside = [], False
    for line in text.split("\n"):
        inside ^= line.startswith("```")
        deeper = "" if inside else "##" if line.startswith("# ") else "#" * line.startswith("## ")
        lines.append(deeper + line)
    return "\n".join(lines)


def without_long_tables(text: str) -> tuple[str, list[str]]:
    """An author's text, and its tables of more than `LONG` lines, which go to the appendix."""
    long: list[str] = []

    def moved(found: re.Match) -> str:
        if found[0].count("\n") - 2 <= LONG:
            return found[0]
        long.append(f"### Table {len(long) + 1} of the findings\n\n{found[0].strip()}")
        return f"Table {len(long)} is in the appendix.\n"

    return re.sub(r"(?:^\|.*(?:\n|\Z))+", moved, text, flags=re.M), long


def illustration(stem: str, title: str, caption: str) -> list[str]:
    """A figure with its heading and its caption, as paragraphs of Markdown."""
    return [f"## {md(title)}", f"![{md(title)}](figures/{stem}.svg)", md(caption)]


def markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [[md(c) for c in table.headings], rule, *([md(c) for c in r] for r in table.cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def md(text: str) -> str:
    """Text that Markdown shows as it is."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_|<>#~&]|(?<=\])\()", r"\\\1", one_line)
