"""The decision table of the front page: goal and memory first, each number with the row behind it.

Bytes are the account's, which gives the allocated bytes of the rows cited to the byte; losses and
speeds are rows of committed reports. A cell whose number nobody measured says so.
"""

from __future__ import annotations

from typing import NamedTuple

from kvlab.advice.ask import GOALS, Ask
from kvlab.advice.choices import Choice, choices
from kvlab.advice.table import Figure, Loss, long_enough
from kvlab.advice.tell import advised, shown
from kvlab.model import Outline
from kvlab.report import Book

CONTEXT, MEMORIES = 131072, (8, 16, 24, 80)
HEADS = ("goal", "memory", "flags", "bytes at the end", "loss", "speed", "forgets", "report")
SHORT = HEADS[:6] + HEADS[7:]  # of the README
REPORTS = {
    "exact": ("memory_200k", "ultra_long"),
    "facts": ("real_formats", "real_axes", "real_retrieval", "retrieval_quality"),
    "chat": ("prefix_hit_rate", "load"),
    "stream": ("endless", "real_windows", "window_quality"),
}  # those that are there
TIMED = "Qwen3-0.6B"  # the shapes whose speed the reports measured
# deed -> report, variants of it in the order of preference, how many tokens is told behind that
PARTS = {
    "window": ("real_windows", ("window.recent=4092 cache.block_size=128", "window.recent=4092"),
               ("perplexity_delta_percent", "kl_mean_nats"), "of"),
    "quest": ("real_retrieval", (
        "quest retrieval.budget_tokens=2048 retrieval.recent=256 cache.block_size=128",
        "quest retrieval.budget_tokens=2048"),
        ("perplexity_decoded_delta_percent", "kl_decoded_mean_nats"), "decoded behind"),
}  # fmt: skip
STANDS = {  # deed -> report, variant, what is unlike the composition
    "host": ("memory_200k", "fp8_host", "in fp8"),
    "quest": ("memory_200k", "retrieval", "in fp8"),
    "window": ("memory_200k", "window", "with 8,192 recent tokens"),
}


class Line(NamedTuple):
    """One line of the table, cells in the order of `HEADS`; memories are GB."""

    goal: str
    memories: list[int]
    cells: list[str]

    def told(self, heads: tuple[str, ...] = HEADS) -> list[str]:
        memory = f"{', '.join(map(str, self.memories))} GB"
        every = dict(zip(HEADS, [self.goal, memory, *self.cells]))
        return [every[head] for head in heads]


def decisions(name: str, model: Outline, book: Book | None, prefix: str = "") -> list[Line]:
    """For each goal and memory what to take; memories with the same answer share a line.

    book: where rows are cited; None leaves numbers without. prefix: of links to reports. Raises
    BadInput where a loss that is told is in no committed report.
    """
    found: list[Line] = []
    for goal in GOALS:
        links = ", ".join(f"[{r}]({prefix}{r}/README.md)" for r in REPORTS[goal]
                          if book is None or r in book.reports)
        for memory in MEMORIES:
            ask = Ask(memory, CONTEXT, goal=goal)
            for choice in shown(advised(choices(ask, model)), Ask(memory, CONTEXT)) or [None]:
                cells = [*_cells(choice, name, book), links]
                twin = next((x for x in found if x.goal == goal and x.cells == cells), None)
                if twin:
                    twin.memories.append(memory)
                else:
                    found.append(Line(goal, [memory], cells))
    return found


def _cells(choice: Choice | None, name: str, book: Book | None) -> list[str]:
    if choice is None:
        return ["nothing fits", "", "", "", ""]
    cite = _Citing(book)
    return [f"`{' '.join(choice.options)}`", _bytes(choice, cite), _loss(choice, cite),
            _speed(choice, name, cite), choice.forgets]  # fmt: skip


