"""A table for a terminal of some width: headings and cells wrap between words."""

from __future__ import annotations

from textwrap import wrap

GAP = 2


def columns(head: list[str], rows: list[list[str]], width: int) -> str:
    """Lines of at most `width` columns, or of as many as the longest words need. Headings give way
    first, then the widest column."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    cells = [max(map(len, column)) for column in zip(*rows)] if rows else widths
    words = [max((len(word) for cell in column for word in _words(cell)), default=0)
             for column in zip(*table)]  # fmt: skip
    for least in ([max(pair) for pair in zip(cells, words)], words):
        while (over := sum(widths) + GAP * (len(widths) - 1) - width) > 0:
            spare = [have - need for have, need in zip(widths, least)]
            wide = max(range(len(widths)), key=lambda i: (spare[i] > 0, widths[i]))
            if spare[wide] <= 0:
                break
            widths[wide] -= min(over, spare[wide], 1)
    return "\n".join(line for row in table for line in _lines(row, widths))


def _words(cell: str) -> list[str]:
    return wrap(cell, 1, break_long_words=False)


def _lines(row: list[str], widths: list[int]) -> list[str]:
    parts = [wrap(cell, max(1, w), break_long_words=False) or [""]
             for cell, w in zip(row, widths)]  # fmt: skip
    return [(" " * GAP).join((part[i] if i < len(part) else "").ljust(w)
                             for part, w in zip(parts, widths)).rstrip()
            for i in range(max(map(len, parts)))]  # fmt: skip
