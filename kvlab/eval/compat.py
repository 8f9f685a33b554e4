"""`python -m kvlab.eval.compat [FILE]`: the table of which members of two axes compose, tried out.

`python -m kvlab.eval.compat policy=my_module.MyPolicy` says it of one member, which may come from
outside the package.

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

from kvlab import axes as table
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, CacheGeometry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "COMPATIBILITY.md"
SHAPE = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32}
# Members of the table that are tried with other settings, too: label -> name, settings.
_POINT = [[[1.0] * 16] * 4] * 2
VARIED = {
    "policy": {"triattention, with centres": (
        "triattention", {"centres": dict.fromkeys(("real", "imaginary", "norm"), _POINT)})},
    "window": {"sink, middle=false": ("sink", {"middle": False}),
               "sink, rerotate": ("sink", {"middle": False, "rerotate": True})},
    "prefix": {"hash, hold=false": ("hash", {"hold": False})},
    "budget": {"shares, 3 to 1": ("shares", {"shares": [3, 1]}),
               "duo, with gates": ("duo", {"gates": [[0, 1], [1, 0]]})},
}  # fmt: skip
LIMITS = {
    "none": {}, "blocks": {"budget_blocks": 64}, "bytes": {"budget_bytes": 1 << 24},
    "percent": {"budget_percent": 50.0},
}
COMPLETIONS = {
    "": {},
    "a budget": {"limit": "percent"},
    "window.middle=false": {"window": "sink, middle=false"},
    "a policy and a budget": {"policy": "lru", "limit": "percent"},
    "a policy and a budget in blocks": {"policy": "lru", "limit": "blocks"},
    "a budget in blocks": {"limit": "blocks"},
    "groups": {"groups": "per_layer"},
    "a budget and groups": {"limit": "percent", "groups": "per_layer"},
    "a policy, a budget and groups": {
        "policy": "lru", "limit": "percent", "groups": "per_layer"},
    "a policy, a budget in blocks and groups": {
        "policy": "lru", "limit": "blocks", "groups": "per_layer"},
    "a budget in blocks and groups": {"limit": "blocks", "groups": "per_layer"},
}
# Budgets of those that choose tokens.
BY_HEAD = ("adakv", "all_heads", "duo, with gates", "simlayer")
OF_TOKENS = {  # what else is tried where heads choose tokens
    "evict=token": {"evict": "token"},
    "a policy that scores and a budget": {"policy": "snapkv", "limit": "percent"},
    "evict=token, a policy that scores and a budget": {
        "evict": "token", "policy": "snapkv", "limit": "percent"},
    "a policy that scores, a budget and groups": {
        "policy": "snapkv", "limit": "percent", "groups": "per_layer"},
    "a policy that scores, a budget and a window": {
        "policy": "snapkv", "limit": "percent", "window": "sink"},
    "policy=kvzip and a budget": {"policy": "kvzip", "limit": "percent"},
    "a budget and a window": {"limit": "percent", "window": "sink"},
    "a policy that scores and a window": {"policy": "snapkv", "window": "sink"},
}


class Verdict(NamedTuple):
    """`needs`: what completes the pair; `refusal`: the sentence where nothing does."""

    needs: str
    refusal: str | None


def axes() -> dict[str, list[str]]:
    """Axis -> the names of its members: those of the table of axes, and what is no class."""
    shipped = {axis: [*table.TABLE[axis].members, *VARIED.get(axis, ())] for axis in table.AXES}
    return shipped | {
        "limit": list(LIMITS),
        "groups": ["all", "per_layer", "per_head"],
        "evict": ["block", "token"],
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
    refusals, tried = [], COMPLETIONS
    if {"token", "per_head", *BY_HEAD} & set(chosen.values()):
        tried = COMPLETIONS | OF_TOKENS
    for needs, extra in tried.items():
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
    """`window.rerotate` is about the window, `cache.budget_bytes` about the limit."""
    if key.startswith("cache.budget_"):
        return "limit"
    return key.removeprefix("cache.").partition(".")[0].partition("_")[0]


def build(chosen: dict[str, str]) -> CacheSpec:
    """The spec of members by name, checked for the small geometry. Raises `BadInput`."""
    given = dict(chosen)
    limit = LIMITS[given.pop("limit", "none")]
    size = int(given.pop("block_size", 16))
    members = {axis: member(axis, name) for axis, name in given.items()}
    spec = CacheSpec(block_size=size, **members, **limit)
    return spec.checked_for(CacheGeometry(**SHAPE, block_size=size))


def member(axis: str, name: str) -> object:
    """A member as `CacheSpec` takes it: itself where it is tried with settings, else by name."""
    if name not in VARIED.get(axis, ()):
        return name
    short, settings = VARIED[axis][name]
    return table.by_name(axis, short, **settings)


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


def row(axis: str, name: str) -> list[str]:
    """What one member composes with, by axis, and what it is refused with and why.

    Raises `BadInput` for an unknown axis or member.
    """
    if axis not in table.AXES:
        raise BadInput("axis", axis, f"known: {', '.join(table.AXES)}")
    if name not in VARIED.get(axis, ()):
        table.find(axis, name)
    alone = verdict({axis: name})
    if alone.refusal:
        return [f"{axis}={name} is refused with anything: {alone.refusal}"]
    lines = [f"{axis}={name}" + (f" needs {alone.needs}" if alone.needs else "")]
    for other, members in live().items():
        if other == axis:
            continue
        told = {x: verdict({axis: name, other: x}).refusal for x in members}
        lines.append(f"{other}: {_count([refusal is None for refusal in told.values()])}")
        lines += [f"    {x}: {refusal}" for x, refusal in told.items() if refusal]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or print the row of one member, `axis=name`; 0, or 2 for bad input."""
    told = sys.argv[1:] if arguments is None else arguments
    if told and "=" in told[0]:
        try:
            print("\n".join(row(*told[0].split("=", 1))))
        except BadInput as error:
            print(f"compat: {error}", file=sys.stderr)
            return 2
        return 0
    path = Path(told[0]) if told else PAGE
    path.write_text(page(), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
