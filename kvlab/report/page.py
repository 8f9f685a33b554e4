"""The page of a report as Markdown and as self-contained HTML, part for part the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kvlab.report.figures import Drawing
from kvlab.report.source import Run
from kvlab.report.tables import Table

METHOD = (
    "↑ higher is better, ↓ lower is better. [low, high] is a 95 % interval; a loss without one "
    "rests on too few texts to have one, or has no noise."
)
RATIO = (
    " (×) is the ratio to the baseline's allocated bytes; a variant that does not get below 1 "
    "carries the note “no bytes saved”."
)
STYLESHEET = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1100px;
margin:2em auto;padding:0 1em}
h1{font-size:1.7em}h2{font-size:1.25em;margin-top:2em}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.6em 0;font-variant-numeric:tabular-nums}
th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{border-bottom:2px solid #888}td.n,th.n{text-align:right;white-space:nowrap}
figure{margin:1.5em 0}figure svg{max-width:100%;height:auto}
figcaption,.note{color:#555;font-size:.92em}
.banner{background:#fff3cd;border-left:5px solid #d39e00;padding:.6em 1em;font-weight:600}
code{background:#f4f4f4;padding:.1em .3em;overflow-wrap:anywhere}
"""


@dataclass
class Page:
    """What a report says, before it is written down. `text` is Markdown from the author."""

    title: str
    text: str
    runs: list[Run]
    tables: list[Table]
    figures: list[Drawing]

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


def _method(table: Table) -> str:
    """How to read the first table."""
    return METHOD + RATIO * any("×)" in cell for row in table.cells for cell in row)


def markdown_page(page: Page) -> str:
    parts = [f"# {_md(page.title)}"]
    parts += [f"> **{_md(banner)}**" for banner in page.banners]
    parts += [page.text] if page.text else []
    for table in page.tables:
        parts += [f"## {table.title}", _markdown_table(table)]
        parts += [_method(table)] if table is page.tables[0] else []
    for figure in page.figures:
        image = f"![{_md(figure.title)}](figures/{figure.stem}.svg)"
        parts += [f"## {_md(figure.title)}", image, _md(figure.caption)]
    parts += ["## Runs", _markdown_table(page.origins)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [[_md(c) for c in table.headings], rule, *([_md(c) for c in r] for r in table.cells)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_|<>#~])", r"\\\1", one_line)


def html_page(page: Page, figures: Path) -> str:
    title = escape(page.title)
    parts = [f"<h1>{title}</h1>"]
    parts += [f'<p class="banner">{escape(banner)}</p>' for banner in page.banners]
    parts += [f"<p>{escape(part)}</p>" for part in page.text.split("\n\n") if part]
    for table in page.tables:
        parts += [f"<h2>{escape(table.title)}</h2>", _html_table(table)]
        note = f'<p class="note">{escape(_method(table))}</p>'
        parts += [note] if table is page.tables[0] else []
    for figure in page.figures:
        svg = _inline((figures / f"{figure.stem}.svg").read_text(encoding="utf-8"), figure)
        caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
        parts += [f"<h2>{escape(figure.title)}</h2>", f"<figure>{svg}{caption}</figure>"]
    parts += ["<h2>Runs</h2>", _html_table(page.origins)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLESHEET}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    kinds = [' class="n"' if numeric else "" for numeric in table.numeric]
    head = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, table.headings))
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{escape(c)}</td>' for k, c in zip(kinds, row))}</tr>\n"
        for row in table.cells
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _inline(svg: str, figure: Drawing) -> str:
    """An SVG file as an element: no prolog, a name for readers of the page, ids of its own.

    Several figures share one document, so their ids (clip paths, glyphs) must not meet.
    """
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    own = re.sub(r"\W", "_", figure.stem)
    element = re.sub(r'\bid="', f'id="{own}-', element)
    element = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}-", element)
    name = escape(f"{figure.title}. {figure.caption}", quote=True)
    return element.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
