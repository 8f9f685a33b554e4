"""A page of Markdown as one HTML file that needs no other: figures inside, no script, no request.

Every page of kvlab is written in Markdown first, and this is the only writer of HTML. A table that
is wider than the window becomes a list of cards, a heading beside each value, so nothing is cut.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

LETTER, PADDING = 7.5, 17.0  # px of a letter and around a cell, at the stylesheet's size of tables
CODE, FRAME = 8.0, 10.0  # px of a letter of code and around it
WORDS, LONGEST = 16, 28  # letters that a column of words gets at least, and at most
STYLESHEET = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1240px;
margin:2em auto;padding:0 1em;overflow-wrap:break-word}
h1{font-size:1.6em;line-height:1.25}h2{font-size:1.25em;margin-top:2em}h3{font-size:1.05em}
p,ul,blockquote,pre{max-width:60em}
.wide{container-type:inline-size;margin:.6em 0}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.35em .6em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{border-bottom:2px solid #888}
figure{margin:1.2em 0}figure svg{max-width:100%;height:auto}
figure+p,.wide+p{color:#555;font-size:.92em}
blockquote{background:#fff3cd;border-left:5px solid #d39e00;margin:1em 0;padding:.3em 1em}
code{background:#f4f4f4;padding:.1em .3em;overflow-wrap:anywhere}
td>div{min-width:var(--least,0)}
td>.long{--least:200px;overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.6em 1em;white-space:pre-wrap}pre code{padding:0}
"""
CARDS = """@container (max-width:{0}px){{
.w{0},.w{0} tbody,.w{0} tr{{display:block}}.w{0} thead{{display:none}}
.w{0} tr{{border-top:2px solid #888;padding:.4em 0}}
.w{0} td{{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);gap:.8em;border:0;
padding:.15em 0;text-align:left!important}}
.w{0} td::before{{content:attr(data-label);color:#555}}
.w{0} td>div{{overflow-wrap:anywhere;min-width:0}}.w{0} td.none{{display:none}}}}
"""


def html_page(markdown: str, folder: Path) -> str:
    """The page whole; images that `folder` holds as SVG become part of it, others keep their
    addresses. What is HTML in the Markdown is shown as text."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.add_render_rule("td_open", _cell_open)
    reader.add_render_rule("td_close", lambda *_: "</div></td>\n")
    tokens = reader.parse(markdown)
    widths = _tables(tokens)
    pictures = _pictures(tokens, folder)
    _anchors(tokens)
    body = reader.renderer.render(tokens, reader.options, {})
    body = body.replace("<table", '<div class="wide"><table').replace("</table>", "</table></div>")
    for place, picture in pictures.items():
        body = body.replace(place, picture)
    title = next((_said(b) for a, b in zip(tokens, tokens[1:]) if a.type == "heading_open"), "")
    cards = "".join(CARDS.format(width) for width in sorted(set(widths)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLESHEET}{cards}</style></head>\n<body>\n{body}</body></html>\n"
    )


def _anchors(tokens: list[Token]) -> None:
    """Headings are named as GitHub names them, so links within a page lead somewhere."""
    taken: dict[str, int] = {}
    for token, inline in zip(tokens, tokens[1:]):
        if token.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", _said(inline).lower()).replace(" ", "-")
            taken[slug] = taken.get(slug, -1) + 1
            token.attrSet("id", slug + (f"-{taken[slug]}" if taken[slug] else ""))


def _cell_open(_reader, tokens: list[Token], index: int, *_) -> str:
    attributes = "".join(f' {k}="{escape(str(v), quote=True)}"'
                         for k, v in tokens[index].attrs.items())  # fmt: skip
    inside = tokens[index + 1]
    longest = max(map(len, re.split(r"[ \n]", _said(inside))), default=0)
    if longest > LONGEST and "right" not in str(tokens[index].attrs.get("style", "")):
        return f'<td{attributes}><div class="long">'
    if _code(inside):
        return f'<td{attributes}><div style="--least:{CODE * longest + FRAME:.0f}px">'
    return f"<td{attributes}><div>"


def _tables(tokens: list[Token]) -> list[int]:
    """Tells each cell its heading, and each table the width below which it becomes cards; these
    widths in px."""
    found: list[int] = []
    for start, token in enumerate(tokens):
        if token.type != "table_open":
            continue
        end = next(i for i in range(start, len(tokens)) if tokens[i].type == "table_close")
        cells = [i for i in range(start, end) if tokens[i].type in ("th_open", "td_open")]
        heads = [_said(tokens[i + 1]) for i in cells if tokens[i].type == "th_open"]
        needs = [0.0] * len(heads)
        for count, i in enumerate(cells):
            column = count % len(heads)
            _mend(tokens[i + 1])
            needs[column] = max(needs[column], _need(tokens[i], tokens[i + 1]))
            if tokens[i].type == "td_open":
                tokens[i].attrSet("data-label", heads[column])
                if not tokens[i + 1].content.strip():
                    tokens[i].attrSet("class", "none")
        width = int(sum(LETTER * need + PADDING for need in needs) // 20 + 1) * 20
        token.attrSet("class", f"w{width}")
        found.append(width)
    return found


def _mend(cell: Token) -> None:
    """Intervals and exponents do not break."""
    for child in cell.children or ():
        if child.type == "text":
            whole = re.sub(r"\[[^][\s]+, [^][\s]+\]", lambda m: m[0].replace(" ", "\u00a0"),
                           child.content)  # fmt: skip
            child.content = re.sub(r"(?<=[\de[])-(?=\d)", "-\u2060", whole)


def _code(inside: Token) -> bool:
    return any(child.type == "code_inline" for child in inside.children or ())


def _need(cell: Token, inside: Token) -> float:
    """Letters of a line that a cell cannot do without: numbers, intervals and short words of code
    stay whole, columns of words get some more."""
    text = _said(inside)
    longest = max(map(len, re.split(r"[ \n]", text)), default=0)
    if _code(inside):
        longest = (CODE * min(longest, LONGEST) + FRAME) / LETTER
        return max(longest, min(len(text), WORDS))
    if "right" in str(cell.attrs.get("style", "")):
        return longest
    return max(min(longest, LONGEST), min(len(text), WORDS))


def _said(cell: Token) -> str:
    """The text of inline Markdown."""
    return "".join(c.content if c.type in ("text", "code_inline") else " " * (c.type == "softbreak")
                   for c in cell.children or ())  # fmt: skip


def _pictures(tokens: list[Token], folder: Path) -> dict[str, str]:
    """Takes images out of their paragraphs: what stands in their place -> the figure."""
    found: dict[str, str] = {}
    for token in tokens:
        children = token.children or []
        if token.type != "inline" or [c.type for c in children] != ["image"]:
            continue
        file = folder / str(children[0].attrs.get("src", ""))
        if file.suffix == ".svg" and file.is_file():
            place = f"\ue000{len(found)}\ue001"
            svg = _inline(file.read_text(encoding="utf-8"), file.stem, children[0].content)
            found[f"<p>{place}</p>"] = f"<figure>{svg}</figure>"
            token.children = [Token("text", "", 0, content=place)]
    return found


def _inline(svg: str, stem: str, name: str) -> str:
    """An SVG file as an element: no prolog, a name for readers of the page, ids of its own.

    Several figures share one document, so their ids (clip paths, glyphs) must not meet.
    """
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    own = re.sub(r"\W", "_", stem)
    element = re.sub(r'\bid="', f'id="{own}-', element)
    element = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}-", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(name, quote=True)}"', 1)
