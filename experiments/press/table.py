"""Tables of the rows that `losses.py` and `beside.py` wrote.

    python experiments/press/table.py ROWS.jsonl ... [--out README.md]

Differences are paired: by item for scores, by token of the same text for losses. [low, high] is a
95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from methods import GRAINS

from kvlab import stats
from kvlab.core import BadInput
from kvlab.report.names import interval
from kvlab.track import read_objects

BLOCK = 32  # neighbouring tokens of a text, whose losses are alike
MARGIN = 5  # percent of kvpress's loss by which ours may be larger


def mean(
    values: Sequence, block: int = 1, scale: float = 1.0, least: float | None = None
) -> str:
    values = [np.asarray(v, float) for v in values]
    found = stats.mean_interval(values, block=block, seed=0, least=least)
    return interval(found.value, found.low, found.high, scale)


def heading(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


# -- losses


def losses(rows: list[dict]) -> Iterator[str]:
    """Ours beside kvpress's at its own granularity, then what coarser ones cost."""
    by = {(r["who"], r["method"], r["kept"], r["grain"]): r.get("kl") for r in rows}
    keys = list(dict.fromkeys((r["method"], r["kept"]) for r in rows))
    yield heading("method", "kept, %", "kvpress", "kvlab", "more, % of kvpress's",
                  f"beyond {MARGIN} %")  # fmt: skip
    for method, kept in keys:
        own, theirs = (by.get((who, method, kept, "head")) for who in ("kvlab", "kvpress"))
        told = [mean(x, BLOCK, least=0.0) if x else "" for x in (theirs, own)] + ["", ""]
        if own and theirs:
            gap = [np.subtract(a, b) for a, b in zip(own, theirs)]
            scale = np.mean(np.concatenate(theirs)) / 100
            told[2] = mean(gap, BLOCK, scale)
            told[3] = "yes" if np.mean(np.concatenate(gap)) / scale > MARGIN else "no"
        yield f"| {method} | {kept:g} | {' | '.join(told)} |"
    grains = [g for g in GRAINS if any(r["grain"] == g for r in rows)]
    yield "\n" + heading("kvlab", "kept, %", *grains)
    for method, kept in keys:
        found = [by.get(("kvlab", method, kept, grain)) for grain in grains]
        if any(found[1:]):
            told = [f"{np.mean(np.concatenate(x)):.4f}" if x else "" for x in found]
            yield f"| {method} | {kept:g} | {' | '.join(told)} |"


# -- tasks


def tasks(rows: list[dict]) -> Iterator[str]:
    """A line for each method and share, kvpress's and ours at each granularity."""
    arms = defaultdict(dict)  # (method, kept, who, grain) -> item -> row
    for row in rows:
        if "score" in row:
            arms[row["method"], row["kept"], row["who"], row["grain"]][row["item"]] = row
    yield heading("method", "kept", "who", "score, %", "minus its full cache", "minus kvpress's",
                  "MB", "items")  # fmt: skip
    methods = list(dict.fromkeys(key[0] for key in arms))
    for key in sorted(arms, key=lambda k: (methods.index(k[0]), -k[1], k[2] == "kvlab")):
        method, kept, who, grain = key
        own = arms[key]
        full = {} if method == "full" else arms["full", 1.0, who, "head"]
        theirs = {} if who == "kvpress" else arms.get((method, kept, "kvpress", "head"), {})
        told = [percent(own), minus(own, full), minus(own, theirs)]
        any_row = next(iter(own.values()))
        size = np.mean([row["bytes"] for row in own.values()]) / 1e6
        masked = "" if any_row.get("freed", True) else " masked"
        label = who if grain == "head" else f"{who}, {grain}"
        yield (f"| {method} | {kept:g} | {label} | {' | '.join(told)} | {size:.2f}{masked} | "
               f"{len(own)} |")  # fmt: skip
    yield from budgets(arms)
    for why in dict.fromkeys(f"{r['who']} {r['method']}, {r['kept']:g}: {r['refused']}"
                             for r in rows if "refused" in r):
        yield f"\nNot run: {why}"


