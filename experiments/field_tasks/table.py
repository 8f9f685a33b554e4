"""Tables of the study from what it packed: which tasks can be done, and what each method keeps.

    python experiments/field_tasks/table.py FOLDER

FOLDER: what `field_tasks*.tar.gz` holds, unpacked (`runs/*/items.jsonl`). Points are percent of the
score, paired by item with the full cache, with random eviction of as many tokens by as many heads,
or with the method itself under equal budgets; 95 % intervals over items, of several tasks together
over all their items. **Bold**: outside the interval.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvlab import stats
from kvlab.core import BadInput
from kvlab.eval.rows import paired
from kvlab.track import read_objects

GRANULARITY = re.compile(r"\((?!control\)).*\)")
RANDOM = {  # which random control stands beside a method: the one with its budget
    "adakv": "adakv", "pyramid": "pyramid", "duo": "duo", "simlayer": "simlayer",
    "all_heads": "all_heads", "chunks": "chunks",
}  # fmt: skip


class Setting(NamedTuple):
    model: str
    tokens: int
    inside: bool

    def __str__(self):
        side = "inside" if self.inside else "outside"
        return f"{self.model}, {self.tokens:,} tokens, question {side} the compressed text"


class Arm(NamedTuple):
    """One cache on one task at one budget: for each item its score, and what else there is."""

    name: str
    scores: dict[str, dict[str, float]]

    def of(self, name: str = "score") -> dict[str, float]:
        return self.scores.get(name, {})

    @property
    def title(self) -> str:
        """As a table has it: with what it is where it is not run as published."""
        told = GRANULARITY.search(self.scores["arm"])
        return f"`{self.name}`" + (f" {told[0]}" if told else "")


Arms = dict[tuple[Setting, str, float], dict[str, Arm]]  # by setting, task and budget, by name


def load(folder: Path) -> tuple[list[dict], Arms]:
    """All rows, and those of eviction and formats by where they were measured."""
    rows, arms = [], defaultdict(dict)
    for file in sorted(folder.glob("runs/*/items.jsonl")):
        for row in read_objects(file):
            rows.append(row)
            if row["kind"] in ("evict", "formats") and row.get("score"):
                place = Setting(row["model"], row["tokens"], row["inside"]), row["task"]
                name = short(row["arm"])
                arms[*place, row["budget"]][name] = Arm(name, row)
    return rows, dict(arms)


def short(arm: str) -> str:
    """`snapkv adakv 25%` and `random adakv 25% (control)` without their budget."""
    words = [w for w in arm.split("(")[0].split() if not w.endswith("%")]
    return " ".join(words)


def pairs(arms: list[tuple[Arm, Arm]], name: str = "score") -> tuple[list, list]:
    """Scores of both on the items that both have, an array for each task."""
    mine, theirs = [], []
    for one, other in arms:
        both = [n for n in one.of(name) if n in other.of(name)]
        if both:
            mine.append(np.array([one.of(name)[n] for n in both]))
            theirs.append(np.array([other.of(name)[n] for n in both]))
    return mine, theirs


def difference(arms: list[tuple[Arm, Arm]]) -> str:
    """Points with their interval, bold where that leaves 0 out."""
    mine, theirs = pairs(arms)
    if not mine:
        return ""
    found = paired(mine, theirs, 0)
    if found.low is None:
        return f"{found.value:+.0f}"
    text = f"{found.value:+.0f} [{found.low:+.0f}, {found.high:+.0f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def share(arm: Arm | None, name: str = "score") -> str:
    values = list(arm.of(name).values()) if arm else []
    return f"{100 * np.mean(values):.0f}" if values else ""


def random_of(name: str, arms: dict[str, Arm]) -> Arm | None:
    """The control of a method: random eviction in the same granularity and budget."""
    word = name.split()[-1]
    for wanted in (f"random {RANDOM[word]}" if word in RANDOM else "random", "random"):
        for known, arm in arms.items():
            if known == wanted:
                return arm
    return None


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def titles(found: Iterable[dict[str, Arm]]) -> dict[str, str]:
    """Methods by name, in order: what a table calls each."""
    every = {}
    for told in found:
        every |= {name: told[name].title for name in methods(told)}
    return every


def methods(arms: dict[str, Arm]) -> list[str]:
    return [n for n in arms if n.split()[0] not in ("full", "random", "window", "shuffled", "no")]


# -- the tables


def possible(rows: list[dict]) -> str:
    """What the full cache can do, and what is guessed without the context."""
    cells: dict[tuple, dict[str, tuple]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "probe" and row.get("score"):
            values = np.array(list(row["score"].values()))
            cells[row["model"], row["tokens"]].setdefault(row["task"], []).append(values)
    tasks = list(dict.fromkeys(task for told in cells.values() for task in told))
    lines = []
    for task in tasks:
        line = [f"`{task}`"]
        for place in sorted(cells):
            values = cells[place].get(task, [])
            if not values:
                line.append("")
                continue
            found = stats.proportion_percent([values[0]], block=1, seed=0)
            ends = "" if found.low is None else f" [{found.low:.0f}, {found.high:.0f}]"
            guess = f"; {100 * values[1].mean():.0f}" if len(values) > 1 else ""
            line.append(f"{found.value:.0f}{ends}{guess}")
        lines.append(line)
    return table(["task", *(f"{m}, {n:,}" for m, n in sorted(cells))], lines)


def by_task(arms: Arms, setting: Setting, budget: float) -> str:
    """Every method on every task at one budget: score, and points above random eviction."""
    found = {task: a for (s, task, b), a in arms.items() if s == setting and b == budget}
    lines = []
    for name, title in titles(found.values()).items():
        line, beside, lost = [title], [], []
        for told in found.values():
            mine, other, full = told.get(name), random_of(name, told), told.get("full")
            cell = share(mine)
            if mine and other:
                beside.append((mine, other))
                cell += f" ({difference([(mine, other)])})"
            if mine and full:
                lost.append((mine, full))
            line.append(cell)
        lines.append([*line, difference(beside), difference(lost)])
    for name in ("full", "random", "window"):
        lines.append([name, *(share(told.get(name)) for told in found.values()), "", ""])
    return table(["method", *(f"`{t}`" for t in found), "all: minus random", "all: minus full"],
                 lines)  # fmt: skip


def by_budget(arms: Arms, setting: Setting, against: Callable) -> str:
    """All tasks together, a column for each budget. against: (name, arms) -> the other arm."""
    budgets = sorted({b for (s, _, b) in arms if s == setting and b}, reverse=True)
    here = [a for (s, _, b), a in arms.items() if s == setting and b]
    lines = []
    for name, title in titles(here).items():
        line = [title]
        for budget in budgets:
            both = [(a[name], other) for (s, _, b), a in arms.items()
                    if s == setting and b == budget and name in a
                    and (other := against(name, a))]  # fmt: skip
            line.append(difference(both))
        lines.append(line)
    return table(["method", *(f"{b:g} %" for b in budgets)], lines)


def copied(arms: Arms, setting: Setting, budget: float) -> str:
    """Of answers that are strings to be copied: the share copied before the first wrong character,
    and how many were found but miscopied, in percent."""
    names: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for (s, _, b), told in arms.items():
        for name, arm in told.items() if s == setting and b == budget else ():
            for what in ("copied", "miscopied", "score"):
                if arm.of("copied"):
                    names[name][what] += list(arm.of(what).values())
    lines = [[f"`{name}`", *(f"{100 * np.mean(told[w]):.0f}" for w in
              ("score", "copied", "miscopied"))] for name, told in names.items()]  # fmt: skip
    return table(["method", "score", "copied", "miscopied"], lines)


def by_head(arms: Arms) -> str:
    """A method under unequal budgets minus itself under equal ones, task by task."""
    lines = []
    for (setting, task, budget), told in arms.items():
        for name in methods(told):
            base = told.get(name.split()[0])
            if base and name != base.name and not name.endswith("chunks"):
                text = difference([(told[name], base)])
                lines.append([str(setting).split(", question")[0] + " " + ("inside" * setting.inside
                              or "outside"), f"`{task}`", f"{budget:g} %", f"`{name}`",
                              share(base), text])  # fmt: skip
    sure = [line for line in lines if line[-1].startswith("**")]
    head = ["where", "task", "budget", "budget by", "equal", "minus equal"]
    return (f"{len(sure)} of {len(lines)} pairs lie outside their interval; those are\n\n"
            + table(head, sure))


def formats(arms: Arms) -> str:
    """Formats minus the full cache, each task for itself and all together."""
    found = {(s, t): a for (s, t, b), a in arms.items() if not b}
    names = dict.fromkeys(n for a in found.values() for n in methods(a))
    lines = [[f"`{name}`", *(difference([(a[name], a["full"])]) if name in a and "full" in a
                             else "" for a in found.values()),
              difference([(a[name], a["full"]) for a in found.values()
                          if name in a and "full" in a])] for name in names]  # fmt: skip
    return table(["format", *(f"`{t}`, {s.tokens:,}" for s, t in found), "all"], lines)


def requests(folder: Path) -> str:
    """Shared contexts: equal answers, and time to the first token of all requests but the first."""
    wanted = ("task_same_answers_percent", "task_score_percent", "task_ttft_ms",
              "task_ttft_saved_percent")  # fmt: skip
    lines = []
    for file in sorted(folder.glob("runs/requests-*/measurements.jsonl")):
        arms: dict[str, dict[str, str]] = defaultdict(dict)
        for row in read_objects(file):
            if row["name"] in wanted:
                ends = "" if row["low"] is None else f" [{row['low']:.1f}, {row['high']:.1f}]"
                arms[row["variant"]][row["name"]] = f"{row['value']:.1f}{ends}"
        for name, told in arms.items():
            lines.append([file.parent.name.removeprefix("requests-"), f"`{name}`",
                          *(told.get(w, "") for w in wanted)])
    return table(["run", "cache", "equal answers, %", "score, %", "first token, ms", "saved, %"],
                 lines)  # fmt: skip


def sections(folder: Path) -> Iterator[str]:
    rows, arms = load(folder)
    if not rows:
        raise BadInput("FOLDER", str(folder), "has no runs/*/items.jsonl with rows; unpack there "
                       "what run.py packed")
    yield ("### What the full cache can do\n\nScore in percent with its interval; behind the "
           f"semicolon, without the context.\n\n{possible(rows)}")
    if any(not budget for *_, budget in arms):
        yield f"### Formats, points to bf16\n\n{formats(arms)}"
    for setting in dict.fromkeys(s for s, _, b in arms if b):
        yield (f"### {setting}\n\nAll tasks together, points above random eviction:\n\n"
               + by_budget(arms, setting, random_of))
        yield ("Points to the full cache:\n\n"
               + by_budget(arms, setting, lambda name, told: told.get("full")))
        for budget in sorted({b for s, _, b in arms if s == setting and b}, reverse=True):
            yield (f"At {budget:g} %: score in percent (points above random eviction)\n\n"
                   + by_task(arms, setting, budget))
            yield (f"Strings to copy, at {budget:g} %, in percent\n\n"
                   + copied(arms, setting, budget))
    yield f"### Budgets by head and by layer\n\n{by_head(arms)}"
    yield f"### Requests through the prefix cache\n\n{requests(folder)}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/field_tasks/table.py FOLDER")
    try:
        print("\n\n".join(sections(Path(sys.argv[1]))))
    except (OSError, BadInput) as problem:
        sys.exit(f"table.py: {problem}")
    except KeyError as problem:
        sys.exit(f"table.py: a row under {sys.argv[1]} has no {problem}: worker.py wrote no such")
