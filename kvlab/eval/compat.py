"""`python -m kvlab.eval.compat [FILE]`: the table of which members of two axes compose, tried out.

Each pair is built as a cache of a small geometry. Where two members need a third (a policy needs a
budget), the completions below are tried in turn, and the table says which one it took. What no
completion makes is refused, with the code's own sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

from kvlab import format as formats
from kvlab import offload, policy, retrieval, summary
from kvlab.blocks import HashSharing, NoSharing
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, CacheGeometry
from kvlab.window import NoWindow, SinkWindow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "COMPATIBILITY.md"
SHAPE = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32}
WINDOWS = {
    "none": NoWindow(),
    "sink": SinkWindow(),
    "sink, middle=false": SinkWindow(middle=False),
    "sink, rerotate": SinkWindow(middle=False, rerotate=True),
}
BUDGETS = {
    "none": {}, "blocks": {"budget_blocks": 64}, "bytes": {"budget_bytes": 1 << 24},
    "percent": {"budget_percent": 50.0},
}
PREFIXES = {"none": NoSharing(), "hash": HashSharing(), "hash, hold=false": HashSharing(hold=False)}
COMPLETIONS = {
    "": {},
    "a budget": {"budget": "percent"},
    "window.middle=false": {"window": "sink, middle=false"},
    "a policy and a budget": {"policy": "lru", "budget": "percent"},
    "a policy and a budget in blocks": {"policy": "lru", "budget": "blocks"},
    "a budget in blocks": {"budget": "blocks"},
}


class Verdict(NamedTuple):
    """`needs`: what completes the pair; `refusal`: the sentence where nothing does."""

    needs: str
    refusal: str | None


def axes() -> dict[str, list[str]]:
    """Axis -> the names of its members, as the code knows them."""
    return {
        "format": list(formats.NAMES),
        "policy": policy.names(),
        "window": list(WINDOWS),
        "summary": list(summary.SUMMARIES),
        "retrieval": list(retrieval.RETRIEVALS),
        "offload": list(offload.OFFLOADS),
        "prefix": list(PREFIXES),
        "budget": list(BUDGETS),
        "groups": ["all", "per_layer"],
        "block_size": ["1", "16", "64", "256"],
    }


@cache
def live() -> dict[str, list[str]]:
    """`axes` without members that no live cache takes."""
    return {axis: [n for n in names if not verdict({axis: n}).refusal]
            for axis, names in axes().items()}  # fmt: skip


def verdict(chosen: dict[str, str]) -> Verdict:
    """Whether members (axis -> name) compose, by themselves or with one of the completions.

    Of several refusals the one counts that is about a chosen axis and names another one; of equals
    the last.
    """
    refusals = []
    for needs, extra in COMPLETIONS.items():
        if needs and extra.keys() <= chosen.keys():
            continue  # nothing of it would be added
        try:
            build({**extra, **chosen})
        except BadInput as error:
            own = _axis(error.key)
            others = [axis for axis in chosen if axis != own and f"{axis}=" in error.remedy]
            refusals.append(((own in chosen) + bool(others), error.key, error.remedy))
        else:
            return Verdict(needs, None)
    best = max(rank for rank, _, _ in refusals)
    _, key, remedy = [r for r in refusals if r[0] == best][-1]
    return Verdict("", f"{key}: {remedy}")


def _axis(key: str) -> str:
    """`window.rerotate` is about the window, `cache.budget_bytes` about the budget."""
    return key.removeprefix("cache.").partition(".")[0].partition("_")[0]


def build(chosen: dict[str, str]) -> CacheSpec:
    """The spec of members by name, checked for the small geometry. Raises `BadInput`."""
    given = dict(chosen)
    budget = BUDGETS[given.pop("budget", "none")]
    window = WINDOWS[given.pop("window", "none")]
    prefix = PREFIXES[given.pop("prefix", "none")]
    size = int(given.pop("block_size", 16))
    spec = CacheSpec(window=window, prefix=prefix, block_size=size, **given, **budget)
    return spec.checked_for(CacheGeometry(**SHAPE, block_size=size))


def pairs() -> Iterator[tuple[tuple[str, str], tuple[str, str], Verdict]]:
    """Every pair of members of two axes with its verdict, of members that a live cache takes."""
    for (a, first), (b, second) in combinations(live().items(), 2):
        for x, y in product(first, second):
            yield (a, x), (b, y), verdict({a: x, b: y})


def page() -> str:
    """The whole of docs/COMPATIBILITY.md."""
    found = list(pairs())
    refused = [one for one in found if one[2].refusal]
    made = len(found) - len(refused)
    shape = f"{SHAPE['layers']} layers with {SHAPE['kv_heads']} key/value heads"
    return "\n".join([
        "# Which axes compose", "",
        "Made by `python -m kvlab.eval.compat`; a test fails when it is out of date. Every pair of "
        f"members of two axes was tried for a model of {shape}:",
        f"{len(found):,} pairs, {made:,} compose. A cell says how many of its pairs do.", "",
        *_matrix(found), "", "## What a member needs", "",
        "Some members make no sense alone. Their pairs were completed so:", "", *_needs(), "",
        "## What is refused", "", "Each with the sentence that a user gets.", "",
        *_alone(), *_refusals(refused), "",
    ])  # fmt: skip


def _matrix(found: list) -> list[str]:
    names = list(axes())
    cells: dict[tuple[str, str], list[bool]] = {}
    for (a, _), (b, _), told in found:
        cells.setdefault((a, b), []).append(told.refusal is None)
    lines = [f"| | {' | '.join(names[1:])} |", "|---" * len(names) + "|"]
    for row in names[:-1]:
        told = [_count(cells.get((row, column))) for column in names[1:]]
        lines.append(f"| **{row}** | {' | '.join(told)} |")
    return lines


def _count(cell: list[bool] | None) -> str:
    if cell is None:
        return ""
    return f"all {len(cell)}" if all(cell) else f"{sum(cell)} of {len(cell)}"


def _needs() -> list[str]:
    """Members with what completes them, of members that need it."""
    took: dict[tuple[str, str], set[str]] = {}
    for axis, names in live().items():
        for name in names:
            needs = verdict({axis: name}).needs
            if needs:
                took.setdefault((axis, needs), set()).add(name)
    lines = ["| member | needs |", "|---|---|"]
    return lines + [f"| {a}: {_listed(a, found)} | {needs} |" for (a, needs), found in took.items()]


def _alone() -> list[str]:
    """Members that no live cache takes."""
    lines = ["| members | with | because |", "|---|---|---|"]
    for axis, names in axes().items():
        for name in names:
            if told := verdict({axis: name}).refusal:
                lines.append(f"| {axis}: {name} | anything | {told} |")
    return lines


def _refusals(refused: list) -> list[str]:
    """One line for each sentence and pair of axes, the members listed."""
    grouped: dict[tuple[str, str, str], tuple[set, set]] = {}
    for (a, x), (b, y), told in refused:
        sentence = told.refusal.replace(f"{a}={x}", a).replace(f"{b}={y}", b)
        first, second = grouped.setdefault((a, b, sentence), (set(), set()))
        first.add(x)
        second.add(y)
    return [
        f"| {a}: {_listed(a, first)} | {b}: {_listed(b, second)} | {sentence} |"
        for (a, b, sentence), (first, second) in grouped.items()
    ]


def _listed(axis: str, members: set[str]) -> str:
    every = live()[axis]
    if len(members) == len(every):
        return "any"
    if len(every) - len(members) == 1 and len(every) > 2:
        return f"any but {(set(every) - members).pop()}"
    return "; ".join(name for name in every if name in members)


def main(arguments: list[str] | None = None) -> int:
    """Write the page; 0."""
    told = sys.argv[1:] if arguments is None else arguments
    path = Path(told[0]) if told else PAGE
    path.write_text(page(), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