class _Citing:
    """Numbers of rows; without a book none, so that a page without them asks the same way."""

    def __init__(self, book: Book | None):
        self.book = book

    def row(self, name: str, variant: str, value: float) -> str:
        if self.book is None:
            return ""
        return " " + self.book.cite(self.book.behind(name, variant, value))

    def first(self, rows: list[dict]) -> str:
        return "" if self.book is None else " " + self.book.cite(rows[0])


def _variant(choice: Choice) -> str:
    """What the format is called in the rows: `fp8c format.sinks=4`."""
    own = [o for o in choice.options if o.partition("=")[0].partition(".")[0] == "format"]
    return " ".join(o.removeprefix("format=") for o in own)


def _bytes(choice: Choice, cite: _Citing) -> str:
    host = f" and {choice.end.host / 1e9:.3g} GB of host memory" if choice.end.host else ""
    measured = next(iter(choice.losses), None)
    row = "" if measured is None else cite.row("cache_allocated_bytes", _variant(choice),
                                               float(measured.allocated_bytes))  # fmt: skip
    return f"{choice.end.device / 1e9:.3g} GB{host}{row}; {choice.needed / 1e9:.3g} GB in all"


def _loss(choice: Choice, cite: _Citing) -> str:
    """Of the format, or of a window or a choice of blocks in 16 bits, on the model that loses more
    by KL."""
    if choice.deed in PARTS:
        told = _part_loss(choice.deed, cite) if "format=bf16" in choice.options else ""
        return told or "not measured on a real model"
    rows: list[Loss] = [row for row in choice.losses if row.kl]
    if not rows:
        return "none: the baseline"
    worst = max(rows, key=lambda row: row.kl.value)
    variant = _variant(choice)
    perplexity = cite.row("perplexity_delta_percent", variant, worst.perplexity.value)
    kl = cite.row("kl_mean_nats", variant, worst.kl.value)
    return (f"perplexity {worst.perplexity.told('+.2f')} %{perplexity}, "
            f"KL {worst.kl.told('.2g')} nats{kl}")  # fmt: skip


def part_rows(book: Book | None, deed: str) -> tuple[dict, dict] | None:
    """Change of perplexity and KL of the window or the choice of blocks that is offered, on the
    real model that loses more by KL; None where that was not measured, or on text too short."""
    report, variants, names, _ = PARTS[deed]
    for variant in variants if book else ():
        found = book.find(report, names[1], variant=variant)
        if found := [row for row in found if long_enough(row["params"])]:
            kl = max(found, key=lambda row: row["value"])
            [perplexity] = book.find(report, names[0], variant=variant, run=kl["params"]["run"])
            return perplexity, kl
    return None


def figure(row: dict) -> Figure:
    return Figure(*(row["value"] if row[end] is None else row[end]
                    for end in ("value", "low", "high")))


def _part_loss(deed: str, cite: _Citing) -> str:
    rows = part_rows(cite.book, deed)
    if rows is None:
        return ""
    perplexity, kl = rows
    return (f"perplexity {figure(perplexity).told('+.2f')} %{cite.first([perplexity])}, "
            f"KL {figure(kl).told('.2g')} nats{cite.first([kl])}, "
            f"{PARTS[deed][3]} {kl['params']['tokens']:,} tokens")  # fmt: skip


def _speed(choice: Choice, name: str, cite: _Citing) -> str:
    """Decoded tokens a second of one request, at the first measured length that is no shorter."""
    if name != TIMED or cite.book is None:
        return "not measured"
    report, variant, unlike = STANDS.get(choice.deed, ("decode_speed", _variant(choice), ""))
    wanted = {"variant": variant} | ({} if choice.deed in STANDS else {"batch": 1})
    rows = cite.book.find(report, "decode_tokens_per_second", **wanted)
    rows = sorted((r for r in rows if r["params"]["tokens"] >= CONTEXT),
                  key=lambda r: r["params"]["tokens"])  # fmt: skip
    if not rows:
        return "not measured"
    value = rows[0]["value"]
    told = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    where = f"at {rows[0]['params']['tokens']:,} tokens" + f", {unlike}" * bool(unlike)
    return f"{told} tokens/s {where}{cite.first(rows)}"