def budgets(arms: dict) -> Iterator[str]:
    """What budgets by head change for the same scorer."""
    found = [(who, kept, own, arms[equal]) for (method, kept, who, grain), own in arms.items()
             if method == "snapkv adakv" and (equal := ("snapkv", kept, who, grain)) in arms]
    if found:
        yield "\n" + heading("snapkv adakv minus snapkv", *(f"{k:g}" for k in shares(found)))
    for who in dict.fromkeys(x[0] for x in found):
        told = {kept: minus(own, equal) for w, kept, own, equal in found if w == who}
        yield f"| {who} | {' | '.join(told.get(k, '') for k in shares(found))} |"


def shares(found: list[tuple]) -> list[float]:
    return sorted({x[1] for x in found}, reverse=True)


def percent(own: dict) -> str:
    found = stats.proportion_percent([np.array([row["score"]]) for row in own.values()], block=1)
    return interval(found.value, found.low, found.high)


def minus(own: dict, other: dict) -> str:
    both = [name for name in own if name in other]
    gaps = [np.array([own[n]["score"] - other[n]["score"]]) for n in both]
    return mean(gaps, scale=0.01) if both else ""


def seconds(rows: list[dict]) -> Iterator[str]:
    """Medians of prefill, the first of each arm left out."""
    took, kepts = defaultdict(list), sorted({r["kept"] for r in rows}, reverse=True)
    for row in rows:
        if "seconds" in row:
            took[row["method"], row["kept"], row["who"], row["grain"]].append(row["seconds"])
    if not took:
        return
    yield "\n" + heading("prefill, ms", "kept", "kvpress", "kvlab", "kvlab / kvpress")
    for method in dict.fromkeys(key[0] for key in took):
        for kept in kepts:
            both = [took.get((method, kept, who, "head")) for who in ("kvpress", "kvlab")]
            if any(both):
                ms = [1000 * np.median(x[1:] or x) if x else None for x in both]
                ratio = f"{ms[1] / ms[0]:.2f}" if all(ms) else ""
                told = ["" if x is None else f"{x:.1f}" for x in ms]
                yield f"| {method} | {kept:g} | {' | '.join(told)} | {ratio} |"


def pages(rows: list[dict]) -> Iterator[str]:
    for model in sorted({r["model"] for r in rows if r["kind"] == "losses"}):
        mine = [r for r in rows if r["kind"] == "losses" and r["model"] == model]
        first = mine[0]
        yield (f"\n## KL of the next tokens, {model}\n\n{first['context']} tokens of context, "
               f"float32, {first['device']}\n")
        yield from losses(mine)
    timed = [r for r in rows if r["kind"] == "prefill"]
    for model, task, length in sorted({(r["model"], r["task"], r["length"])
                                       for r in rows if r["kind"] == "task"}):
        mine = [r for r in rows if r["kind"] == "task"
                and (r["model"], r["task"], r["length"]) == (model, task, length)]
        yield f"\n## {task}, {length} tokens, {model}, {mine[0]['dtype']}\n"
        yield from tasks(mine)
    for model, length in sorted({(r["model"], r["length"]) for r in timed}):
        yield f"\n## Seconds of prefill, {length} tokens, {model}\n"
        yield from seconds([r for r in timed if (r["model"], r["length"]) == (model, length)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    try:
        text = "\n".join(pages([row for path in given.rows for row in read_objects(path)])) + "\n"
    except (OSError, BadInput) as error:
        sys.exit(f"table.py: {error}")
    except KeyError as error:
        sys.exit(f"table.py: a row of {given.rows[0]} has no {error}: not of losses.py, beside.py")
    if not text.strip():
        sys.exit(f"table.py: {given.rows[0]} has no rows of losses.py or beside.py")
    if given.out:
        given.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
